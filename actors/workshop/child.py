"""A training in a process of its own, which alone imports scikit-learn."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from actors.child import ChildDied, child
from actors.core.manifest import ONNX_FILE, PICKLE_FILE, PREDICTIONS_FILE
from actors.core.verdicts import Progress
from actors.workshop.files import write

if TYPE_CHECKING:
    from actors.core.figures import Champion

RUN_BUDGET: Final = 3_600.0  # seconds of one training


class Bars(msgspec.Struct, frozen=True, kw_only=True):
    """A symbol whose bars were spooled for the leak guard; ``complete``: from the series' first bar on."""

    symbol: str
    complete: bool


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """The version that serves: its graph's file and SHA-256, and the newest row (epoch seconds) that it learnt from."""

    version: str
    graph: str
    sha256: str
    feature_set: str
    symbols: tuple[str, ...]
    last_ts: int


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the child is told: where the rows lie, where the artifacts go, and ``TrainOptions`` as a mapping.

    Rows are in ``<i>.rows`` by symbol, the bars of ``bars[i]`` in ``<i>.bars``.
    """

    folder: str
    symbols: list[str]
    options: dict[str, Any]
    bars: list[Bars] = []
    champion: Serving | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How far the child is."""

    stage: str
    done: float


class Result(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the child answers; ``reason`` is empty where a model was trained."""

    reason: str
    report: dict[str, Any]


_FROM_CHILD: Final = msgspec.json.Decoder(Step | Result)


class RunFailed(Exception):
    """A run that came to no verdict; the message says why and what to do."""


async def run_child(job: Job, tell: Callable[[Progress], Awaitable[None]]) -> Result:
    """Trains in a process of its own and ends it whatever happens.

    Raises:
        RunFailed: the child died or took longer than the budget.
    """
    try:
        async with (
            asyncio.timeout(RUN_BUDGET),
            child(_child, msgspec.json.encode(job), name="mt5-training") as training,
        ):
            while True:
                message = _FROM_CHILD.decode(await training.hear())
                if isinstance(message, Result):
                    return message
                await tell(Progress(stage=message.stage, done=message.done))
    except ChildDied as error:
        raise RunFailed(
            f"the training process died (exit code {error.exitcode}): if memory is short, lower [trainer] max_rows."
        ) from error
    except TimeoutError as error:
        raise RunFailed(f"it took longer than {RUN_BUDGET:.0f} s: lower [trainer] max_rows or trees.") from error


def _child(sender: Any, data: bytes) -> None:
    """The child's whole life: rows in, artifacts and a report out."""
    from actors.core import dataset, training  # only here: scikit-learn's memory stays in this process
    from actors.core.forest import TrainOptions

    job = msgspec.json.decode(data, type=Job)
    folder = Path(job.folder)
    options = msgspec.convert(job.options, TrainOptions)

    def tell(stage: str, done: float) -> None:
        sender.send_bytes(msgspec.json.encode(Step(stage=stage, done=done)))

    def spool(name: str) -> bytes:
        return (folder / name).read_bytes()

    rows = dataset.from_spool(job.symbols, [spool(f"{i}.rows") for i in range(len(job.symbols))])
    histories = [
        dataset.history_from_spool(bars.symbol, bars.complete, spool(f"{i}.bars")) for i, bars in enumerate(job.bars)
    ]
    champion, note = (None, "") if job.champion is None else _champion(job.champion)
    outcome = training.train(rows, options, tell, histories=histories, champion=champion)
    outcome.report["champion_note"] = note
    outcome.report["libraries"]["python"] = platform.python_version()
    reason = outcome.reason if isinstance(outcome, training.Refused) else ""
    if isinstance(outcome, training.Trained):
        (folder / "version").mkdir()
        write(folder / "version" / PICKLE_FILE, outcome.model_pkl)
        write(folder / "version" / ONNX_FILE, outcome.model_onnx)
        write(folder / "version" / PREDICTIONS_FILE, outcome.predictions)
    sender.send_bytes(msgspec.json.encode(Result(reason=reason, report=outcome.report)))


def _champion(serving: Serving) -> tuple[Champion | None, str]:
    """The version that serves, or why a new one cannot be compared with it here."""
    from actors.core.figures import Champion

    try:
        graph = Path(serving.graph).read_bytes()
    except OSError:
        return None, f"{serving.version} was not compared: its {ONNX_FILE} is not on this machine."
    if sha256(graph).hexdigest() != serving.sha256:
        return None, f"{serving.version} was not compared: its {ONNX_FILE} here is not the one its manifest names."
    return Champion(serving.version, graph, serving.feature_set, serving.symbols, serving.last_ts), ""
