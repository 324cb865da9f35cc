"""A seeded hostile feed made from a clean one: what bad terminals and networks do to candles, with a truth to compare.

Each series is watched by a simulated terminal. A bar has a life: it forms, it closes (perhaps with wrong values), it is
corrected, a correction is taken back. A payload is a snapshot of that life at one moment, and the feed delivers
snapshots in any order, several times, cut anew, in every shape. In ``clock`` series the payload says its moment
(``server_time``), which orders versions whatever the order of delivery. Without it only the log orders them, so a
snapshot that holds a newer version waits until the older one was answered (:attr:`Post.after`): a sender who does not
wait has no right answer to expect.

The truth is the clean feed: every bar once, in order, with its final values. ``timed`` series are replays that bring their
own now: their labels mean something, and a bar is stale only if the payload that showed it first was late
(:attr:`Post.now`).
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Final, Literal, get_args

from schema.settings import Symbol

Kind = Literal[
    "duplicates",  # payloads sent again, word by word or in another shape
    "forming",  # the newest bar resent every few seconds with changing values
    "reorder",  # payloads overtake each other, a bounded way
    "gaps",  # bars that are held back and come long after their successors
    "before_first",  # bars before the series' first come last
    "corrections",  # wrong values first, the right ones later
    "taken_back",  # right, then wrong, then right again
    "shapes",  # every accepted shape, time and volume spelling, trailing NUL
    "gzip",
    "sources",  # a second terminal with other values, and true ones where the first has none
    "regret",  # the second terminal corrects what it filled
    "unranked",  # no setting says which terminal owns: the first one does
    "clock",  # broker time with clock fields
    "dst",  # the feed crosses a change of daylight-saving time
    "fields",  # and nothing but the clock fields tells of it
    "nonstop",  # bars all through the change, the repeated hour's among them
    "long",  # H4 and D1, which lie on the broker's grid and on none of UTC's
    "multi",  # one payload of two series
    "running",  # a bar that is not over by our clock, without a word of it
    "recut",  # a payload sent again as after a 503, cut at other places
]
KINDS: Final[frozenset[Kind]] = frozenset(get_args(Kind))

MINUTES: Final = {"M1": 1, "M5": 5, "M15": 15, "M30": 30, "H1": 60, "H4": 240, "D1": 1_440}
SPELLINGS: Final = {"M1": "1m", "M5": "5m", "M15": "15m", "M30": "30m", "H1": "1h", "H4": "4h", "D1": "1d"}
LONG: Final = ("H4", "D1")
SYMBOLS: Final = ("EURUSD{}.m", "GBPUSD{}!", "@ES{}", "XAU USD {}", "US30{}#", "Öl {}", "50%>{}*")
PREAMBLE: Final = 290  # bars of history before the live part of a deep series: rows are ready after 300
DEEP: Final = 20  # live bars of a deep series
SHALLOW: Final = 16  # bars of a series without history
REORDER: Final = 6.0  # places that a payload falls behind at most
RUNNING: Final = -1  # the place of a bar that is no part of the series yet
LEFT: Final = 1_200  # seconds that it must have left, which no run takes
AMBIGUOUS: Final = 3 * 3_600  # so long after autumn's change a payload's newest bars are those of the second pass
FIRST: Final = -1e9  # where the history stands in the order of delivery
LAST: Final = 1e9

# Brokers' clocks: an offset in hours, or a family that changes with the season. Each terminal is named after its clock,
# so that one rule a source serves every series of every seed.
ZONES: Final = (0, 2, 3, "new_york+7", "Europe/Athens")
_WINTER: Final = 2  # hours ahead of UTC of both families
_SUMMER: Final = {
    "new_york+7": (datetime(2025, 3, 9, 7, tzinfo=UTC), datetime(2025, 11, 2, 6, tzinfo=UTC)),
    "Europe/Athens": (datetime(2025, 3, 30, 1, tzinfo=UTC), datetime(2025, 10, 26, 1, tzinfo=UTC)),
}

Values = tuple[float, float, float, float, float, float]  # open, high, low, close, volume, spread


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar's life: ``versions`` are (from which moment, values), the last is the truth; before ``end`` it forms."""

    ts: int
    end: int
    versions: tuple[tuple[int, Values], ...]

    @property
    def truth(self) -> Values:
        return self.versions[-1][1]

    @property
    def settled(self) -> int:
        """The moment from which the truth stands."""
        return self.versions[-1][0]

    def version(self, moment: int) -> int:
        """The place of the version that stands at ``moment``, which is at or after the end."""
        return max(i for i, (since, _) in enumerate(self.versions) if i == 0 or since <= moment)


