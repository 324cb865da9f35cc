"""W3C trace context in headers: one trace from the POST through every stream to the signal."""

from __future__ import annotations

import aiohttp

from actors.collector import Collector
from actors.emitter import Emitter
from actors.features import Features
from bus.client import Bus
from bus.subjects import CANDLES, FEATURES, SIGNALS, Channel
from deploy.server import free_port
from schema.messages import Message
from schema.settings import Gateway, Settings
from tests.builders import read_until, running

TRACE = "0af7651916cd43dd8448eb211c80319c"
CANDLE = {"time": 1_735_776_000, "symbol": "EURUSD", "timeframe": "M1"} | dict.fromkeys(
    ("open", "high", "low", "close"), 1.1
)


async def traceparent(bus: Bus, channel: Channel[Message]) -> tuple[str, str]:
    """The trace and the span of the channel's newest message."""
    raw = await bus.js.get_last_msg(str(channel.stream), channel.wildcard)
    version, trace, span, flags = (raw.headers or {})["traceparent"].split("-")
    assert (version, flags) == ("00", "01")
    return trace, span


async def test_a_posts_traceparent_reaches_the_signal(bus: Bus, nats_url: str) -> None:
    port = free_port()
    settings = Settings(gateway=Gateway(port=port))
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    async with running(Collector, Features, Emitter, nats_url=nats_url, settings=settings):
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"http://127.0.0.1:{port}/ingest", json=[CANDLE | {"volume": 1}], headers=headers) as answer,
        ):
            assert answer.status == 200
        await read_until(bus, SIGNALS, bool)
        told = [await traceparent(bus, channel) for channel in (CANDLES, FEATURES, SIGNALS)]  # type: ignore[list-item]
    assert {trace for trace, _ in told} == {TRACE}
    assert len({span for _, span in told} | {"b7ad6b7169203331"}) == 4, "each hop is a span of its own"
