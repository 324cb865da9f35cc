"""``backtest`` beside a running system: the files that ``replay`` posts there give the same signals, field by field."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog

import runner
from actors.collector import Collector
from actors.core.manifest import MANIFEST_FILE
from actors.emitter import Emitter
from actors.features import Features
from actors.recorder import Recorder
from bus import topology
from bus.client import Bus
from bus.store import Store
from bus.subjects import MODELS, SIGNALS
from commands.output import DONE, NO, WRONG
from commands.replay import replay
from deploy.server import free_port
from schema.messages import Candle, ModelState, Signal
from schema.settings import Features as FeatureSettings
from schema.settings import Gateway, Settings
from tests.builders import read_until, running, walk
from tests.models import changed, files, manifest_of, release, trust
from tests.servers import OPERATOR, nats_server
from tests.system import cut

pytestmark = pytest.mark.timeout(180)

THRESHOLD = 0.505  # near enough to a half for a model of nothing to trade in both directions
SENTINEL = "ZZZ"
QUIET = 3.0  # seconds: longer than a replay of a few bars may take on a busy machine


def model(folder: Path) -> dict[str, bytes]:
    """A version that trades, also as files in ``folder``; the home beside it has the key that it is signed with."""
    artifacts = changed(files(), threshold=THRESHOLD)
    trust(folder.parent)
    folder.mkdir()
    for name, data in artifacts.items():
        (folder / name).write_bytes(data)
    return artifacts


def write(file: Path, bars: Sequence[Candle]) -> Path:
    rows = [
        f"{int(b.ts.timestamp())},{b.open!r},{b.high!r},{b.low!r},{b.close!r},{b.volume:.0f},{b.spread:.0f},0\n"
        for b in bars
    ]
    file.write_text("time,open,high,low,close,tick_volume,spread,real_volume\n" + "".join(rows))
    return file


@dataclass(frozen=True)
class Live:
    """A running system that had no candle before."""

    gateway: str
    bus: Bus
    nats_url: str
    database_url: str

    async def replay(self, file: Path, symbol: str) -> None:
        assert await replay(file, symbol=symbol, timeframe="M1", url=self.gateway) == DONE

    async def signals(self, last: str) -> list[Signal]:
        """Every signal in the order of the stream, up to those of the series ``last``."""
        found: list[Signal] = await read_until(self.bus, SIGNALS, lambda out: bool(out) and out[-1].symbol == last)
        return found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The home of the system and of the commands. A command that asks NATS bends the logs to its own stderr: bent back."""
    monkeypatch.setenv("MT5_HOME", str(tmp_path))
    before = structlog.get_config()
    yield tmp_path
    structlog.configure(**before)


@asynccontextmanager
async def system(
    folder: Path, home: Path, database_url: str, artifacts: dict[str, bytes], state: ModelState
) -> AsyncIterator[Live]:
    port = free_port()
    settings = Settings(home=str(home), gateway=Gateway(port=port), features=FeatureSettings(quiet_seconds=QUIET))
    with nats_server(Path(tempfile.mkdtemp(prefix="backtest-", dir=folder))) as server:
        url = server.url(OPERATOR)
        bus = await Bus.connect(url, name="operator")
        try:
            await topology.apply(bus, settings.streams)
            actors = (Collector, Features, Emitter, Recorder)
            async with running(*actors, nats_url=url, database_url=database_url, settings=settings):
                await release(bus, artifacts, state)
                await read_until(bus, MODELS, lambda out: out[-1:] and out[-1].event == "activated")
                yield Live(f"http://127.0.0.1:{port}", bus, url, database_url)
        finally:
            await bus.close()


async def mt5(*words: object) -> int:
    """The command line in a thread, as it has an event loop of its own."""
    return await asyncio.to_thread(runner.main, [str(word) for word in words])


def lines(file: Path) -> list[Signal]:
    return [msgspec.json.decode(line, type=Signal) for line in file.read_bytes().splitlines()]