@dataclass(frozen=True, slots=True)
class Series:
    """One series' truth: ``history`` is the number of its first bars that came as history and make no signals."""

    symbol: str
    timeframe: str
    bars: tuple[Bar, ...]
    history: int
    mode: Literal["plain", "replay", "clock", "timed"]
    kinds: frozenset[Kind]
    owner: str
    other: str
    change: int | None = None  # when its clock changes

    @property
    def clocked(self) -> bool:
        """Its payloads say their moment, which orders versions."""
        return self.mode in ("clock", "timed")

    @property
    def key(self) -> tuple[str, str]:
        return self.symbol, self.timeframe


@dataclass(frozen=True, slots=True)
class Post:
    """One payload; it may be sent as soon as the posts whose places stand in ``after`` were answered."""

    body: bytes
    headers: Mapping[str, str]
    after: tuple[int, ...] = ()
    note: str = ""
    shows: tuple[tuple[str, str, int], ...] = ()  # (symbol, timeframe, open time) of its closed bars that make signals
    perhaps: tuple[tuple[str, str, int], ...] = ()  # a forming bar without a word of it: a later bar closes it too soon
    now: int | None = None  # by which their age is judged; None: by the receipt, or at each bar's own end
    rows: tuple[dict[str, Any], ...] = ()  # and what stands beside them, for a payload of several series
    beside: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Feed:
    """One seed's feeds. Sent in order by one sender, or by many that respect ``after``."""

    seed: int
    series: tuple[Series, ...]
    clean: tuple[Post, ...]
    hostile: tuple[Post, ...]

    @property
    def symbols(self) -> dict[str, Symbol]:
        """The settings that the feed needs: whose word counts where two terminals send one symbol."""
        return {
            s.symbol: Symbol(priority=(s.owner, s.other))
            for s in self.series
            if "sources" in s.kinds and "unranked" not in s.kinds
        }

    @property
    def clocks(self) -> dict[str, str]:
        """The rules that the feed's sources need: without one the past's daylight-saving time is not known."""
        return {
            name: _rule(name)
            for s in self.series
            if s.clocked
            for name in (s.owner, s.other, _clean_source(s))
            if ("dst" in s.kinds and not ("fields" in s.kinds and name == s.owner)) or name == _clean_source(s)
        }


def make(seed: int, kinds: Collection[Kind] = KINDS, now: int | None = None) -> Feed:
    """The feeds of one seed: a deep M1 series with history and a shallow one, with only these kinds of hostility.

    ``now`` is our clock's; without it there is no bar that is running.
    """
    rng = random.Random(seed)
    deep = _series(rng, f"{seed}x0", "M1", PREAMBLE, DEEP, kinds)
    frames = sorted(frame for frame in MINUTES if "long" in kinds or frame not in LONG)
    alike = deep.mode if "multi" in kinds and deep.mode in ("plain", "replay") and rng.random() < 0.5 else None
    series = (deep, _series(rng, f"{seed}x1", rng.choice(frames), 0, SHALLOW, kinds, alike))
    hostile = _interleaved(rng, [_Hostile(rng, one, now).posts() for one in series])
    return Feed(
        seed,
        series,
        tuple(_interleaved(rng, [_clean(one) for one in series])),
        tuple(_joined(rng, hostile) if "multi" in kinds else hostile),
    )


def merged(feeds: Sequence[Feed], which: Literal["clean", "hostile"]) -> list[Post]:
    """Several seeds' posts as one list, interleaved by chance."""
    rng = random.Random(feeds[0].seed)
    return _interleaved(rng, [feed.clean if which == "clean" else feed.hostile for feed in feeds])


def _interleaved(rng: random.Random, streams: Sequence[Sequence[Post]]) -> list[Post]:
    """Several lists as one, each in its own order; ``after`` is renumbered."""
    turns = [n for n, stream in enumerate(streams) for _ in stream]
    rng.shuffle(turns)
    places: list[list[int]] = [[] for _ in streams]
    out: list[Post] = []
    for n in turns:
        post = streams[n][len(places[n])]
        places[n].append(len(out))
        out.append(replace(post, after=tuple(places[n][i] for i in post.after)))
    return out


