"""``rejects list`` and ``rejects replay`` on a real nats-server and gateway: nothing is lost, nothing piles up."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import runner
from actors.collector import Collector
from bus import logs
from bus.client import Bus
from bus.consume import park
from bus.subjects import CANDLES, REJECTS
from commands.output import DONE, NO, WRONG, CommandError
from commands.rejects import listing, replay, since
from deploy.server import free_port
from schema.messages import CandleBlock, Reject
from schema.settings import Gateway, Log, Settings, Symbol
from tests.builders import read_until, running

BASE = 1_735_776_000
OPEN = {"open": 1.1, "high": 1.2, "low": 1.0, "close": 1.15, "volume": 7}
BELOW = {"open": -2.0, "high": -1.0, "low": -3.0, "close": -2.5, "volume": 7}  # WTI in April 2020

Mt5 = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def mt5(nats_url: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mt5:
    """Runs ``mt5 rejects …`` in this process; returns the exit code and what it said on stdout and stderr."""
    monkeypatch.setenv("MT5_HOME", str(tmp_path))
    monkeypatch.setenv("MT5_NATS_URL", nats_url)
    monkeypatch.setenv("MT5_GATEWAY_PORT", str(port))

    async def run(*words: str) -> tuple[int, str, str]:
        args = runner.parser().parse_args(["rejects", *words])
        try:
            with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
                code = await (listing if words[0] == "list" else replay)(args)
        except CommandError as error:
            return error.code, "", str(error)
        finally:
            logs.configure(Log())  # a command quietens the log, and binds it to the stderr that it finds
        return code, out.getvalue(), err.getvalue()

    return run


def gateway(nats_url: str, port: int, **symbols: Symbol) -> AbstractAsyncContextManager[None]:
    return running(Collector, nats_url=nats_url, settings=Settings(gateway=Gateway(port=port), symbols=symbols))


async def post(port: int, payload: Any) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.post(f"http://127.0.0.1:{port}/ingest", json=payload) as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def kept(bus: Bus) -> list[Reject]:
    """What REJECTS holds."""
    state = (await bus.js.stream_info("REJECTS")).state
    if not state.messages:
        return []
    return await read_until(bus, REJECTS, lambda found: len(found) >= state.messages, seconds=5)


async def stored(bus: Bus, count: int) -> list[CandleBlock]:
    return await read_until(bus, CANDLES, lambda blocks: sum(len(b.rows) for b in blocks) >= count, seconds=5)


def payload(*changes: dict[str, Any], symbol: str = "WTI", **beside: Any) -> dict[str, Any]:
    rows = [{"time": BASE + 60 * i, **OPEN, **change} for i, change in enumerate(changes)]
    return {"symbol": symbol, "timeframe": "M1", **beside, "candles": rows}


async def test_list_names_what_where_when_and_why(bus: Bus, nats_url: str, port: int, mt5: Mt5) -> None:
    assert await mt5("list") == (DONE, "Nothing is rejected.\n", "")
    async with gateway(nats_url, port):
        await post(port, payload({}, BELOW, BELOW, source="Broker-A"))
        await post(port, payload({"high": 1.0}, symbol="E\u202eX"))
    await park(bus, "recorder", "features.M1.X", b"{}", {}, "PostgreSQL refused it: no")
    code, out, err = await mt5("list")
    header, *lines = out.splitlines()
    assert (code, err) == (DONE, "")
    assert header.split() == ["seq", "at", "where", "source", "symbol", "candles", "reason"]
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert "Broker-A" in lines[0]
    assert lines[0].endswith("open -2.0 is not positive (and 1 more)")
    assert "\u202e" not in out  # what turns a terminal's text around is escaped
    assert " ".join(lines[2].split()[3:]) == "recorder - - - PostgreSQL refused it: no"

    code, out, _ = await mt5("list", "--json", "--symbol", "WTI")
    (found,) = json.loads(out)["rejects"]
    assert (found["seq"], found["where"], found["source"], found["symbols"]) == (1, "candles", "Broker-A", ["WTI"])
    assert [c["candle"]["open"] for c in found["candles"]] == [-2.0, -2.0]
    assert [c["index"] for c in found["candles"]] == [1, 2]

    assert (await mt5("list", "--reason", "POSTGRES"))[1].count("\n") == 2
    assert (await mt5("list", "--limit", "1"))[1].splitlines()[1].startswith("3 ")
    assert (await mt5("list", "--since", "1h"))[1].count("\n") == 4
    assert (await mt5("list", "--since", "2999-01-01"))[1] == "Nothing that was rejected is like that.\n"


async def test_replay_once_the_cause_is_mended_and_never_twice(bus: Bus, nats_url: str, port: int, mt5: Mt5) -> None:
    now = BASE + 600
    beside = {"source": "Broker-A", "server_time": now + 7_200, "gmt_time": now, "history": True}
    async with gateway(nats_url, port):
        answer = await post(port, payload({}, BELOW, BELOW, **beside))
        assert (answer["accepted"], len(answer["rejected"])) == (1, 2)
    async with gateway(nats_url, port, WTI=Symbol(allow_non_positive=True)):
        code, out, err = await mt5("replay", "--reason", "not positive")
        assert (code, err) == (DONE, "")
        assert out == (
            "2 candles of 1 messages posted again: 2 accepted, 0 known before, 0 forming, 0 rejected again\n"
        )
        assert await kept(bus) == []
        first, *again = await stored(bus, 3)
        assert [row.low for block in again for row in block.rows] == [-3.0, -3.0]
        for block in again:  # with all that their payload said
            assert (block.source, block.server_time, block.history) == ("Broker-A", now + 7_200, True)
            assert (block.ts_source, block.rows[0].ts - first.rows[0].ts < timedelta(minutes=3)) == (
                first.ts_source,
                True,
            )
        code, out, err = await mt5("replay", "--reason", "not positive")
        assert (code, out) == (NO, "")
        assert err == "mt5: nothing that was rejected is like that: `mt5 rejects list` shows what there is.\n"
    assert (await bus.js.stream_info("CANDLES")).state.messages == 3


async def test_what_is_rejected_again_is_kept_once(bus: Bus, nats_url: str, port: int, mt5: Mt5) -> None:
    async with gateway(nats_url, port):
        await post(port, payload({}, BELOW, BELOW, source="Broker-A"))
        for _ in range(3):
            code, out, err = await mt5("replay", "--symbol", "WTI", "--json")
            assert code == NO
            assert json.loads(out) == {
                "messages": 1, "candles": 2, "accepted": 0, "duplicates": 0, "forming": 0, "rejected": 2, "parked": 0
            }  # fmt: skip
            assert "rejected again, 2 of its candles: open -2.0 is not positive.\n" in err
            (left,) = await kept(bus)
            assert (left.source, left.payload["symbol"]) == ("Broker-A", "WTI")
            assert [c["candle"]["open"] for c in left.payload["candles"]] == [-2.0, -2.0]


async def test_a_part_of_a_message_leaves_the_rest(bus: Bus, nats_url: str, port: int, mt5: Mt5) -> None:
    async with gateway(nats_url, port):
        await post(port, payload({}, BELOW, {"volume": -1}, BELOW, {"timeframe": "M7"}))
    async with gateway(nats_url, port, WTI=Symbol(allow_non_positive=True)):
        assert (await mt5("replay", "--reason", "positive"))[0] == DONE
        (left,) = await kept(bus)
        assert [c["index"] for c in left.payload["candles"]] == [2, 4]
        assert left.reason == "2 candles: volume is negative, ..."
        # Of three, one is taken and two are rejected again: exactly these stay.
        await post(port, payload({}, {"volume": -1}, {"low": 9.0}, symbol="OIL"))
        assert (await mt5("replay", "--since", "1h"))[0] == NO
        reasons = sorted(c["error"] for m in await kept(bus) for c in m.payload["candles"])
        assert reasons == [
            "low 9.0 is above open or close",
            "timeframe 'M7' is unknown: use one of M1, M2, M3, M4, M5, M6, M10, M12, M15, M20, M30, "
            "H1, H2, H3, H4, H6, H8, H12, D1, W1, MN1",
            "volume is negative",
            "volume is negative",
        ]


async def test_replay_by_number_and_what_is_no_payload(bus: Bus, nats_url: str, port: int, mt5: Mt5) -> None:
    async with gateway(nats_url, port):
        for symbol in ("A", "B", "C"):
            await post(port, payload(BELOW, symbol=symbol))
    await park(bus, "recorder", "features.M1.X", b"{}", {}, "PostgreSQL refused it: no")
    async with gateway(nats_url, port, A=Symbol(allow_non_positive=True), C=Symbol(allow_non_positive=True)):
        code, out, err = await mt5("replay", "--seq", "1", "--seq", "3", "--seq", "4")
        assert (code, out.split(":")[0]) == (NO, "2 candles of 2 messages posted again")
        assert err == (
            "mt5: 4, parked by recorder, stays: it is no message of features (Object missing required field `symbol`).\n"
        )
    assert [m.payload.get("symbol") for m in await kept(bus)] == ["B", None]


async def test_wrong_words_and_no_gateway_are_one_sentence(bus: Bus, nats_url: str, port: int, mt5: Mt5) -> None:
    assert await mt5("replay") == (
        WRONG, "", "Say what to replay: --seq N, --reason TEXT, --symbol S or --since WHEN."
    )  # fmt: skip
    code, _, said = await mt5("list", "--since", "yesterday")
    assert (code, said) == (
        WRONG,
        '"yesterday" is no moment: --since takes 2025-02-13T01:33:00Z, or an age such as 6h or 7d.',
    )
    async with gateway(nats_url, port):
        await post(port, payload(BELOW))
    code, _, said = await mt5("replay", "--seq", "1")
    assert code == NO
    assert said.startswith(f"No gateway answers at http://127.0.0.1:{port} (")
    assert len(await kept(bus)) == 1


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", datetime(2025, 2, 3, 11, 58, 30, tzinfo=UTC)),
        ("7d", datetime(2025, 1, 27, 12, tzinfo=UTC)),
        ("2025-02-01", datetime(2025, 2, 1, tzinfo=UTC)),
        ("2025-02-01T02:00:00+02:00", datetime(2025, 2, 1, tzinfo=UTC)),
        (None, None),
    ],
)
def test_since(text: str | None, moment: datetime | None) -> None:
    assert since(text, datetime(2025, 2, 3, 12, tzinfo=UTC)) == moment