def comparable(signals: Sequence[Signal]) -> list[dict[str, Any]]:
    return [{**msgspec.to_builtins(signal), "created_at": None} for signal in signals]


@pytest.mark.parametrize("state", ["champion", "provisional"])
@pytest.mark.parametrize("name", ["EURUSD_M1_202502.csv", "EURUSD_M1_202502_raw.csv"])
async def test_a_real_file_gives_the_signals_of_its_replay(
    name: str, state: ModelState, data: Path, tmp_path: Path, server_folder: Path, pg_url: str
) -> None:
    file = cut(data / name, tmp_path / "EURUSD_M1.csv", 0, 3_000)
    end = write(tmp_path / f"{SENTINEL}_M1.csv", walk(1))
    artifacts = model(tmp_path / "model")
    async with system(server_folder, tmp_path, pg_url, artifacts, state) as live:
        await live.replay(file, "EURUSD")
        await live.replay(end, SENTINEL)
        expected = await live.signals(SENTINEL)

    out = tmp_path / "signals.jsonl"
    assert await mt5("backtest", file, end, "--model-dir", tmp_path / "model", "--state", state, "--out", out) == DONE
    found = lines(out)
    assert comparable(found) == comparable(expected)
    labels = Counter(signal.label for signal in found)
    if state == "champion":
        assert min(labels[1], labels[-1]) > 50
    else:
        assert labels == {0: len(found)}
        assert {signal.abstain for signal in found} == {"unproven", "warming"}
    rejected = 3_001 - len(found)
    assert rejected > 50 if "raw" in name else rejected == 0


async def test_late_corrected_and_older_bars_give_the_signals_of_their_replay(
    tmp_path: Path, server_folder: Path, pg_url: str
) -> None:
    bars = walk(2_410)
    older, bars = bars[:400], bars[400:]

    def other(bar: Candle, by: float = 1e-4) -> Candle:
        return msgspec.structs.replace(bar, close=round(bar.close + by, 5), high=round(bar.high + 2 * by, 5))

    parts: list[list[Candle]] = [
        # A bar of the first payload is missing and comes with the second one; the last three travel one a message.
        [*bars[:990], *bars[991:1_001], bars[990], *bars[1_001:2_000], *bars[2_000:2_003]],
        [other(bars[2_002])],  # a correction,
        [bars[2_002]],  # taken back: a message that the stream knows,
        [other(bars[2_002], 2e-4)],  # and another one
        [other(bars[700]), bars[2_003]],  # far behind, with a new bar
        older[200:],  # before the first: these wait until it is quiet
        older[:200],  # and these with them,
        bars[2_004:],  # while the series goes on
    ]
    series = [write(tmp_path / f"EURUSD_M1_{number}.csv", part) for number, part in enumerate(parts)]
    end = write(tmp_path / f"{SENTINEL}_M1.csv", walk(1))
    artifacts = model(tmp_path / "model")
    async with system(server_folder, tmp_path, pg_url, artifacts, "champion") as live:
        for file in series:
            await live.replay(file, "EURUSD")
        oldest: datetime = older[0].ts
        await read_until(live.bus, SIGNALS, lambda out: bool(out) and any(s.ts == oldest for s in out[-2_410:]))
        await live.replay(end, SENTINEL)
        expected = await live.signals(SENTINEL)

    out = tmp_path / "signals.jsonl"
    assert await mt5("backtest", *series, "--model-dir", tmp_path / "model", "--out", out) == DONE
    found = lines(out)
    assert comparable(found) == comparable(expected[:-1])  # but for the last, which told that all the others were there
    assert sum(signal.supersedes is not None for signal in found) > 2_000
    assert {signal.candle_revision for signal in found} >= {0, 1, 2}


