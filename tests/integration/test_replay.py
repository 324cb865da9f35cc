"""``replay`` against a real HTTP server: what it sends, what it says, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from commands.output import DONE, NO, WRONG, CommandError
from commands.replay import replay
from tests.recording_gateway import Gateway, bars, free_port, serving, taken


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    one = Gateway()
    async with serving(one.ingest) as one.url:
        yield one


@pytest.fixture
def export(tmp_path: Path) -> Path:
    file = tmp_path / "EURUSD.csv"
    rows = [f"{int(b.ts.timestamp())},{b.open},{b.high},{b.low},{b.close},{b.volume}\n" for b in bars(1_500)]
    file.write_text("timestamp,open,high,low,close,volume\n" + "".join(rows))
    return file


async def test_replay_posts_the_file_and_sums_up(
    gateway: Gateway, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await replay(export, symbol="EURUSD", timeframe="1m", url=gateway.url, api_key="k") == DONE
    out, err = capsys.readouterr()
    assert out.startswith("EURUSD M1: 1,500 bars in ")
    assert out.endswith("1,500 accepted, 0 known before, 0 rejected\n")
    assert out.count("\n") == 1
    assert err == ""  # no progress bar where stderr is no terminal
    assert [len(p["candles"]) for p in gateway.payloads] == [1_000, 500]
    assert {h["X-API-Key"] for h in gateway.headers} == {"k"}


async def test_replay_for_machines(gateway: Gateway, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answer = lambda n, body: taken(body, accepted=0, duplicates=len(body["candles"]))
    assert await replay(export, symbol="EURUSD", timeframe="M1", url=gateway.url, as_json=True) == DONE
    found = json.loads(capsys.readouterr().out)
    assert found.pop("seconds") >= 0
    assert found == {
        "file": str(export),
        "symbol": "EURUSD",
        "timeframe": "M1",
        "received": 1_500,
        "accepted": 0,
        "duplicates": 1_500,
        "forming": 0,
        "rejected": 0,
        "reason": None,
    }


async def test_replay_of_which_nothing_was_taken_is_a_no(
    gateway: Gateway, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(n: int, body: dict[str, Any]) -> web.Response:
        rejected = [{"index": i, "error": "off the grid of H1"} for i in range(len(body["candles"]))]
        counts = {"received": len(rejected), "accepted": 0, "duplicates": 0, "forming": 0, "rejected": rejected}
        return web.json_response(counts, status=422)

    gateway.answer = answer
    assert await replay(export, symbol="EURUSD", timeframe="H1", url=gateway.url) == NO
    assert "1,500 rejected (the first: off the grid of H1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"timeframe": "M7"}, '"M7" is no timeframe'),
        ({"symbol": " "}, "--symbol is empty"),
        ({"speed": -1.0}, "--speed"),
        ({"speed": float("nan")}, "--speed"),
        ({"file": Path("no/such/file.csv")}, "cannot be read: No such file"),
        ({"file": Path(__file__).parent}, "cannot be read: Is a directory"),
        ({"file": Path(__file__)}, "line 1: "),
    ],
)
async def test_replay_used_wrongly_sends_nothing(
    gateway: Gateway, export: Path, change: dict[str, Any], says: str
) -> None:
    right: dict[str, Any] = {"file": export, "symbol": "EURUSD", "timeframe": "M1", "url": gateway.url}
    arguments = right | change
    with pytest.raises(CommandError) as caught:
        await replay(arguments.pop("file"), **arguments)
    assert caught.value.code == WRONG
    assert says in str(caught.value)
    assert gateway.bodies == []


async def test_a_bad_last_line_is_found_before_anything_is_sent(gateway: Gateway, export: Path) -> None:
    with export.open("a") as file:
        file.write("1748905200,1,2\n")
    with pytest.raises(CommandError, match="line 1502: '1748905200,1,2' has fewer columns"):
        await replay(export, symbol="EURUSD", timeframe="M1", url=gateway.url)
    assert gateway.bodies == []


async def test_replay_says_who_refused_it(gateway: Gateway, export: Path) -> None:
    gateway.answer = lambda n, body: web.json_response({"error": "A valid API key is needed."}, status=401)
    with pytest.raises(CommandError, match="A valid API key is needed") as caught:
        await replay(export, symbol="EURUSD", timeframe="M1", url=gateway.url)
    assert caught.value.code == WRONG
    with free_port() as port, pytest.raises(CommandError, match="start it with `mt5 up`") as caught:
        await replay(export, symbol="EURUSD", timeframe="M1", url=f"http://127.0.0.1:{port}")
    assert caught.value.code == NO


async def test_replay_cut_off_in_the_middle_says_how_to_go_on(gateway: Gateway, export: Path) -> None:
    gateway.answer = lambda n, body: (
        taken(body) if n == 0 else web.Response(status=503, headers={"Retry-After": "3600"})
    )
    with pytest.raises(CommandError, match=r"1000 of 1500 bars were taken; run the same again"):
        await replay(export, symbol="EURUSD", timeframe="M1", url=gateway.url)