def _joined(rng: random.Random, posts: Sequence[Post]) -> list[Post]:
    """Some neighbours of different series, with the same beside them, as one payload."""
    out: list[Post] = []
    places: dict[int, int] = {}
    for at, post in enumerate(posts):
        post = replace(post, after=tuple(sorted({places[i] for i in post.after})))
        last = out[-1] if out else None
        if (
            last is not None
            and post.beside is not None
            and last.beside == post.beside
            and post.now is None
            and len(out) - 1 not in post.after
            and {row["symbol"] for row in last.rows} != {row["symbol"] for row in post.rows}
            and rng.random() < 0.5
        ):
            rows = list(last.rows + post.rows)
            body = json.dumps(post.beside | {"items": rows} if post.beside else rows).encode()
            out[-1] = Post(
                body,
                {"Content-Type": "application/json"},
                tuple(sorted({*last.after, *post.after})),
                f"{last.note}, and {post.note}",
                last.shows + post.shows,
                rows=tuple(rows),
            )
        else:
            out.append(post)
        places[at] = len(out) - 1
    return out


# --- the truth ---------------------------------------------------------------------------------------------------


def _series(
    rng: random.Random,
    name: str,
    timeframe: str,
    history: int,
    live: int,
    kinds: Collection[Kind],
    alike: str | None = None,
) -> Series:
    clocked = ("clock", "clock", "timed", "timed") if "clock" in kinds else ()
    mode = alike or rng.choice(("plain", "replay", *clocked))
    chosen = {kind for kind in sorted(kinds) if rng.random() < 0.8 or len(kinds) < 5}
    if mode not in clocked:
        chosen -= {"taken_back", "dst"}  # without a clock a bar's return to former values is no news
    if mode in ("replay", "timed"):
        chosen -= {"sources"}  # a replay owns nothing
    if alike is not None and rng.random() < 0.7:
        chosen -= {"sources"}  # what stands beside the rows must be alike as well
    if timeframe in LONG:
        chosen -= {"nonstop"}
    change = "dst" in chosen
    if not change or (len(kinds) >= 5 and rng.random() < 0.5):
        chosen -= {"fields"}
    if not change or MINUTES[timeframe] > 5 or (len(kinds) >= 5 and rng.random() < 0.3):
        chosen -= {"nonstop"}
    zone = rng.choice(ZONES[3:] if chosen & {"fields", "nonstop"} else ZONES if change else ZONES[:3])
    if mode not in clocked:
        zone = 0
    moment = rng.choice(_SUMMER[zone]) if isinstance(zone, str) else None
    step = MINUTES[timeframe] * 60
    owner = f"Alpha {zone}{' ' + name if 'fields' in chosen else ''}"
    # Brokers' long bars differ with their clocks: the second terminal is of the same broker then.
    beta = zone if timeframe in LONG else rng.choice(ZONES[:3]) if mode in clocked else 0
    if timeframe in LONG:
        times = _long_times(rng, timeframe, history + live, owner, moment)
    elif "nonstop" in chosen and moment is not None:
        times = _nonstop_times(rng, step, history + live, int(moment.timestamp()))
    else:
        times = _times(rng, timeframe, history + live, moment)
    price = rng.choice((1.1, 0.65, 151.2, 2_350.0))
    bars = []
    for i, ts in enumerate(times):
        opened, price = price, round(price * (1 + rng.gauss(0, 2e-4)), 5)
        values = _around(rng, opened, price)
        end = ts + step
        versions = _versions(rng, end, values, step, chosen) if i >= history else ((end, values),)
        bars.append(Bar(ts, end, versions))
    return Series(
        symbol=rng.choice(SYMBOLS).format(name),
        timeframe=timeframe,
        bars=tuple(bars),
        history=history,
        mode=mode,  # type: ignore[arg-type]
        kinds=frozenset(chosen),
        owner=owner,
        other=f"Beta {beta}{' fixed' if change else ''}",
        change=int(moment.timestamp()) if moment is not None else None,
    )


def _rule(source: str) -> str:
    """What an operator would write for a source; around a change only that tells a fixed clock from one that changes."""
    zone = _zone(source)
    return zone if isinstance(zone, str) else f"+{zone:02d}:00"


def _zone(source: str) -> int | str:
    name = source.split()[1]
    return int(name) if name.isdecimal() else name


