"""``demo``: a simulated terminal's history, a first model learned from it, its signals, and its life.

Once a model serves, the market's clock runs in a time lapse, so that a person can watch what else takes weeks: the first
version proves itself against the base rate and becomes champion, and a challenger that was made to know nothing fails.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any, Final

import aiohttp
import msgspec
from nats.aio.msg import Msg
from rich.console import Console

from actors.core.market import INSTRUMENTS, MINUTE, Market, expected_auc
from actors.core.verdicts import TrainRequest, Verdict, failed
from actors.terminal import MAX_CANDLES, Said, Tally, Terminal, TerminalError, simulate
from bus.client import Bus, BusTooOld, BusUnavailable
from bus.subjects import MODELS, OUTCOMES, SIGNALS, TRAIN
from bus.topology import model_name
from commands.output import DONE, NO, CommandError
from commands.places import CLIENT
from commands.signals import line
from schema.messages import Signal

# Three symbols: enough rows for a model to learn from, few enough to train on while somebody watches.
TRADED: Final = tuple(i for i in INSTRUMENTS if i.symbol in {"EURUSD", "XAUUSD", "US30.m"})
TIMEFRAME: Final = "M1"
SOURCE: Final = "Simulator"
EDGE: Final = 0.15  # of the market's: proved within some 4,000 outcomes, and an AUC that no leak guard suspects
SPEED: Final = 60.0  # market seconds a second: one bar a symbol a second
LAPSE: Final = 1_800.0  # the same once a model serves: thirty bars a symbol a second
SAY_EVERY: Final = 5.0  # seconds between two accounts of the evidence
# A forest whose leaves hold all rows says the base rate, whatever it sees.
KNOWS_NOTHING: Final = TrainRequest(timeframe=TIMEFRAME, trees=10, max_depth=1, min_samples_leaf=1_000_000)
MARKET_OPENS: Final = datetime(2025, 6, 1, 22, tzinfo=UTC)  # a Sunday
LIVE_FROM: Final = datetime(2025, 6, 9, 12, tzinfo=UTC)  # a Monday; 8,000 bars and a weekend lie before it
ARCHIVE_PATIENCE: Final = 60.0
ARCHIVE_POLL: Final = 0.25
TRAIN_PATIENCE: Final = 600.0
UNNAMED_EVERY: Final = 50  # signals without a model that one line on the screen stands for
SHOWN_FIRST: Final = 20  # signals of a model that are all shown; of those after them …
SHOWN_EVERY: Final = 50  # … one in so many
MAX_AWAITED: Final = 1_000  # posted bars whose signals are still looked for
STYLES: Final = {1: "green", -1: "red", 0: "dim"}


@dataclass(slots=True)
class Seen:
    """What the demo has lived through so far."""

    history: Tally = field(default_factory=Tally)
    live: int = 0
    signals: int = 0
    named: dict[str, int] = field(default_factory=dict)  # signals by model
    lowest: float = 1.0  # prob_up
    highest: float = 0.0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))  # seconds from POST to signal
    posted: dict[tuple[str, datetime], float] = field(default_factory=dict)
    lives: list[str] = field(default_factory=list)  # what became of versions, in the order of the events
    outcomes: int = 0  # of the version that serves, with the sums of squared errors: its own and the base rate's
    errors: float = 0.0
    base_errors: float = 0.0
    problem: str = "there was no time to train one; give it more, as with --seconds 90."


async def demo(
    gateway_url: str,
    nats_url: str,
    *,
    seconds: float | None,
    seed: int,
    stop: asyncio.Event,
    api_key: str | None = None,
    console: Console | None = None,
) -> int:
    """Runs until ``stop`` is set or ``seconds`` are over (None: no end), counted from this call.

    Returns 0 where signals named a model; raises CommandError (1) where none did, or where the servers are away.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    seen = Seen()
    try:
        bus = await Bus.connect(nats_url, name=CLIENT, patience=3.0)
    except (BusUnavailable, BusTooOld) as error:
        raise CommandError(str(error), NO) from error
    try:
        async with aiohttp.ClientSession() as session:
            story = asyncio.create_task(
                _Demo(session, bus, gateway_url, api_key, seed, console, seen).run(), name="demo-story"
            )
            ending = asyncio.create_task(stop.wait(), name="demo-stop")
            try:
                await asyncio.wait({story, ending}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                if story.done():
                    story.result()
            finally:
                story.cancel()
                ending.cancel()
                await asyncio.gather(story, ending, return_exceptions=True)
    except TerminalError as error:
        raise CommandError(str(error), NO) from error
    finally:
        await bus.close()
    return _end(console, seen, gateway_url, stopped=stop.is_set())


class _Demo:
    def __init__(
        self,
        session: aiohttp.ClientSession,
        bus: Bus,
        url: str,
        api_key: str | None,
        seed: int,
        console: Console,
        seen: Seen,
    ) -> None:
        self._session = session
        self._headers = {"X-API-Key": api_key} if api_key else {}
        self._bus = bus
        self._url = url.rstrip("/")
        self._terminal = Terminal(session, url, api_key=api_key, on_wait=self._on_wait)
        self._markets = [Market(instrument, seed=seed, start=MARKET_OPENS, edge=EDGE) for instrument in TRADED]
        self._serving: str | None = None
        self._challenger: str | None = None
        self._said = 0.0
        self._console = console
        self._seen = seen

    async def run(self) -> None:
        """History, then a first model while the market lives on; never returns."""
        self._introduce()
        newest = await self._newest_signals()
        last = max((signal.ts for signal in newest.values()), default=LIVE_FROM - MINUTE)
        live_from = max(LIVE_FROM, last + MINUTE)
        ends = await self._load_history(live_from, newest)
        await self._wait_until_archived(ends)
        await self._bus.nc.subscribe(SIGNALS.wildcard, cb=self._on_signal)
        await self._bus.nc.subscribe(MODELS.subject(model_name(TIMEFRAME)), cb=self._on_model)
        await self._bus.nc.subscribe(OUTCOMES.wildcard, cb=self._on_outcome)
        await self._bus.nc.flush()
        serving = next((s for s in newest.values() if s.model_version is not None), None)
        if serving is not None:
            self._say(f"{serving.model_name} {serving.model_version} is there already and goes on serving.")
            self._serving = serving.model_version
        training = asyncio.create_task(self._train(), name="demo-train") if serving is None else None
        self._say(f"The market lives on from {live_from:%A %d %B %Y %H:%M} UTC, {SPEED:g} times as fast as a real one.")
        try:
            await simulate(self._terminal, self._markets, speed=self._speed, source=SOURCE, on_post=self._on_post)
        finally:
            if training is not None:
                training.cancel()
                await asyncio.gather(training, return_exceptions=True)

    def _introduce(self) -> None:
        best = expected_auc(EDGE)
        self._say(
            f"A simulated terminal: {', '.join(i.symbol for i in TRADED)}. "
            f"Its market has one known edge: each minute leans {EDGE:g} of its standard deviation back towards the mean of "
            f"the last 60 closes. Whoever knows it ranks the next five minutes with an AUC of about {best:.2f} (0.50 is "
            "chance), and no model can learn more; real minutes of EURUSD show 0.50 to 0.53.",
            style="bold",
        )
        self._say(f"The page: {self._url}/", style="bold cyan")

    async def _newest_signals(self) -> dict[str, Signal]:
        """Each symbol's newest signal: where an earlier demo on this home left off."""
        newest: dict[str, Signal] = {}
        for market in self._markets:
            symbol = market.instrument.symbol
            found = await self._get("/signals", symbol=symbol, timeframe=TIMEFRAME, limit="1")
            for signal in msgspec.convert(found.get("signals", []), list[Signal]):
                newest[symbol] = signal
        return newest

    async def _load_history(self, live_from: datetime, newest: dict[str, Signal]) -> dict[str, datetime]:
        """Posts what the gateway lacks before ``live_from`` as history; returns the newest bar of each symbol sent."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        ends: dict[str, datetime] = {}
        for market in self._markets:
            symbol = market.instrument.symbol
            said = Said(history=True, source=SOURCE, point=market.instrument.point)
            bars = market.until(live_from)
            if symbol in newest:  # the earlier demo's bars are there; what follows them may be missing
                bars = [bar for bar in bars if bar.ts > newest[symbol].ts]
            for start in range(0, len(bars), MAX_CANDLES):
                chunk = bars[start : start + MAX_CANDLES]
                self._seen.history += await self._terminal.post(symbol, TIMEFRAME, chunk, said)
                ends[symbol] = chunk[-1].ts
        tally, took = self._seen.history, loop.time() - started
        if tally.rejected:
            raise CommandError(f"The gateway rejected {tally.rejected} bars of history: {tally.reason}.", NO)
        if tally.received:
            self._say(f"History: {tally.received:,} closed bars of {len(ends)} symbols, posted in {took:.1f} s.")
        return ends

    async def _wait_until_archived(self, ends: dict[str, datetime]) -> None:
        """Until the archive has the features of every symbol's newest bar: the trainer reads them there."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        for symbol, end in ends.items():
            asked = {"symbol": symbol, "timeframe": TIMEFRAME, "from": str(int(end.timestamp())), "limit": "1"}
            while not (await self._get("/features", **asked)).get("features"):
                if loop.time() - started > ARCHIVE_PATIENCE:
                    raise CommandError(
                        f"The features of {symbol}'s history are not in the archive after {ARCHIVE_PATIENCE:.0f} s: "
                        "see what `mt5 doctor` says of the recorder and the database.",
                        NO,
                    )
                await asyncio.sleep(ARCHIVE_POLL)
        if ends:
            self._say(f"Their features are in the archive, {loop.time() - started:.1f} s later.")

    async def _train(self) -> None:
        """Asks for a first model; what comes of it shows in the signals, a failure is kept for the end."""
        self._say("The trainer learns a first model; until it serves, signals say no_model …")
        self._seen.problem = "the trainer had not answered when the time was over; give it more, as with --seconds 180."
        loop = asyncio.get_running_loop()
        started = loop.time()
        verdict = await self._ask(TrainRequest(timeframe=TIMEFRAME))
        self._seen.problem = verdict.message
        took = f"{loop.time() - started:.0f} s"
        if not verdict.ok:
            self._say(f"The trainer gives no model after {took}: {verdict.message}", style="red")
            return
        figures = ""
        if verdict.auc is not None:
            interval = f" (95 % {verdict.auc_ci[0]:.3f} to {verdict.auc_ci[1]:.3f})" if verdict.auc_ci else ""
            figures = f" Out of sample its AUC is {verdict.auc:.3f}{interval}, learned from {verdict.rows or 0:,} rows."
        self._say(f"After {took}: {verdict.message}{figures}", style="bold")
        self._say(
            "It is unproven: it says a probability and trades nothing until its outcomes prove that it knows more than the base "
            f"rate. From here on the market's clock runs {LAPSE / SPEED:g} times faster.",
            style="bold",
        )
        if verdict.version is not None:
            self._serving = verdict.version
        await self._plant()

    async def _plant(self) -> None:
        """A second recipe that can know nothing, to be seen failing: nothing is promoted for being new."""
        challenger = await self._ask(KNOWS_NOTHING)
        if not challenger.ok:
            self._say(f"The challenger was not made: {challenger.message}", style="yellow")
            return
        self._challenger = challenger.version
        self._say(
            f"A challenger is planted, {challenger.version}: its leaves hold all rows, so it knows nothing but the base rate. "
            f"It is followed as a {challenger.verdict} beside the version that serves.",
            style="bold",
        )

    async def _ask(self, request: TrainRequest) -> Verdict:
        try:
            answer = await self._bus.request(TRAIN, msgspec.json.encode(request), timeout=TRAIN_PATIENCE)
            return msgspec.json.decode(answer, type=Verdict)
        except BusUnavailable as error:
            return failed(f"{error} Is the trainer running?")
        except msgspec.DecodeError as error:
            return failed(f"The trainer's answer is of another version ({error}): start everything anew.")

    def _speed(self) -> float:
        return SPEED if self._serving is None else LAPSE

    async def _on_model(self, message: Msg) -> None:
        event = MODELS.decode(message.data)
        if event.event == "activated":
            if event.version != self._serving:
                self._seen.outcomes, self._seen.errors, self._seen.base_errors = 0, 0.0, 0.0
            self._serving = event.version
        elif event.event != "retired":
            return
        what = f"becomes {event.state}" if event.event == "activated" else "is retired"
        who = "The challenger" if event.version == self._challenger else "The model"
        self._seen.lives.append(f"{who.lower()} {what}")
        self._say(f"{who} {event.version} {what}: {event.reason}", style="bold magenta")

    async def _on_outcome(self, message: Msg) -> None:
        outcome = OUTCOMES.decode(message.data)
        if outcome.model_version != self._serving or outcome.up is None:
            return
        seen, up = self._seen, float(outcome.up)
        seen.outcomes += 1
        seen.errors += (outcome.prob_up - up) ** 2
        seen.base_errors += (outcome.base_rate - up) ** 2
        now = asyncio.get_running_loop().time()
        if now - self._said >= SAY_EVERY:
            self._said = now
            self._say(
                f"  … {seen.outcomes:,} outcomes of {outcome.model_version} ({outcome.state}): Brier score "
                f"{seen.errors / seen.outcomes:.4f}, the base rate's {seen.base_errors / seen.outcomes:.4f}",
                style="dim",
            )

    async def _on_signal(self, message: Msg) -> None:
        seen = self._seen
        signal = SIGNALS.decode(message.data)
        posted = seen.posted.pop((signal.symbol, signal.ts), None)
        if posted is None:
            return  # another sender's bar
        seen.latencies.append(asyncio.get_running_loop().time() - posted)
        seen.signals += 1
        if signal.model_version is None:
            if (seen.signals - sum(seen.named.values())) % UNNAMED_EVERY == 0:
                self._say(f"  … {seen.signals} signals so far, all of them {signal.abstain}", style="dim")
            return
        model = f"{signal.model_name} {signal.model_version}"
        if model not in seen.named:
            self._say(f"Signals are made by {model} from here on:", style="bold green")
        seen.named[model] = seen.named.get(model, 0) + 1
        shown = seen.named[model] <= SHOWN_FIRST or seen.named[model] % SHOWN_EVERY == 0
        if signal.prob_up is not None:
            seen.lowest, seen.highest = min(seen.lowest, signal.prob_up), max(seen.highest, signal.prob_up)
        if shown:
            self._say(line(signal), style=STYLES[signal.label])

    def _on_post(self, symbol: str, ts: datetime) -> None:
        self._seen.live += 1
        posted = self._seen.posted
        posted[symbol, ts] = asyncio.get_running_loop().time()
        if len(posted) > MAX_AWAITED:
            del posted[next(iter(posted))]

    def _on_wait(self, why: str, seconds: float) -> None:
        self._say(f"  the gateway: {why}; the terminal sends the same again in {seconds:.1f} s", style="yellow")

    async def _get(self, path: str, **query: str) -> dict[str, Any]:
        """A read of the gateway; one that it cannot answer just now is empty, since every caller asks again or can do without."""
        try:
            async with self._session.get(
                f"{self._url}{path}", params=query, headers=self._headers, timeout=aiohttp.ClientTimeout(total=10)
            ) as response:
                if response.status == 503:
                    return {}
                if response.status != 200:
                    raise CommandError(f"{self._url}{path} answers {response.status}: {await response.text()}", NO)
                found: dict[str, Any] = msgspec.json.decode(await response.read())
                return found
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise CommandError(f"The gateway at {self._url} does not answer ({error}): is it running?", NO) from error

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False)


def _end(console: Console, seen: Seen, url: str, *, stopped: bool) -> int:
    if not seen.named and stopped:
        console.print("Stopped before a model made its first signal.", markup=False)
        return DONE
    if not seen.named:
        raise CommandError(f"No signal named a model in this demo: {seen.problem}", NO)
    models = ", ".join(f"{count} by {model}" for model, count in seen.named.items())
    lives = f"; {', '.join(seen.lives)}" if seen.lives else ""
    console.print(
        f"Done: {seen.history.received:,} bars of history and {seen.live:,} live ones posted; {seen.signals:,} signals, "
        f"{models}{lives}; p(up) {seen.lowest:.3f} to {seen.highest:.3f}, {median(seen.latencies) * 1_000:.1f} ms from POST to signal (median).",
        markup=False,
        style="bold",
    )
    return DONE
