"""The feature calculator on a real nats-server: restarts, lost tails, repeats, late and revised bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import msgspec
import pytest

from actors.core.series import Change, SeriesState, append
from actors.features import CURSOR_KEY, Features
from bus.client import Bus
from bus.subjects import CANDLES, FEATURE_STATE, FEATURES
from deploy.embedded import NatsServer
from schema.messages import Candle, CandleBlock, FeatureBlock, FeatureRow
from schema.settings import Features as FeatureSettings
from schema.settings import Settings
from tests.builders import LIVE, final_rows, put, read_until, running, walk

QUICK = Settings(features=FeatureSettings(snapshot_seconds=0.05))


def undisturbed(rows: list[Candle]) -> list[FeatureRow]:
    """The pure core over the whole series at once."""
    change = append(SeriesState("EURUSD", "M1"), rows, LIVE)
    return plain(change.rows)


def plain(rows: Iterable[FeatureRow]) -> list[FeatureRow]:
    """Rows without what tells of their bars' past."""
    return [
        msgspec.structs.replace(
            r,
            revision=0,
            replaces=None,
            replaces_seq=None,
            source=None,
            ts_source="utc",
            live=True,
            brought_seq=None,
            server_time=None,
            heard_at=None,
        )
        for r in rows
    ]


def reached(seq: int):  # type: ignore[no-untyped-def]
    return lambda blocks: bool(blocks) and blocks[-1].candles_seq >= seq and blocks[-1].part == blocks[-1].parts


async def test_blocks_and_single_candles_give_the_rows_of_the_whole_series(bus: Bus, nats_url: str) -> None:
    rows = walk(1_700, gaps=0.02)
    async with running(Features, nats_url=nats_url):
        await put(bus, rows[:1_400], size=333)
        last = await put(bus, rows[1_400:], size=1)
        blocks = await read_until(bus, FEATURES, reached(last))
    assert plain(final_rows(blocks).values()) == undisturbed(rows)
    assert all(isinstance(b, FeatureBlock) and b.candles_seq for b in blocks)


async def test_a_restart_resumes_from_its_snapshot_and_doubles_nothing(bus: Bus, nats_url: str) -> None:
    rows = walk(900)
    async with running(Features, nats_url=nats_url, settings=QUICK):
        last = await put(bus, rows[:500], size=7)
        await read_until(bus, FEATURES, reached(last))
    kv = await bus.js.key_value(FEATURE_STATE)
    assert msgspec.json.decode((await kv.get(CURSOR_KEY)).value or b"")["seq"] == last
    last = await put(bus, rows[500:700], size=1)  # while nobody runs
    async with running(Features, nats_url=nats_url, settings=QUICK):
        last = await put(bus, rows[700:], size=50)
        blocks = await read_until(bus, FEATURES, reached(last))
    sequences = [b.candles_seq for b in blocks]
    assert sequences == list(range(1, last + 1))
    assert plain(final_rows(blocks).values()) == undisturbed(rows)


@pytest.mark.parametrize("keep", [0, 3])
async def test_a_lost_tail_is_made_whole_with_the_same_bits(bus: Bus, nats_url: str, keep: int) -> None:
    rows = walk(400)
    async with running(Features, nats_url=nats_url, settings=QUICK):
        last = await put(bus, rows, size=40)
        before = await read_until(bus, FEATURES, reached(last))
    for seq in range(keep + 1, len(before) + 1):
        await bus.js.delete_msg("FEATURES", seq)
    async with running(Features, nats_url=nats_url, settings=QUICK):
        blocks = await read_until(bus, FEATURES, reached(last))
    assert plain(final_rows(blocks).values()) == plain(final_rows(before).values()) == undisturbed(rows)


async def test_a_missing_or_too_new_snapshot_means_a_rebuild(bus: Bus, nats_url: str) -> None:
    rows = walk(300)
    async with running(Features, nats_url=nats_url, settings=QUICK):
        last = await put(bus, rows[:200], size=20)
        await read_until(bus, FEATURES, reached(last))
    kv = await bus.js.key_value(FEATURE_STATE)
    await kv.delete("M1.EURUSD")
    async with running(Features, nats_url=nats_url, settings=QUICK):
        last = await put(bus, rows[200:250], size=1)
        blocks = await read_until(bus, FEATURES, reached(last))
    assert plain(final_rows(blocks).values()) == undisturbed(rows[:250])
    state = msgspec.json.decode((await kv.get("M1.EURUSD")).value or b"", type=SeriesState)
    state.seq = 10_000
    await kv.put("M1.EURUSD", msgspec.json.encode(state))
    async with running(Features, nats_url=nats_url, settings=QUICK):
        last = await put(bus, rows[250:], size=1)
        blocks = await read_until(bus, FEATURES, reached(last))
    assert plain(final_rows(blocks).values()) == undisturbed(rows)


async def test_repeats_of_old_bars_change_nothing(bus: Bus, nats_url: str) -> None:
    rows = walk(600)
    async with running(Features, nats_url=nats_url, settings=QUICK):
        await put(bus, rows, size=100)
        repeated = await put(bus, rows, size=170, history=True)
        last = await put(bus, walk(601)[600:], size=1)
        blocks = await read_until(bus, FEATURES, reached(last))
    assert [b.candles_seq for b in blocks] == [1, 2, 3, 4, 5, 6, last]
    assert repeated == last - 1
    # Repeats owe nothing: the next start must not take their silence for a lost tail.
    async with running(Features, nats_url=nats_url, settings=QUICK):
        await put(bus, rows[:10], size=10)
        after = await put(bus, walk(602)[601:], size=1)
        blocks = await read_until(bus, FEATURES, reached(after))
    assert [b.candles_seq for b in blocks][-2:] == [last, after]


