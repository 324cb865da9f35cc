"""The reading routes over memory and a real archive, and what they answer while the archive is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from actors.core.batching import reduce_features, reduce_signals
from actors.gateway.answers import Check
from bus import telemetry
from bus.store import Store
from schema.messages import FeatureBlock, FeatureRow, Signal
from schema.settings import Gateway
from tests.gateway import MINUTE, T0, Served, served, signal


@pytest.fixture
async def store(pg_url: str) -> AsyncIterator[Store]:
    made = await Store.connect(pg_url, size=2, name="test")
    yield made
    await made.close()


@pytest.fixture
async def nowhere() -> AsyncIterator[Store]:
    """An archive at a port where nobody listens."""
    made = await Store.connect("postgresql://mt5:secret@127.0.0.1:1/mt5", size=1, name="test")
    yield made
    await made.close()


@pytest.fixture
async def frozen() -> AsyncIterator[Store]:
    """An archive that takes connections and never answers."""
    hung: list[asyncio.StreamWriter] = []

    async def swallow(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hung.append(writer)

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made = await Store.connect(f"postgresql://mt5:secret@127.0.0.1:{port}/mt5", size=1, name="test")
    yield made
    made.pool.terminate()
    server.close()
    for writer in hung:
        writer.close()


def rows(count: int) -> tuple[FeatureRow, ...]:
    return tuple(
        FeatureRow(
            ts=T0 + bar * MINUTE,
            open=1.1,
            high=1.2,
            low=1.0,
            close=1.1 + bar / 1e5,
            volume=10.0 + bar,
            spread=2.0,
            rsi=50 + bar / 7,
            bar=bar + 1,
            ready=bar > 2,
        )
        for bar in range(count)
    )


async def archive_rows(store: Store, count: int, symbol: str = "EURUSD") -> tuple[FeatureRow, ...]:
    made = rows(count)
    block = FeatureBlock(symbol=symbol, timeframe="M1", candles_seq=1, rows=made, received_at=T0)
    await execute(store, reduce_features([block]))
    return made


async def execute(store: Store, batch: Any) -> None:
    async with store.transaction() as connection:
        for statement in batch.statements:
            await connection.execute(store.sql(statement.query), *statement.columns)


async def archive_signals(store: Store, signals: Sequence[Signal]) -> None:
    await execute(store, reduce_signals(signals))


async def get(running: Served, path: str, **query: Any) -> tuple[int, Any, Mapping[str, str]]:
    async with running.client.get(path, params=query) as response:
        return response.status, await response.json(), response.headers


def ids(answer: Any) -> list[str]:
    return [item["id"] for item in answer["signals"]]


# --- signals -----------------------------------------------------------------------------------------------------


async def test_memory_and_archive_make_one_list_newest_first(store: Store) -> None:
    await archive_signals(store, [signal(bar) for bar in range(30)])
    async with served(store=store, capacity=10) as running:
        for bar in range(25, 40):  # the archive has not caught up, and memory no longer holds its oldest
            running.broadcaster.publish(bar + 1, signal(bar))
        status, body, headers = await get(running, "/signals", timeframe="M1", limit=1000)
        assert status == 200
        assert ids(body) == [signal(bar).id for bar in reversed(range(40))]
        assert headers["X-Archive"] == "ok"
        _, body, _ = await get(running, "/signals", timeframe="M1", limit=3)
        assert ids(body) == [signal(bar).id for bar in (39, 38, 37)]


async def test_one_signal_has_the_same_text_from_memory_and_archive(store: Store) -> None:
    item = signal(1, prob_up=0.1 + 0.2, threshold=None, supersedes="other")
    await archive_signals(store, [item])
    async with served(store=store) as from_archive, served() as from_memory:
        from_memory.broadcaster.publish(1, item)
        _, archived, _ = await get(from_archive, "/signals", timeframe="M1")
        _, remembered, _ = await get(from_memory, "/signals", timeframe="M1")
    assert archived == remembered
    assert list(archived["signals"][0])[:4] == ["id", "ts", "symbol", "timeframe"]
    assert archived["signals"][0]["prob_up"] == 0.1 + 0.2


async def test_signals_are_filtered_in_memory_as_in_the_archive(store: Store) -> None:
    old = [signal(bar, symbol=symbol) for bar in range(4) for symbol in ("EURUSD", "GBPUSD!")]
    new = [signal(bar, symbol=symbol) for bar in range(4, 8) for symbol in ("EURUSD", "GBPUSD!")]
    await archive_signals(store, [*old, signal(5, timeframe="M5")])
    async with served(store=store) as running:
        for seq, item in enumerate(new, start=1):
            running.broadcaster.publish(seq, item)
        since = (T0 + 3 * MINUTE).isoformat()
        _, body, _ = await get(running, "/signals", timeframe="M1", symbol="GBPUSD!", since=since)
        assert ids(body) == [f"GBPUSD!-M1-{bar}" for bar in (7, 6, 5, 4, 3)]
        _, body, _ = await get(running, "/signals", timeframe="5m")
        assert ids(body) == ["EURUSD-M5-5"]
        _, body, _ = await get(running, "/signals", timeframe="H1")
        assert body == {"signals": []}


@pytest.mark.parametrize("kind", ["nowhere", "frozen", "none"])
async def test_without_the_archive_signals_come_from_memory_and_say_so(
    kind: str, nowhere: Store, frozen: Store
) -> None:
    archives = {"nowhere": nowhere, "frozen": frozen, "none": None}
    async with served(store=archives[kind]) as running:
        running.broadcaster.publish(1, signal(1))
        started = time.monotonic()
        status, body, headers = await get(running, "/signals", timeframe="M1")
        assert (status, ids(body), headers["X-Archive"]) == (200, [signal(1).id], "unavailable")
        assert time.monotonic() - started < 2.0


# --- candles and features ----------------------------------------------------------------------------------------


async def test_candles_and_features_are_the_archives_oldest_first(store: Store) -> None:
    made = await archive_rows(store, 20, symbol="EURUSD.m")
    async with served(store=store) as running:
        series = {"symbol": "EURUSD.m", "timeframe": "M1"}
        status, body, _ = await get(running, "/candles", **series)
        assert status == 200
        assert {"symbol": body["symbol"], "timeframe": body["timeframe"]} == series
        assert [candle["close"] for candle in body["candles"]] == [row.close for row in made]
        first = {"ts": "2025-02-03T09:30:00Z", "open": 1.1, "high": 1.2, "low": 1.0, "close": 1.1, "volume": 10.0}
        assert first.items() <= body["candles"][0].items()
        _, body, _ = await get(running, "/features", **series)
        assert [row["rsi"] for row in body["features"]] == [row.rsi for row in made]
        assert body["features"][5]["bar"] == 6


def spelled(moment: datetime) -> list[str]:
    athens = moment + timedelta(hours=2)
    return [
        moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        moment.strftime("%Y-%m-%dT%H:%M:%S"),
        athens.strftime("%Y-%m-%dT%H:%M:%S+02:00"),
        athens.strftime("%Y-%m-%dT%H:%M:%S 02:00"),  # what is left of a plus that was not encoded
        str(int(moment.timestamp())),
        str(int(moment.timestamp() * 1000)),
    ]


@pytest.mark.parametrize("spelling", range(6))
async def test_spans_hold_both_ends_however_a_time_is_spelled(store: Store, spelling: int) -> None:
    made = await archive_rows(store, 20)
    start, end = spelled(made[5].ts)[spelling], spelled(made[9].ts)[spelling]
    async with served(store=store) as running:

        async def bars(**query: Any) -> list[int]:
            _, body, _ = await get(running, "/features", symbol="EURUSD", timeframe="M1", **query)
            return [row["bar"] - 1 for row in body["features"]]

        assert await bars(**{"from": start, "to": end}) == [5, 6, 7, 8, 9]
        assert await bars(**{"from": start, "limit": 2}) == [5, 6]
        assert await bars(to=end, limit=2) == [8, 9]
        assert await bars(limit=3) == [17, 18, 19]


@pytest.mark.parametrize("path", ["/candles", "/features"])
@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"timeframe": "M1"}, "symbol is missing: add ?symbol=… to the address."),
        ({"symbol": "EURUSD"}, "timeframe is missing: add ?timeframe=… to the address."),
        ({"symbol": "EURUSD", "timeframe": "M7"}, '"M7" is no timeframe: MT5 knows M1, M2,'),
        ({"symbol": "EUR\0USD", "timeframe": "M1"}, "symbol must be 1 to 128 printable characters."),
        ({"symbol": "E" * 129, "timeframe": "M1"}, "symbol must be 1 to 128 printable characters."),
        ({"limit": "0"}, "limit must be a whole number from 1 to 10,000."),
        ({"limit": "10001"}, "limit must be a whole number from 1 to 10,000."),
        ({"limit": "-5"}, "limit must be a whole number from 1 to 10,000."),
        ({"limit": "1e3"}, "limit must be a whole number from 1 to 10,000."),
        ({"limit": "٣"}, "limit must be a whole number from 1 to 10,000."),
        ({"from": "yesterday"}, "from must be a time such as 2025-02-03T09:30:00Z"),
        ({"to": "2025-13-01"}, "to must be a time such as"),
        ({"to": "9" * 18}, "to must be a time such as"),
        ({"from": "0001-01-01T00:00:00+14:00"}, "from must be a time such as"),
        ({"from": "NaN"}, "from must be a time such as"),
        ({"from": "2025-02-03", "to": "2025-02-02"}, "from is after to: swap them."),
        ({"offset": "5"}, '"offset" is no parameter here: symbol, timeframe, from, to, limit are.'),
    ],
)
async def test_badly_written_parameters(path: str, query: dict[str, str], sentence: str) -> None:
    whole = query if "symbol" in query or "timeframe" in query else {"symbol": "EURUSD", "timeframe": "M1", **query}
    async with served() as running:
        status, body, _ = await get(running, path, **whole)
        assert status == 400
        assert body["error"].startswith(sentence)


async def test_a_parameter_given_twice_is_refused() -> None:
    async with served() as running:
        status, body, _ = await get(running, "/signals?timeframe=M1&timeframe=M5")
        assert (status, body) == (400, {"error": "timeframe stands there twice: give it once."})


async def test_signals_need_a_timeframe() -> None:
    async with served() as running:
        status, body, _ = await get(running, "/signals")
        assert (status, body) == (400, {"error": "timeframe is missing: add ?timeframe=… to the address."})


async def test_the_oldest_time_there_is_reaches_the_archive(store: Store) -> None:
    await archive_rows(store, 3)
    async with served(store=store) as running:
        query = {"symbol": "EURUSD", "timeframe": "M1", "from": "0001-01-01", "to": "9999-12-31T23:59:59Z"}
        status, body, _ = await get(running, "/candles", **query)
        assert (status, len(body["candles"])) == (200, 3)


@pytest.mark.parametrize(
    "path", ["/candles?symbol=EURUSD&timeframe=M1", "/features?symbol=EURUSD&timeframe=M1", "/models", "/models/rf_m1"]
)
async def test_without_the_archive_its_reads_say_when_to_ask_again(path: str, nowhere: Store) -> None:
    async with served(store=nowhere) as running:
        status, body, headers = await get(running, path)
        assert (status, body) == (503, {"error": "The archive is not reachable: ask again in a moment."})
        assert headers["Retry-After"] == "2"


# --- models ------------------------------------------------------------------------------------------------------


async def test_models(store: Store) -> None:
    manifest = {"metrics": {"auc": 0.52}, "files": {"model.onnx": "ab"}}
    text = msgspec.json.encode(manifest).decode()
    for version, state in (("20250101", "retired"), ("20250201", "provisional"), ("20250301", "refused")):
        made = datetime(2025, 3, 1, tzinfo=UTC)
        await store.execute("upsert_model", "rf_m1", version, "M1", state, made, text)
    async with served(store=store) as running:
        status, body, _ = await get(running, "/models")
        assert status == 200
        assert [(m["model_name"], m["version"], m["state"]) for m in body["models"]] == [
            ("rf_m1", "20250301", "refused"),
            ("rf_m1", "20250201", "provisional"),
            ("rf_m1", "20250101", "retired"),
        ]
        assert "manifest" not in body["models"][0]
        status, body, _ = await get(running, "/models/rf_m1", limit=2)
        assert (status, body["serving"], len(body["versions"])) == (200, "20250201", 2)
        assert body["versions"][1]["manifest"] == manifest
        status, body, _ = await get(running, "/models/rf_h1")
        assert (status, body) == (404, {"error": 'There is no model "rf_h1": GET /models lists them.'})


# --- health and metrics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bus", "archived", "status", "overall"),
    [
        ("ok", True, 200, "ok"),
        ("degraded", True, 200, "degraded"),
        ("ok", False, 200, "degraded"),
        ("down", True, 503, "down"),
        ("down", False, 503, "down"),
    ],
)
async def test_health_is_the_worst_of_its_checks(
    store: Store, nowhere: Store, bus: Any, archived: bool, status: int, overall: str
) -> None:
    async def checks() -> dict[str, Check]:
        return {"bus": Check(status=bus, detail="As the test says.")}

    async with served(store=store if archived else nowhere, checks=checks) as running:
        answered, body, _ = await get(running, "/health")
        assert (answered, body["status"]) == (status, overall)
        assert body["checks"]["bus"] == {"status": bus, "detail": "As the test says."}
        assert body["checks"]["archive"]["status"] == ("ok" if archived else "degraded")
        assert "secret" not in str(body)


async def test_health_does_not_wait_for_a_frozen_archive(frozen: Store) -> None:
    async with served(store=frozen) as running:
        started = time.monotonic()
        _, body, _ = await get(running, "/health")
        assert body["checks"]["archive"]["detail"] == "The archive did not answer within 1 s."
        assert time.monotonic() - started < 2.0


async def test_probes() -> None:
    ready = False
    async with served(ready=lambda: ready) as running:
        assert (await get(running, "/live"))[:2] == (200, {"status": "ok"})
        status, body, headers = await get(running, "/ready")
        assert (status, body, headers["Retry-After"]) == (503, {"status": "starting"}, "1")
        ready = True
        assert (await get(running, "/ready"))[:2] == (200, {"status": "ok"})
        async with running.client.head("/live") as response:
            assert response.status == 200


@pytest.mark.parametrize("path", ["/metrics", "/prometheus"])
@pytest.mark.parametrize(
    "accept", ["*/*", "application/openmetrics-text;version=1.0.0", "text/plain;version=0.0.4", "x"]
)
async def test_metrics_are_prometheus_text(path: str, accept: str) -> None:
    telemetry.archive_up.set(1)
    async with served() as running, running.client.get(path, headers={"Accept": accept}) as response:
        assert response.status == 200
        assert response.content_type == "text/plain"
        assert "# TYPE mt5_archive_up gauge" in await response.text()


# --- pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html"),
        ("/docs", "text/html"),
        ("/web/app.js", "text/javascript"),
        ("/web/style.css", "text/css"),
        ("/web/icon.svg", "image/svg+xml"),
    ],
)
async def test_pages_come_from_here_alone_and_are_asked_for_again(path: str, content_type: str) -> None:
    async with served(settings=Gateway()) as running:
        async with running.client.get(path) as response:
            assert (response.status, response.content_type) == (200, content_type)
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Cache-Control"] == "no-cache"
            text = await response.text()
            tag = response.headers["ETag"]
        assert "//" not in text.replace("http://www.w3.org/2000/svg", "").replace("// ", ""), "nothing from elsewhere"
        assert "style=" not in text
        assert "onclick=" not in text
        for known in (tag, f'"other", {tag}', f"W/{tag}", "*"):
            async with running.client.get(path, headers={"If-None-Match": known}) as response:
                assert (response.status, await response.read()) == (304, b"")
        async with running.client.get(path, headers={"If-None-Match": '"other"'}) as response:
            assert response.status == 200


async def test_no_path_leads_out_of_the_folder() -> None:
    async with served() as running:
        for path in (
            "/web/../__init__.py",
            "/web/%2e%2e/__init__.py",
            "/web/..%2f__init__.py",
            "/web/",
            "/web/nope.js",
        ):
            async with running.client.get(path) as response:
                assert response.status == 404
