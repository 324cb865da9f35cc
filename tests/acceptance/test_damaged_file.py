"""A file as it was found, 321 of its rows a thousandfold: what is wrong is rejected, and the repaired file completes it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest

from actors.collector import Collector
from actors.core.files import decode_lines, read_bars
from actors.emitter import Emitter
from actors.features import Features
from actors.recorder import Recorder
from actors.terminal import Said, encode
from bus import topology
from bus.client import Bus
from bus.subjects import REJECTS
from deploy.embedded import PostgresServer
from deploy.server import free_port
from schema.messages import Candle, IngestAnswer, Reject
from schema.settings import Gateway, Settings
from tests.archive import Archive, bits, pass_through, read_archive
from tests.builders import read_until, running
from tests.servers import OPERATOR, cloned_database, nats_server

BLOCK = 1_000
pytestmark = pytest.mark.slow


def bars(file: Path) -> list[Candle]:
    with file.open("rb") as stream:
        return [bar for chunk in read_bars(decode_lines(stream)) for bar in chunk]


@dataclass(frozen=True)
class System:
    """A running system of its own."""

    url: str
    bus: Bus
    connection: Any

    async def load(self, rows: Sequence[Candle], said: Said) -> list[tuple[datetime, str]]:
        """Posts a file's bars in blocks; returns what was rejected, by open time."""
        rejected: list[tuple[datetime, str]] = []
        async with aiohttp.ClientSession() as http:
            for start in range(0, len(rows), BLOCK):
                part = rows[start : start + BLOCK]
                body = encode("EURUSD", "M1", part, said)
                async with http.post(self.url, data=body, headers={"Content-Type": "application/json"}) as response:
                    assert response.status == 200
                    answer = msgspec.json.decode(await response.read(), type=IngestAnswer)
                assert answer.accepted + answer.duplicates + len(answer.rejected) == len(part)
                rejected += [(part[r.index].ts, r.error) for r in answer.rejected]
        return rejected

    async def archive(self, number: int) -> Archive:
        """What the archive holds once everything has arrived; ``number`` counts these waits."""
        await pass_through(self.url, self.connection, number)
        return await read_archive(self.connection)


@asynccontextmanager
async def system(folder: Path, postgres: str, template: str) -> AsyncIterator[System]:
    port = free_port()
    settings = Settings(gateway=Gateway(port=port))
    with nats_server(Path(tempfile.mkdtemp(prefix="damaged-", dir=folder))) as server:
        url = server.url(OPERATOR)
        async with cloned_database(postgres, template) as database:
            bus = await Bus.connect(url, name="operator")
            connection = await asyncpg.connect(database)
            try:
                await topology.apply(bus, settings.streams)
                actors = (Collector, Features, Emitter, Recorder)
                async with running(*actors, nats_url=url, database_url=database, settings=settings):
                    yield System(f"http://127.0.0.1:{port}/ingest", bus, connection)
            finally:
                await connection.close()
                await bus.close()


def market(rows: Iterable[Candle]) -> dict[Any, Any]:
    return {
        ("EURUSD", "M1", r.ts): [tuple(map(bits, (r.open, r.high, r.low, r.close, r.volume, r.spread, r.real_volume)))]
        for r in rows
    }


async def test_exactly_the_damaged_rows_are_rejected_and_the_repaired_file_completes_the_series(
    data: Path, server_folder: Path, postgres: PostgresServer, pg_template: str
) -> None:
    said = Said(history=True)
    raw, repaired = bars(data / "EURUSD_M1_202502_raw.csv"), bars(data / "EURUSD_M1_202502.csv")
    damaged = {found.ts for found, right in zip(raw, repaired, strict=True) if found != right}
    assert len(damaged) == 321

    async with system(server_folder, postgres.url, pg_template) as first:
        await first.load(repaired, said)
        clean = await first.archive(0)
    assert clean["market_data"] == market(repaired)

    async with system(server_folder, postgres.url, pg_template) as second:
        rejected = await second.load(raw, said)
        assert sorted(ts for ts, _ in rejected) == sorted(damaged)
        kinds = Counter("jump" if error.startswith("price jumps from ") else "high or low" for _, error in rejected)
        assert kinds == {"high or low": 219, "jump": 102}
        assert all(
            " is below open or close" in e or " is above open or close" in e for _, e in rejected if "jump" not in e
        )
        assert (await second.archive(0))["market_data"] == market(r for r in raw if r.ts not in damaged)

        def whole(found: Sequence[Reject]) -> bool:
            return sum(len(reject.payload["candles"]) for reject in found) == len(damaged)

        kept = [c for reject in await read_until(second.bus, REJECTS, whole) for c in reject.payload["candles"]]
        by_time = {int(row.ts.timestamp()): row for row in raw}
        for one in kept:  # whole, as they were found
            row = by_time[one["candle"]["time"]]
            assert row.ts in damaged
            assert [one["candle"][n] for n in ("open", "high", "low", "close")] == [
                row.open,
                row.high,
                row.low,
                row.close,
            ]

        assert await second.load(repaired, said) == []
        found = await second.archive(1)
    for table in clean:
        assert found[table] == clean[table], table