def _offset(source: str, moment: int) -> int:
    """Seconds that a source's clock is ahead of UTC."""
    zone = _zone(source)
    if isinstance(zone, int):
        return zone * 3_600
    begins, ends = (int(when.timestamp()) for when in _SUMMER[zone])
    return (_WINTER + (begins <= moment < ends)) * 3_600


def _between(change: int | None) -> range:
    """The moments between a change of the clock and the other family's nearest one; empty where it does not change."""
    if change is None:
        return range(0)
    moments = [int(when.timestamp()) for pair in _SUMMER.values() for when in pair]
    other = min((m for m in moments if m != change), key=lambda m: abs(m - change))
    return range(min(change, other), max(change, other))


def _times(rng: random.Random, timeframe: str, count: int, change: datetime | None) -> list[int]:
    """Open times with daily breaks, lost bars and a weekend, in which the clock may change."""
    step = MINUTES[timeframe] * 60
    if change is not None:
        sunday = change.replace(hour=0)
    else:
        sunday = datetime(2025, 1, 5, tzinfo=UTC) + timedelta(weeks=rng.randrange(30))
    closing, opening = (int((sunday + timedelta(hours=hours)).timestamp()) for hours in (-26, 22))
    lost = rng.choice((0.0, 0.01, 0.05))
    behind = rng.randrange(2, SHALLOW)
    before = (ts for ts in range(closing - step, 0, -step) if ts // 3_600 % 24 != 4 and rng.random() >= lost)
    after = (ts for ts in range(opening, opening + count * 10 * step, step) if rng.random() >= lost)
    return [*reversed(list(islice(before, count - behind))), *islice(after, behind)]


def _nonstop_times(rng: random.Random, step: int, count: int, change: int) -> list[int]:
    """Open times of a market that never closes, on either side of a change of its clock."""
    lost = rng.choice((0.0, 0.01, 0.05))
    behind = rng.randrange(2, SHALLOW)
    before = (ts for ts in range(change - step, 0, -step) if rng.random() >= lost)
    after = (ts for ts in range(change, change + count * 10 * step, step) if rng.random() >= lost)
    return [*reversed(list(islice(before, count - behind))), *islice(after, behind)]


def _long_times(rng: random.Random, timeframe: str, count: int, source: str, change: datetime | None) -> list[int]:
    """Open times of bars on the grid of a source's own days, Monday to Friday."""
    step = MINUTES[timeframe] * 60
    day = (change or datetime(2025, 1, 5, tzinfo=UTC) + timedelta(weeks=rng.randrange(30))).replace(hour=0)
    days_before = rng.randrange(3, 9) if timeframe == "H4" else rng.randrange(10, 20)
    shown = int((day - timedelta(days=days_before)).timestamp())
    out: list[int] = []
    while len(out) < count:
        if datetime.fromtimestamp(shown, UTC).weekday() < 5 and rng.random() > 0.05:
            out.append(shown - _offset(source, shown - 7_200))
        shown += step
    return out


def _around(rng: random.Random, opened: float, close: float) -> Values:
    high = round(max(opened, close) * (1 + rng.random() * 1e-4), 5)
    low = round(min(opened, close) * (1 - rng.random() * 1e-4), 5)
    return (
        opened,
        max(high, opened, close),
        min(low, opened, close),
        close,
        float(rng.randrange(1, 300)),
        float(rng.randrange(1, 25)),
    )


def _wrong(rng: random.Random, values: Values) -> Values:
    """Other values of the same bar: valid, and never a jump."""
    return _around(rng, values[0], round(values[3] * (1 + rng.choice((-1, 1)) * rng.uniform(1e-4, 2e-3)), 5))


def _versions(
    rng: random.Random, end: int, values: Values, step: int, kinds: Collection[str]
) -> tuple[tuple[int, Values], ...]:
    soon, later = sorted(end + step * n for n in rng.sample(range(1, 7), 2))
    if "taken_back" in kinds and rng.random() < 0.12:
        return (end, values), (soon, _wrong(rng, values)), (later, values)
    if "corrections" in kinds and rng.random() < 0.15:
        return (end, _wrong(rng, values)), (soon, values)
    return ((end, values),)


def _clean(series: Series) -> list[Post]:
    """The history in one payload and the live bars in the next, in UTC, from one terminal."""
    out: list[Post] = []
    for bars, history in ((series.bars[: series.history], True), (series.bars[series.history :], False)):
        if not bars:
            continue
        payload: dict[str, Any] = {"symbol": series.symbol, "timeframe": series.timeframe, "history": history}
        payload["replay"] = series.mode in ("replay", "timed")
        # UTC says nothing of a broker's days: their bars come in its time, converted by the rule of a source of its own.
        shift = series.timeframe in LONG and series.clocked
        if shift:
            payload["source"] = _clean_source(series)
        payload["candles"] = [
            _candle(bar.ts + (_offset(series.owner, bar.ts) if shift else 0), bar.truth) for bar in bars
        ]
        out.append(Post(json.dumps(payload).encode(), {}, tuple(range(len(out))), "clean"))
    return out


def _clean_source(series: Series) -> str:
    return f"Clean {_zone(series.owner)}"


def _candle(time: int | str, values: Values, volume: str = "volume") -> dict[str, Any]:
    opened, high, low, close, amount, spread = values
    return {
        "time": time,
        "open": opened,
        "high": high,
        "low": low,
        "close": close,
        volume: int(amount),
        "spread": int(spread),
    }


# --- the hostile feed --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """Bars as a terminal shows them at ``moment``; ``place`` orders the deliveries.

    ``forming`` is a bar that is not over at the moment, with its values so far.
    """

    moment: int
    bars: tuple[int, ...]  # places in the series, ascending
    place: float
    note: str = ""
    own: bool = True  # of the terminal that owns the series
    history: bool = False
    forming: tuple[int, Values] | None = None
    regret: bool = False  # the second terminal's other values for what it filled


class _Hostile:
    """Makes one series' hostile posts."""

    def __init__(self, rng: random.Random, series: Series, now: int | None) -> None:
        self.rng = rng
        self.series = series
        self.bars = series.bars
        self.kinds = series.kinds
        self.now = now
        self.live = range(series.history, len(series.bars))
        # New York and Europe change in different weeks: who has not heard the clock between cannot tell whose it is.
        self.between = _between(series.change)
        self.needs_between = any(bar.ts < self.between.stop and bar.end > self.between.start for bar in series.bars)
        self.held = self._held_back()
        self.foreign = self._foreign() - self.held
        # What the other terminal shows for a bar of the owner's; for a bar that the owner never shows, the truth.
        self.beside = [bar.truth if i in self.foreign else _wrong(rng, bar.truth) for i, bar in enumerate(series.bars)]

    def posts(self) -> list[Post]:
        """Every delivery, in an order in which each comes after what it has to follow."""
        waiting = sorted(self._snapshots(), key=lambda snapshot: snapshot.place)
        shown = {version for snapshot in waiting for version in self._versions(snapshot)}
        first: dict[Any, int] = {}  # what a post shows first: (bar, version), or what _shows names
        before = {id(snapshot): self._before(snapshot, shown) for snapshot in waiting}
        out: list[Post] = []
        while waiting:
            snapshot = next(s for s in waiting if before[id(s)] <= first.keys())
            waiting.remove(snapshot)
            after = sorted({first[version] for version in before[id(snapshot)]})
            for what in (*self._versions(snapshot), *self._shows(snapshot)):
                first.setdefault(what, len(out))
            out.append(self._post(snapshot, tuple(after)))
        return out

    def _versions(self, snapshot: _Snapshot) -> list[tuple[int, int]]:
        return [(i, self.bars[i].version(snapshot.moment)) for i in snapshot.bars] if snapshot.own else []

    def _shows(self, snapshot: _Snapshot) -> list[Any]:
        """What else others may have to follow: the owner's first live word, a fill, the clock before its change."""
        if snapshot.own:
            owns = [] if snapshot.history or not snapshot.bars else ["owner"]
            owns += ["between"] if self._is_between(snapshot.moment) else []
            return [*owns, "summer"] if self._is_before_change(snapshot.moment) else owns
        return [] if snapshot.regret else [("fill", i) for i in snapshot.bars]

    def _before(self, snapshot: _Snapshot, shown: Collection[tuple[int, int]]) -> set[Any]:
        """What a snapshot must follow: without a clock the older versions, since only the log orders them."""
        out: set[Any] = set()
        if not self.series.clocked:
            out |= {(i, n) for i, version in self._versions(snapshot) for n in range(version)} & set(shown)
        if not snapshot.own and ("unranked" in self.kinds or snapshot.regret):
            out.add("owner")
        if snapshot.regret:
            out |= {("fill", i) for i in snapshot.bars}
        if "fields" in self.kinds and snapshot.own and not self._is_before_change(snapshot.moment):
            # From after the change alone nobody can tell what the clock had shown before.
            out |= {"summer" for i in snapshot.bars if self._is_before_change(self.bars[i].ts)}
        if "fields" in self.kinds and snapshot.own and self.needs_between and snapshot.moment >= self.between.stop:
            out |= {"between" for i in snapshot.bars if self.bars[i].ts < self.between.stop}
        return out

    def _is_between(self, moment: int) -> bool:
        return moment in self.between

    def _is_before_change(self, moment: int) -> bool:
        return self.series.change is not None and moment < self.series.change

    # --- what the terminals show -----------------------------------------------------------------------------------

    def _held_back(self) -> set[int]:
        """Bars that come long after their successors: runs in the middle, and the series' first."""
        held: set[int] = set()
        if "gaps" in self.kinds:
            for _ in range(self.rng.randrange(1, 4)):
                start = self.rng.randrange(8, len(self.bars) - 6)
                held |= set(range(start, start + self.rng.choice((1, 1, 4))))
        if "before_first" in self.kinds:
            held |= set(range(self.rng.randrange(1, 6)))
        return held

    def _foreign(self) -> set[int]:
        """Bars that only the other terminal has."""
        return set(self.rng.sample(self.live[7:], 3)) if "sources" in self.kinds else set()

    def _snapshots(self) -> list[_Snapshot]:
        live = self._as_they_close()
        span = float(len(live))
        live += self._corrections(span)
        if "sources" in self.kinds:
            live += self._second_terminal(span)
        if "running" in self.kinds and self.series.mode == "plain" and self.now is not None:
            live += self._running(span, self.now)
        live += [self._late(run, span) for run in self._runs()]
        live += self._repeated(live)
        if "reorder" in self.kinds:
            live = [replace(s, place=s.place + self.rng.uniform(0, REORDER)) for s in live]
        told = [part for one in self._history() + live for part in self._unambiguous(one)]
        told += self._last_word(told)
        if "fields" in self.kinds and not any(one.own and self._is_before_change(one.moment) for one in told):
            bar = self.bars[0]
            told.append(_Snapshot(bar.ts, (), FIRST, "before the change", forming=(0, self._partial(bar, bar.ts))))
        if (
            "fields" in self.kinds
            and self.needs_between
            and not any(one.own and self._is_between(one.moment) for one in told)
        ):
            told.append(self._heard_between())
        return told

    def _heard_between(self) -> _Snapshot:
        """One look at the clock between the two families' changes: the newest bar then, still forming."""
        i, bar = next((i, bar) for i, bar in enumerate(self.bars) if bar.end > self.between.start)
        moment = max(bar.ts, self.between.start)
        return _Snapshot(moment, (), FIRST, "between the changes", forming=(i, self._partial(bar, moment)))

    def _unambiguous(self, snapshot: _Snapshot) -> list[_Snapshot]:
        """For a while after its clock was set back, a terminal cannot show bars of before: they are told hours later."""
        change = self.series.change
        if "nonstop" not in self.kinds or change is None or not change <= snapshot.moment < change + AMBIGUOUS:
            return [snapshot]
        earlier = tuple(i for i in snapshot.bars if self.bars[i].ts < change)
        later = tuple(i for i in snapshot.bars if i not in earlier)
        out = [replace(snapshot, bars=later)] if later or snapshot.forming is not None else []
        if earlier:
            out.append(replace(snapshot, moment=snapshot.moment + AMBIGUOUS + 3_600, bars=earlier, forming=None))
        return out

    def _running(self, span: float, now: int) -> list[_Snapshot]:
        """A bar that our clock alone tells to be forming; none where it might be over before it is sent."""
        step = MINUTES[self.series.timeframe] * 60
        count = self.rng.randrange(1, 3)
        if step - now % step < LEFT:
            return []
        forming = (RUNNING, self.bars[-1].truth)
        places = [self.rng.uniform(0, span) for _ in range(count)]
        return [_Snapshot(self.bars[-1].end, (), place, "running", forming=forming) for place in places]

    def _history(self) -> list[_Snapshot]:
        bars = tuple(i for i in range(self.series.history) if i not in self.held)
        if not bars:
            return []
        cut = self.rng.randrange(1, len(bars)) if "recut" in self.kinds else len(bars)
        moment = self.bars[self.series.history].ts
        parts = (bars[:cut], bars[max(0, cut - 5) :] if cut < len(bars) else ())
        return [_Snapshot(moment, part, FIRST + i, "history", history=True) for i, part in enumerate(parts) if part]

    def _as_they_close(self) -> list[_Snapshot]:
        """The newest bars after every few closes, and between two closes the bar that forms."""
        shown = [i for i in self.live if i not in self.held | self.foreign]
        out: list[_Snapshot] = []
        at = 0
        while at < len(shown):
            step = min(self.rng.choice((1, 1, 2, 3)), len(shown) - at)
            at += step
            newest = self.bars[shown[at - 1]]
            bars = tuple(shown[max(0, at - step - self.rng.randrange(3)) : at])
            out.append(_Snapshot(newest.end + self.rng.randrange(3), bars, float(len(out)), "close"))
            if "forming" in self.kinds and at < len(shown):
                bar = self.bars[shown[at]]
                for moment in sorted(self.rng.sample(range(bar.ts, bar.end), self.rng.randrange(3))):
                    forming = (shown[at], self._partial(bar, moment))
                    out.append(_Snapshot(moment, bars[-1:], float(len(out)), "forming", forming=forming))
        return out

    def _partial(self, bar: Bar, moment: int) -> Values:
        opened, high, low, close, volume, spread = bar.versions[0][1]
        share = (moment - bar.ts + 1) / (bar.end - bar.ts + 1)
        now = round(opened + (close - opened) * share + self.rng.gauss(0, (high - low) / 20), 5)
        return opened, max(opened, now, high), min(opened, now, low), now, float(max(1, int(volume * share))), spread

    def _corrections(self, span: float) -> list[_Snapshot]:
        """Each later version of a bar, once it stands, beside its neighbours as they are then."""
        out = []
        for i in self.live:
            for since, _ in self.bars[i].versions[1:]:
                around = range(max(self.series.history, i - 1), min(i + 2, len(self.bars)))
                bars = tuple(k for k in around if self.bars[k].end <= since and k not in self.held | self.foreign)
                if i in bars:
                    out.append(_Snapshot(since, bars, self._place(since, span), "correction"))
        return out

    def _second_terminal(self, span: float) -> list[_Snapshot]:
        out = []
        for start in self.live[::6]:
            bars = tuple(range(start, min(start + 6, len(self.bars))))
            moment = self.bars[bars[-1]].end + self.rng.randrange(9)
            out.append(_Snapshot(moment, bars, self._place(moment, span) + self.rng.uniform(-4, 4), "other", own=False))
        if "regret" in self.kinds:
            for i in sorted(self.foreign):
                moment = self.bars[i].end + self.rng.randrange(9, 3_600)
                out.append(_Snapshot(moment, (i,), self._place(moment, span), "regret", own=False, regret=True))
        return out

    def _place(self, moment: int, span: float) -> float:
        """Where in the order of delivery a snapshot of this moment would stand."""
        return span * sum(self.bars[i].end <= moment for i in self.live) / len(self.live)

    def _runs(self) -> list[list[int]]:
        """The bars that were held back, in runs that are all history or all live."""
        runs: list[list[int]] = []
        for i in sorted(self.held):
            if runs and runs[-1][-1] == i - 1 and i != self.series.history:
                runs[-1].append(i)
            else:
                runs.append([i])
        return runs

    def _late(self, run: list[int], span: float) -> _Snapshot:
        moment = max(self.bars[-1].end, *(self.bars[i].settled for i in run)) + 5
        place = span + self.rng.uniform(0, 4) if run[0] == 0 else self.rng.uniform(span / 2, span)
        return _Snapshot(moment, tuple(run), place, "late", history=run[-1] < self.series.history)

    def _repeated(self, snapshots: Sequence[_Snapshot]) -> list[_Snapshot]:
        """Repeats, whole, and cut anew as after a 503."""
        out = []
        for one in snapshots:
            if "duplicates" in self.kinds and self.rng.random() < 0.15:
                out.append(replace(one, place=one.place + self.rng.uniform(0.1, 12), note=f"{one.note} again"))
            if "recut" in self.kinds and len(one.bars) > 1 and one.forming is None and self.rng.random() < 0.2:
                cut = self.rng.randrange(1, len(one.bars))
                parts = (one.bars[:cut], one.bars[cut - 1 :])
                out += [replace(one, bars=part, place=one.place + 0.5, note=f"{one.note} recut") for part in parts]
        return out

    def _last_word(self, snapshots: Sequence[_Snapshot]) -> list[_Snapshot]:
        """What no snapshot showed as it ended up."""
        said = {i for s in snapshots if s.own for i in s.bars if s.moment >= self.bars[i].settled}
        bars = tuple(i for i in self.live if i not in said | self.foreign)
        if not bars:
            return []
        return [_Snapshot(max(self.bars[i].settled for i in bars) + 9, bars, LAST, "last word")]

    # --- bytes -----------------------------------------------------------------------------------------------------

    def _post(self, snapshot: _Snapshot, after: tuple[int, ...]) -> Post:
        rng, series = self.rng, self.series
        varied = "shapes" in self.kinds
        volume = rng.choice(("volume", "tick_volume")) if varied else "volume"
        spell = rng.choice((_seconds, _milliseconds, _text)) if varied else _seconds
        source = series.owner if snapshot.own else series.other
        clock = series.clocked
        rows = []
        for i in snapshot.bars:
            bar = self.bars[i]
            values = bar.versions[bar.version(snapshot.moment)][1] if snapshot.own else self.beside[i]
            if snapshot.regret:
                values = _wrong(rng, values)
            rows.append(_candle(self._time(bar.ts, source, spell), values, volume))
            if self.kinds & {"forming", "running"} and not clock:
                rows[-1]["closed"] = True  # such a sender closes a bar only by its word, a later bar or its clock
        unsaid: tuple[tuple[str, str, int], ...] = ()
        if snapshot.forming is not None:
            i, values = snapshot.forming
            if i == RUNNING and self.now is not None:
                step = MINUTES[series.timeframe] * 60
                rows.append(_candle(self.now // step * step, values, volume))
            else:
                rows.append(_candle(self._time(self.bars[i].ts, source, spell), values, volume))
                if not clock or rng.random() < 0.3:
                    rows[-1]["closed"] = False
                else:
                    unsaid = ((*series.key, self.bars[i].ts),)
        if varied and rng.random() < 0.2:
            rng.shuffle(rows)
        beside: dict[str, Any] = {"source": source} if clock or "sources" in self.kinds else {}
        if clock:
            # The two clocks are not read in the same instant; one of a terminal that lags is up to minutes behind.
            beside["server_time"] = snapshot.moment + _offset(source, snapshot.moment)
            # A replay is judged by it to the second.
            beside["gmt_time"] = snapshot.moment + (rng.randrange(-2, 3) if series.mode == "clock" else 0)
        if snapshot.history:
            beside["history"] = True
        if series.mode in ("replay", "timed"):
            beside["replay"] = True
        body = json.dumps(self._shape(rows, beside, varied), ensure_ascii=rng.random() < 0.5).encode()
        headers = {"Content-Type": "application/json"}
        if varied and rng.random() < 0.3:
            body += b"\0"
        if "gzip" in self.kinds and rng.random() < 0.3:
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        return Post(
            body,
            headers,
            after,
            f"{snapshot.note} at {snapshot.moment}",
            () if snapshot.history else tuple((*series.key, self.bars[i].ts) for i in snapshot.bars),
            unsaid,
            snapshot.moment if series.mode == "timed" else None,
            tuple({"symbol": series.symbol, "timeframe": series.timeframe} | row for row in rows),
            beside,
        )

    def _time(self, ts: int, source: str, spell: Callable[[int], int | str]) -> int | str:
        return spell(ts + _offset(source, ts) if self.series.clocked else ts)

    def _shape(self, rows: list[dict[str, Any]], beside: dict[str, Any], varied: bool) -> Any:
        timeframe = self.series.timeframe
        if varied and self.rng.random() < 0.4:
            timeframe = SPELLINGS[timeframe]
        named = {"symbol": self.series.symbol, "timeframe": timeframe}
        shape = self.rng.choice(("candles", "interval", "items", "array")) if varied else "candles"
        if shape == "candles":
            return named | beside | {"candles": rows}
        if shape == "interval":
            return {"symbol": self.series.symbol, "interval": timeframe} | beside | {"candles": rows}
        items = [named | row for row in rows]
        if shape == "items" or beside:
            return beside | {"items": items}
        return items[0] if len(items) == 1 else items


def _seconds(ts: int) -> int:
    return ts


def _milliseconds(ts: int) -> int:
    return ts * 1_000


def _text(ts: int) -> str:
    return f"{datetime.fromtimestamp(ts, UTC):%Y-%m-%dT%H:%M:%S}Z"  # server time too: EAs append the Z
