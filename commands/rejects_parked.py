"""Another try for what an actor parked: each message goes back to where it failed, and never twice with effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from bus.client import BusUnavailable
from bus.subjects import CANDLES, FEATURES, REJECTS, SIGNAL_AGAIN, SIGNALS, Channel
from commands.output import CommandError
from commands.places import Places, store_of
from schema.messages import Reject

if TYPE_CHECKING:
    from bus.client import Bus

ANSWER_SECONDS: Final = 30.0


class NotAgain(Exception):
    """The message cannot be tried again, or failed again; the text says why."""


async def try_again(bus: Bus, places: Places, seq: int, reject: Reject) -> None:
    """Tries a parked message once more and takes it out of REJECTS. Raises NotAgain, CommandError."""
    channel, message = _message(reject)
    try:
        match reject.where:
            case "features":
                await _to_candles(bus, seq, channel, message)
            case "emitter":
                await _to_emitter(bus, channel, message)
            case "recorder":
                await _to_archive(places, channel, message)
            case _:
                raise NotAgain(f"nothing is known of how to repeat what {reject.where} parked")
        await bus.js.delete_msg(str(REJECTS.stream), seq)
    except (BusUnavailable, NatsError, APIError, TimeoutError) as error:
        raise CommandError(f"NATS did not take {seq} ({error}): run the same again, nothing counts twice.") from error


def _message(reject: Reject) -> tuple[Channel[Any], Any]:
    for channel in (CANDLES, FEATURES, SIGNALS):
        if reject.subject.startswith(f"{channel.prefix}."):
            try:
                return channel, msgspec.convert(reject.payload, channel.struct)
            except msgspec.ValidationError as error:
                raise NotAgain(f"it is no message of {channel.prefix} ({error})") from error
    raise NotAgain(f"its subject {reject.subject!r} is none that can be repeated")


async def _to_candles(bus: Bus, seq: int, channel: Channel[Any], block: Any) -> None:
    """Candles that the feature calculator could not take go through the log again, as late bars do."""
    if channel is not CANDLES:
        raise NotAgain("features reads candles only")
    await bus.publish(CANDLES, block, block.timeframe, block.symbol, msg_id=f"parked:{seq}")


async def _to_emitter(bus: Bus, channel: Channel[Any], block: Any) -> None:
    if channel is not FEATURES:
        raise NotAgain("the emitter reads features only")
    data = await bus.request(SIGNAL_AGAIN, FEATURES.encode(block), timeout=ANSWER_SECONDS)
    answer = msgspec.json.decode(data, type=dict[str, Any]) if data else {}  # empty: the endpoint failed
    if "signals" not in answer:
        raise NotAgain(str(answer.get("error") or "the emitter failed again, as its log tells"))


async def _to_archive(places: Places, channel: Channel[Any], message: Any) -> None:
    """The rows that the recorder would have written, by its own statements, which never go back in sequence."""
    from actors.core.batching import reduce_features, reduce_signals
    from bus.store import StoreRejected

    if channel is CANDLES:
        raise NotAgain("the recorder reads features and signals")
    batch = reduce_features([message]) if channel is FEATURES else reduce_signals([message])
    async with store_of(places) as store:
        try:
            async with store.transaction() as connection:
                for statement in batch.statements:
                    await connection.execute(store.sql(statement.query), *statement.columns)
        except StoreRejected as error:
            raise NotAgain(f"the archive refuses it again: {error}") from error