async def test_it_takes_the_version_and_its_state_from_the_system(
    tmp_path: Path,
    server_folder: Path,
    pg_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path / "EURUSD_M1.csv", walk(400))
    artifacts = model(tmp_path / "model")
    manifest = manifest_of(artifacts)
    monkeypatch.chdir(tmp_path)
    async with system(server_folder, tmp_path, pg_url, artifacts, "champion") as live:
        monkeypatch.setenv("MT5_NATS_URL", live.nats_url)
        monkeypatch.setenv("MT5_DATABASE_URL", live.database_url)
        assert await mt5("backtest", file, "--json") == NO
        assert "No model serves M1: name a version with --model" in capsys.readouterr().err
        store = await Store.connect(pg_url)
        row = ("rf_m1", manifest.version, "M1", "candidate", manifest.created_at, artifacts[MANIFEST_FILE].decode())
        await store.execute("upsert_model", *row)
        found = []
        for state in ("candidate", "provisional", "champion"):
            await store.execute("set_model_state", "rf_m1", manifest.version, state, 1, None, "", "test")
            assert await mt5("backtest", file, "--model", manifest.version, "--first-seq", 7, "--json") == DONE
            found.append(json.loads(capsys.readouterr().out))
        await store.close()
        assert await mt5("backtest", file, "--json") == DONE  # the champion by itself
        assert json.loads(capsys.readouterr().out)["models"] == found[2]["models"]
        assert await mt5("backtest", file, "--model", "nothing") == NO
        assert "There is no version nothing" in capsys.readouterr().err
        await live.bus.js.delete_object_store("models")
        assert await mt5("backtest", file, "--model", manifest.version) == NO
        assert "object store" in capsys.readouterr().err
    assert [one["models"][0]["state"] for one in found] == ["champion", "provisional", "champion"]
    assert {one["models"][0]["version"] for one in found} == {manifest.version}
    assert found[1]["abstain"] == {"unproven": 101, "warming": 299}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("bars.csv",), "bars.csv does not begin with its series, as EURUSD_M1.csv does"),
        (("bars.csv", "--symbol", "EURUSD", "--timeframe", "M7"), '"M7" is no timeframe'),
        (("bars.csv", "--symbol", " ", "--timeframe", "M1"), "--symbol is empty"),
        (("none.csv", "--symbol", "EURUSD", "--timeframe", "M1"), "none.csv cannot be read: No such file"),
        (("bars.csv", "--symbol", "EURUSD", "--timeframe", "H1"), "is a model of M1, and no file is"),
        (("bars.csv", "--symbol", "EURUSD", "--timeframe", "M1", "--out", "no/where"), "no/where cannot be written"),
    ],
)
async def test_what_cannot_be_done_is_said_in_one_sentence(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "bars.csv", walk(3))
    model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert await mt5("backtest", *words, "--model-dir", "model") == WRONG
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


async def test_without_a_model_folder_and_without_a_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "EURUSD_M1.csv", walk(3))
    monkeypatch.chdir(tmp_path)
    assert await mt5("backtest", "EURUSD_M1.csv", "--model-dir", "gone") == WRONG
    assert "gone/manifest.json cannot be read (No such file or directory)" in capsys.readouterr().err
    assert await mt5("backtest", "EURUSD_M1.csv", "--model", "v") == NO
    assert "Nothing is running under" in capsys.readouterr().err


async def test_a_folder_is_verified_before_it_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "EURUSD_M1.csv", walk(3))
    model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    words = ("backtest", "EURUSD_M1.csv", "--model-dir", "model")
    assert await mt5(*words) == DONE
    capsys.readouterr()
    manifest = tmp_path / "model" / MANIFEST_FILE
    signed = manifest.read_bytes()
    manifest.write_bytes(signed.replace(b"0.505", b"0.506"))
    assert await mt5(*words) == NO
    assert "manifest.sig of rf_m1" in capsys.readouterr().err
    manifest.write_bytes(signed)
    (tmp_path / "model" / "model.onnx").write_bytes(b"another graph")
    assert await mt5(*words) == NO
    assert "model.onnx of rf_m1" in capsys.readouterr().err
    (tmp_path / "keys" / "models.pub").unlink()
    assert await mt5(*words) == WRONG
    assert "The public key of models" in capsys.readouterr().err
