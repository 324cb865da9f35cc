"""What a torture does, and how often: the order is the seed's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tests.torture.rig import ISOLATED, Rig


@dataclass(frozen=True)
class Plan:
    actors: int  # kills of actors
    nats: int
    postgres: int
    everything: int
    waiting: tuple[str, ...] = ()  # killed while a table of the archive is locked
    frozen: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # seconds of each SIGSTOP, by process
    stand_ins: tuple[tuple[str, ...], ...] = ()
    tails: tuple[tuple[str, ...], ...] = ()
    models: int = 1
    progress: tuple[int, int] = (15, 90)  # candles acknowledged between two of these


SHORT: Final = Plan(
    actors=10,
    nats=4,
    postgres=1,
    everything=2,
    waiting=("recorder", "postgres"),
    frozen={"features": (3.0,), "nats-server": (3.0,), "postgres": (3.0,)},
    stand_ins=(("features", "emitter", "recorder"),),
    tails=(("FEATURES", "SIGNALS"),),
    models=2,
)
FULL: Final = Plan(
    actors=26,
    nats=13,
    postgres=5,
    everything=4,
    waiting=("recorder", "recorder", "postgres", "postgres"),
    frozen={
        "collector": (10.0,),
        "features": (20.0,),
        "emitter": (20.0,),
        "recorder": (60.0,),
        "nats-server": (20.0, 60.0),
        "postgres": (60.0,),
    },
    stand_ins=(("features",), ("emitter",), ("recorder",), ("features", "emitter", "recorder")),
    tails=(("FEATURES",), ("SIGNALS",), ("FEATURES", "SIGNALS")),
    models=4,
)
STAND_IN_SECONDS: Final = 8.0  # frozen: longer than a stand-in takes to take over


def carry_out(rig: Rig, plan: Plan) -> None:
    """Does all of the plan in the seed's order, some candles apart."""
    steps: list[tuple[str, ...]] = [("kill", rig.rng.choice(ISOLATED)) for _ in range(plan.actors)]
    steps += [("kill", "nats-server")] * plan.nats + [("kill", "postgres")] * plan.postgres
    steps += [("waiting", name) for name in plan.waiting]
    steps += [("everything",)] * plan.everything + [("model",)] * plan.models
    steps += [("freeze", name, str(s)) for name, seconds in plan.frozen.items() for s in seconds]
    steps += [("stand_in", *names) for names in plan.stand_ins]
    rig.rng.shuffle(steps)
    # Lost tails come first: a recorder that reads a stream anew would make good what the rest may have broken.
    for what, *words in [*(("tail", *streams) for streams in plan.tails), *steps]:
        match what:
            case "kill":
                rig.kill(words[0])
            case "waiting":
                rig.kill_waiting(words[0])
            case "everything":
                rig.kill_everything()
            case "model":
                rig.swap_model()
            case "freeze":
                rig.freeze(words[0], float(words[1]))
            case "stand_in":
                rig.stand_in(tuple(words), STAND_IN_SECONDS)
            case "tail":
                rig.lose_tail(*words)
        rig.feed.await_progress(rig.rng.randint(*plan.progress), 90.0)