async def test_a_late_and_a_revised_bar_recompute_what_follows(bus: Bus, nats_url: str) -> None:
    rows = walk(500)
    wrong = msgspec.structs.replace(rows[250], close=rows[250].high)
    async with running(Features, nats_url=nats_url, settings=QUICK):
        await put(bus, [*rows[:100], *rows[101:250], wrong, *rows[251:]], size=50)
        await put(bus, [rows[100]], size=1)
        last = await put(bus, [rows[250]], size=1)
        blocks = await read_until(bus, FEATURES, reached(last))
    assert plain(row for _, row in sorted(final_rows(blocks).items())) == undisturbed(rows)
    assert final_rows(blocks)[rows[250].ts].revision == 1
    assert final_rows(blocks)[rows[100].ts].revision == 0


async def test_a_killed_server_and_a_deleted_consumer_are_healed(bus: Bus, nats: NatsServer, nats_url: str) -> None:
    rows = walk(300)
    async with running(Features, nats_url=nats_url, settings=QUICK):
        last = await put(bus, rows[:100], size=10)
        await read_until(bus, FEATURES, reached(last))
        (consumer,) = [c.name for c in await bus.js.consumers_info("CANDLES")]
        await bus.js.delete_consumer("CANDLES", str(consumer))
        last = await put(bus, rows[100:200], size=10)
        await read_until(bus, FEATURES, reached(last))
        nats.stop()
        nats.start()
        last = await put(bus, rows[200:], size=10)
        blocks = await read_until(bus, FEATURES, reached(last), seconds=60)
    assert plain(final_rows(blocks).values()) == undisturbed(rows)


async def test_what_cannot_be_decoded_is_parked_and_the_rest_goes_on(bus: Bus, nats_url: str) -> None:
    rows = walk(20)
    async with running(Features, nats_url=nats_url):
        await put(bus, rows[:10])
        await bus.js.publish(CANDLES.subject("M1", "EURUSD"), b'{"symbol": 1}')
        last = await put(bus, rows[10:])
        blocks = await read_until(bus, FEATURES, reached(last))
        parked = await bus.js.get_last_msg("REJECTS", "rejects.features")
    assert plain(final_rows(blocks).values()) == undisturbed(rows)
    assert b"cannot be decoded" in (parked.data or b"")


async def test_a_series_too_many_is_parked_and_the_others_go_on(bus: Bus, nats_url: str) -> None:
    rows = walk(30)
    full = Settings(features=FeatureSettings(snapshot_seconds=0.05, max_series=1))
    async with running(Features, nats_url=nats_url, settings=full):
        await put(bus, rows[:10])
        await put(bus, rows[:10], symbol="GBPUSD")
        last = await put(bus, rows[10:20])
        await read_until(bus, FEATURES, reached(last))
        parked = await bus.js.get_last_msg("REJECTS", "rejects.features")
    assert b"max_series" in (parked.data or b"")
    async with running(Features, nats_url=nats_url, settings=full):  # is not computed anew at every start
        last = await put(bus, rows[20:25])
        blocks = await read_until(bus, FEATURES, reached(last))
    assert [(b.symbol, len(b.rows)) for b in blocks] == [("EURUSD", 10), ("EURUSD", 10), ("EURUSD", 5)]
    room = Settings(features=FeatureSettings(snapshot_seconds=0.05, quiet_seconds=0.2))
    async with running(Features, nats_url=nats_url, settings=room):
        await put(bus, rows[10:], symbol="GBPUSD")
        await put(bus, rows[:10], symbol="GBPUSD")  # what was parked, sent again
        blocks = await read_until(bus, FEATURES, lambda found: len(found) == 5)
    rows_of = {name: final_rows([b for b in blocks if b.symbol == name]) for name in ("EURUSD", "GBPUSD")}
    assert plain(rows_of["EURUSD"].values()) == undisturbed(rows[:25])
    assert plain(row for _, row in sorted(rows_of["GBPUSD"].items())) == undisturbed(rows)


class Stumbling(Features):
    """Fails once, in the middle of a batch: what came before has changed its states and is not published."""

    fails: ClassVar[list[int]] = []

    async def _change(self, subject: str, state: SeriesState, block: CandleBlock, seq: int) -> Change:
        if seq in self.fails:
            self.fails.remove(seq)
            raise TimeoutError("as when NATS does not answer")
        return await super()._change(subject, state, block, seq)


async def test_a_batch_that_fails_in_its_middle_is_made_again_whole(bus: Bus, nats_url: str) -> None:
    """The snapshot at the stop must not hold states whose rows were never published."""
    rows = walk(120)
    Stumbling.fails = [7, 60]
    await put(bus, rows[:40], size=4)  # waits for the actor: one batch
    async with running(Stumbling, nats_url=nats_url, settings=QUICK):
        await put(bus, rows[40:], size=1)
        blocks = await read_until(bus, FEATURES, lambda found: len(final_rows(found)) == len(rows))
    assert Stumbling.fails == []
    assert plain(final_rows(blocks).values()) == undisturbed(rows)
