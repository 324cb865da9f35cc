"""What a sender's payload holds: its candles read and checked, each forming, closed or rejected with its reason.

Pure: the payload, what is known of its series and the time go in; decisions come out. The rules are those of MT5's
candles: a bar's time is its open time, and only a bar whose time is over enters the stream.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType

from actors.core.clock import AS_UTC, Conversion
from actors.core.timeframe import from_epoch
from schema.messages import Candle, FeatureRow, IngestCandle
from schema.settings import Symbol
from schema.timeframes import SECONDS, TIMEFRAMES, canonical

RECENT: Final = 64  # newest bars of a series whose values are remembered to count duplicates
BELIEVED: Final = 5.0  # seconds that our clock may be behind a bar's end for "closed": true to be believed
AHEAD: Final = 300.0  # seconds that a payload's clock may be ahead of ours for it to close bars; more is an alert
JUMP: Final = 2.0  # a high above twice, or a low under half, of the previous close is a jump
AGREE: Final = 3  # bars in a row that agree make a jump a split
REACH: Final = 5_000  # bars after which a known close says nothing of an older bar whose own predecessor is unknown
SOURCES: Final = 16  # sources of which a bar's versions, or forming bars of a series, are remembered
ANONYMOUS: Final = ""
REPLAYED: Final = "~replay"  # a replay that names no source: never the owner
SYMBOL_BYTES: Final = 64
NESTED: Final = 100  # objects and arrays in one field that are kept as such where a candle is rejected
VOLUME_LIMIT: Final = 2.0**63
LATEST: Final = 253_402_300_799  # the end of the year 9999
MILLISECONDS_FROM: Final = 100_000_000_000  # epoch seconds reach this in the year 5138


class Rejection(NamedTuple):
    """A candle that is not taken: where it stands in the payload, why, and the reason's name among the metrics."""

    place: int
    error: str
    code: str


class Refusal(ValueError):
    """A candle breaks a rule; the message is the reason shown to the sender, ``code`` its name among the metrics."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class PayloadError(Exception):
    """The payload as a whole is not one of the accepted shapes."""


class Envelope(Struct, frozen=True, kw_only=True):
    """A payload of several candles: what stands beside them applies to all."""

    items: list[IngestCandle] | None = None
    candles: list[IngestCandle] | None = None
    symbol: str | None = None
    timeframe: str | None = None
    interval: str | None = None
    source: str | None = None
    server_time: int | float | None = None
    gmt_time: int | float | None = None
    history: bool = False
    replay: bool = False
    point: float | None = None
    open: float | UnsetType = UNSET


class Payload(Struct, frozen=True):
    """A payload taken apart: candles by index, or the reason why one could not be read."""

    candles: list[IngestCandle | str]
    raw: Any
    symbol: str | None
    timeframe: str | None
    source: str | None
    server_time: int | None
    gmt_time: int | None
    history: bool
    replay: bool
    point: float | None = None

    @property
    def origin(self) -> str:
        """The source as versions are told apart by it; a replay that names none is a source of its own."""
        return self.source or (REPLAYED if self.replay else ANONYMOUS)


class Checked(Struct, frozen=True):
    """A candle whose own values are in order; ``sent`` is its open time in the sender's clock."""

    index: int
    symbol: str
    timeframe: str
    sent: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    spread: float
    real_volume: float
    closed: bool | None


class Bar(Struct, frozen=True):
    """A candle of a payload that passed every check, in UTC; ``end`` is the next step of its grid."""

    index: int
    symbol: str
    timeframe: str
    ts: int
    end: int
    candle: Candle
    closed: bool | None


class Version(NamedTuple):
    """What a source last said of a bar. ``changed``: it has told (or tried to tell) other values of it before."""

    mark: int
    clock: int | None
    changed: bool = False


class Known(Struct):
    """A closed bar as the gateway remembers it: its close, and the last version that each source sent."""

    close: float
    versions: dict[str, Version] = {}  # by source, the one heard longest ago first


class Close(NamedTuple):
    """A closed bar's open time and its close."""

    ts: int
    price: float


class Jump(NamedTuple):
    """A bar that was refused because its price jumps."""

    ts: int
    low: float
    high: float


class Series(Struct):
    """What the gateway knows of a series: its newest closed bar and the versions of its newest bars."""

    last_ts: int | None = None
    last_close: float | None = None
    forming_by: list[str] = []  # sources that have sent forming bars
    recent: dict[int, Known] = {}
    jumps: list[Jump] = []  # the last two bars that jumped, each once

    def remember(self, rows: Sequence[Candle], source: str, server_time: int | None) -> None:
        """Takes rows that the stream has acknowledged, ascending: of many, only the newest are worth a fingerprint."""
        for row in rows[-RECENT:]:
            ts = int(row.ts.timestamp())
            known = self.recent.setdefault(ts, Known(row.close))
            known.close = row.close
            mark = digest(row)
            last = known.versions.pop(source, None)
            known.versions[source] = Version(
                mark, server_time, last is not None and (last.changed or last.mark != mark)
            )
            if len(known.versions) > SOURCES:
                del known.versions[next(iter(known.versions))]
            if self.last_ts is None or ts >= self.last_ts:
                self.last_ts, self.last_close = ts, row.close
        while len(self.recent) > RECENT:
            del self.recent[min(self.recent)]
        if self.jumps and rows:  # what was refused before a bar that was taken is in one row with nothing after it
            newest = int(rows[-1].ts.timestamp())
            self.jumps = [jump for jump in self.jumps if jump.ts > newest]

    def effect(self, ts: int, source: str, mark: int, server_time: int | None) -> str:
        """What a version of a bar does: ``new``, ``repeat`` (nothing), or ``confirm``.

        A repeat with a newer clock makes what is older than it stale. As long as the bar has had no other values it is
        remembered here only, since terminals repeat their newest bars all the time; else the stream has to know it too,
        or an older correction that is still under way would win after a restart.
        """
        known = self.recent.get(ts)
        last = known.versions.get(source) if known is not None else None
        if known is None or last is None:
            return "new"
        if last.mark == mark:
            if server_time is None or (last.clock is not None and server_time <= last.clock):
                return "repeat"
            if last.changed:
                return "confirm"
            known.versions[source] = Version(mark, server_time)
            return "repeat"
        if server_time is not None and last.clock is not None and server_time < last.clock:
            known.versions[source] = last._replace(changed=True)
            return "repeat"
        return "new"

    def before(self, ts: int) -> Close | None:
        """Of the newest known bar before ``ts``."""
        if self.last_ts is not None and self.last_close is not None and ts > self.last_ts:
            return Close(self.last_ts, self.last_close)
        at = max((t for t in self.recent if t < ts), default=None)
        return Close(at, self.recent[at].close) if at is not None else None

    def after(self, ts: int) -> Close | None:
        """Of the oldest known bar after ``ts``."""
        at = min((t for t in self.recent if t > ts), default=None)
        return Close(at, self.recent[at].close) if at is not None else None

    def saw_forming(self, source: str) -> None:
        if source not in self.forming_by:
            self.forming_by = [*self.forming_by[1 - SOURCES :], source]

    def refused(self, jump: Jump) -> None:
        """Notes a bar that jumped; the same bar again is no other one."""
        self.jumps = [*(known for known in self.jumps if known.ts != jump.ts), jump][1 - AGREE :]


class Judged(Struct):
    """A payload's outcome before anything is published. ``layers`` hold ascending rows by series; a second layer
    holds other values for bars of the first (corrections in one payload). ``confirmed`` are duplicates that the stream
    has to know of. ``unsure`` names refused jumps (series and open time) whose own predecessor is not known here."""

    layers: dict[tuple[str, str], list[list[Candle]]]
    forming: list[Bar]
    duplicates: int
    rejected: list[Rejection]
    confirmed: dict[tuple[str, str], list[Candle]] = {}
    unsure: list[tuple[tuple[str, str], int]] = []


_LIST: Final = msgspec.json.Decoder(list[IngestCandle])
_ENVELOPE: Final = msgspec.json.Decoder(Envelope)
_ANY: Final = msgspec.json.Decoder()
_RAW_LIST: Final = msgspec.json.Decoder(list[msgspec.Raw])
_RAW_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def digest(row: Candle | FeatureRow) -> int:
    """A 64-bit fingerprint of a bar's values."""
    values = struct.pack("<7d", row.open, row.high, row.low, row.close, row.volume, row.spread, row.real_volume)
    return int.from_bytes(blake2b(values, digest_size=8).digest(), "little")


def digest_text(row: Candle | FeatureRow) -> str:
    """:func:`digest` of a row's candle in hex, as it travels beside a signal and is archived with it."""
    return f"{digest(row):016x}"


def block_id(symbol: str, timeframe: str, rows: Iterable[Candle], server_time: int | None) -> str:
    """A message id that hashes series, candle values and the payload's clock, never the time of receipt."""
    h = blake2b(f"{symbol}\0{timeframe}\0{server_time}".encode(), digest_size=16)
    for r in rows:
        h.update(
            struct.pack("<8d", r.ts.timestamp(), r.open, r.high, r.low, r.close, r.volume, r.spread, r.real_volume)
        )
    return h.hexdigest()


def read(body: bytes) -> Payload:
    """Takes a JSON body apart: one candle, an array, ``items`` or ``candles``.

    Raises:
        msgspec.DecodeError: the body is not JSON.
        PayloadError: the body is JSON, but none of the accepted shapes.
    """
    try:
        if body[:1] == b"[" or body.lstrip()[:1] == b"[":
            return _payload(_LIST.decode(body), Envelope(), None)
        envelope = _ENVELOPE.decode(body)
        rows = envelope.items if envelope.items is not None else envelope.candles
        if rows is not None and envelope.open is UNSET:
            return _payload(rows, envelope, None)
    except msgspec.ValidationError:
        pass
    # Something does not fit: read it loosely and say for each candle what is wrong.
    return _read_loosely(_ANY.decode(body))


def _payload(rows: Sequence[IngestCandle | str], envelope: Envelope, raw: Any) -> Payload:
    source = envelope.source
    if source is not None and (len(source.encode()) > SYMBOL_BYTES or not source.isprintable()):
        raise PayloadError(f"source must be at most {SYMBOL_BYTES} printable bytes: name the broker's server.")
    for name, clock in (("server_time", envelope.server_time), ("gmt_time", envelope.gmt_time)):
        if clock is not None and not 0 <= clock <= LATEST:
            raise PayloadError(f"{name} must be epoch seconds, as TimeTradeServer() and TimeGMT() give them.")
    return Payload(
        list(rows),
        raw,
        envelope.symbol,
        envelope.timeframe or envelope.interval,
        envelope.source,
        None if envelope.server_time is None else int(envelope.server_time),
        None if envelope.gmt_time is None else int(envelope.gmt_time),
        envelope.history,
        envelope.replay,
        envelope.point if envelope.point is not None and 0 < envelope.point < math.inf else None,
    )


def _read_loosely(value: Any) -> Payload:
    if isinstance(value, list):
        return _payload([_candle(item) for item in value], Envelope(), value)
    if not isinstance(value, dict):
        raise PayloadError("The body is neither a candle, an array of candles, nor an object with items or candles.")
    items = _rows(value)
    if items is None:
        items, one = [value], True
        if not {"open", "close", "ts", "time"} & value.keys():
            raise PayloadError("The body holds no candle: send one, an array, or an object with items or candles.")
    else:
        one = False
    if not isinstance(items, list):
        raise PayloadError("items (or candles) must be an array of candles.")
    names = ("symbol", "timeframe", "interval", "source", "server_time", "gmt_time", "history", "replay", "point")
    try:
        envelope = msgspec.convert({k: value[k] for k in names if value.get(k) is not None}, Envelope)
    except msgspec.ValidationError as error:
        if not one:
            raise PayloadError(f"Beside the candles: {_plain(error)}.") from error
        envelope = Envelope()
    return _payload([_candle(item) for item in items], envelope, items)


def _rows(value: Mapping[str, Any]) -> Any:
    """What counts as an object's candles: ``items`` unless it is absent or null, else ``candles``; None: neither."""
    items = value.get("items")
    return items if items is not None else value.get("candles")


def whole(body: bytes) -> tuple[dict[str, Any], list[Any]]:
    """A payload as it was sent: what stands beside the candles, and the candles, unknown fields included.

    It is as :func:`read` took it. What read passed over because it knows no such field, and what could not be read
    again, is given as its text: a number that no float can hold, and arrays in arrays without end.
    """
    if body.lstrip()[:1] == b"[":
        return {}, [_value(item) for item in _RAW_LIST.decode(body)]
    fields = _RAW_FIELDS.decode(body)
    rows = _rows({name: raw for name, raw in fields.items() if bytes(raw) != b"null"})
    if rows is None or bytes(rows)[:1] != b"[":
        names = {"source", "server_time", "gmt_time", "history", "replay"}
        one = {name: _value(raw) for name, raw in fields.items()}
        return {name: one[name] for name in names if name in one}, [one]
    beside = {name: _value(raw) for name, raw in fields.items() if name not in ("items", "candles")}
    return beside, [_value(item) for item in _RAW_LIST.decode(rows)]


def _value(raw: msgspec.Raw) -> Any:
    text = bytes(raw)
    try:
        if text.count(b"[") + text.count(b"{") <= NESTED:
            return _ANY.decode(text)
    except msgspec.ValidationError:
        pass
    return text.decode()


def _candle(item: Any) -> IngestCandle | str:
    try:
        return msgspec.convert(item, IngestCandle)
    except msgspec.ValidationError as error:
        return _plain(error)


def _plain(error: msgspec.ValidationError) -> str:
    text, _, path = str(error).partition(" - at `$")
    where = path.strip("`.")
    return f"{where}: {text}" if where else text


def parse_time(value: str | int | float | None) -> int:
    """RFC 3339, epoch seconds or epoch milliseconds as epoch seconds; without a zone a time is taken as UTC.

    Raises:
        Refusal: not a time.
    """
    if value is None:
        raise Refusal("missing", "ts (or time) is missing")
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            raise Refusal(
                "time", f"ts {value[:40]!r} is neither RFC 3339 (2025-02-13T01:33:00Z) nor an epoch number"
            ) from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = moment.timestamp()
    else:
        seconds = value / 1000 if abs(value) >= MILLISECONDS_FROM else float(value)
    if not seconds.is_integer():
        raise Refusal("time", "ts is not a whole second: bars open on whole minutes")
    if seconds < 0:
        raise Refusal("before_1970", "ts is before 1970")
    if seconds > LATEST:
        raise Refusal("time", "ts is after the year 9999")
    return int(seconds)


def check(candle: IngestCandle, index: int, payload: Payload, symbols: Mapping[str, Symbol]) -> Checked:
    """One candle checked by itself.

    Raises:
        Refusal: the candle breaks a rule.
    """
    symbol = candle.symbol if candle.symbol is not None else payload.symbol
    if not symbol:
        raise Refusal("symbol", "symbol is missing or empty")
    if len(symbol.encode(errors="surrogatepass")) > SYMBOL_BYTES:
        raise Refusal("symbol", f"symbol is longer than {SYMBOL_BYTES} bytes")
    if not symbol.isprintable() or symbol != symbol.strip():
        raise Refusal("symbol", "symbol has control characters or outer spaces")
    named = candle.timeframe or candle.interval or payload.timeframe
    if named is None:
        raise Refusal("timeframe", "timeframe is missing")
    timeframe = canonical(named)
    if timeframe is None:
        raise Refusal("timeframe", f"timeframe {named[:20]!r} is unknown: use one of {', '.join(TIMEFRAMES)}")
    ts = parse_time(candle.ts if candle.ts is not None else candle.time)
    o, h, lo, c = candle.open, candle.high, candle.low, candle.close
    for name, price in (("open", o), ("high", h), ("low", lo), ("close", c)):
        if not math.isfinite(price):
            raise Refusal("price", f"{name} is not finite")
        if price <= 0.0 and not ((known := symbols.get(symbol)) and known.allow_non_positive):
            raise Refusal("price", f"{name} {price} is not positive")
    if h < o or h < c:
        raise Refusal("high_low", f"high {h} is below open or close")
    if lo > o or lo > c:
        raise Refusal("high_low", f"low {lo} is above open or close")
    volume = candle.tick_volume if candle.tick_volume is not UNSET else candle.volume
    if volume is UNSET:
        raise Refusal("missing", "volume (or tick_volume) is missing")
    spread = candle.spread or 0.0
    real = candle.real_volume or 0.0
    for name, amount in (("volume", volume), ("spread", spread), ("real_volume", real)):
        if amount < 0:
            raise Refusal("amount", f"{name} is negative")
        if not amount < VOLUME_LIMIT:
            raise Refusal("amount", f"{name} is not below 2^63")
    return Checked(
        index,
        symbol,
        timeframe,
        ts,
        o,
        h,
        lo,
        c,
        float(volume),
        float(spread),
        float(real),
        candle.closed,
    )


def place(checked: Checked, clock: Conversion) -> Bar:
    """A checked candle in UTC, its grid tested in the clock that its bars follow.

    Raises:
        Refusal: the bar lies off its timeframe's grid.
    """
    sent, timeframe = checked.sent, checked.timeframe
    placed = clock.bar(sent, timeframe)
    if placed is None:
        raise Refusal("off_grid", f"ts {from_epoch(sent):%Y-%m-%dT%H:%M:%SZ} is off the grid of {timeframe}")
    ts, end = placed
    if ts < 0:
        raise Refusal("before_1970", "ts is before 1970")
    row = Candle(
        ts=from_epoch(ts),
        open=checked.open,
        high=checked.high,
        low=checked.low,
        close=checked.close,
        volume=checked.volume,
        spread=checked.spread,
        real_volume=checked.real_volume,
    )
    return Bar(checked.index, checked.symbol, timeframe, ts, end, row, checked.closed)


def _jumps(candle: Candle, base: float) -> bool:
    """Whether a price lies over twice or under half of the close before; only positive prices have such a ratio."""
    return base > 0.0 and (candle.high > JUMP * base or 0.0 < candle.low < base / JUMP)


class _Runs:
    """Which bars of a series follow each other, as far as a payload and the jumps before it tell: for the split rule.

    Bars of the payload count once, and only those that are closed; it is built when the first bar jumps.
    """

    def __init__(self, closed: Iterable[Bar], known: Series) -> None:
        ranges = {jump.ts: jump for jump in known.jumps}
        ranges |= {bar.ts: Jump(bar.ts, bar.candle.low, bar.candle.high) for bar in closed}
        self._times = sorted(ranges)
        self._ranges = ranges
        self._known = sorted(ts for ts in known.recent if ts not in ranges)

    def is_split(self, jump: Jump) -> bool:
        """Whether three bars in a row agree, this one among them: every price within a factor of two of every other."""
        at = bisect_left(self._times, jump.ts)
        for start in range(max(at - AGREE + 1, 0), min(at + 1, len(self._times) - AGREE + 1)):
            times = self._times[start : start + AGREE]
            if bisect_left(self._known, times[0]) != bisect_left(self._known, times[-1]):
                continue  # a bar that is known stands between them
            bars = [jump if ts == jump.ts else self._ranges[ts] for ts in times]
            if max(bar.high for bar in bars) <= JUMP * min(bar.low for bar in bars):
                return True
        return False


class CheckedPayload(Struct):
    """A payload's candles by themselves: those in order, those rejected, and the times as sent, by series."""

    good: list[Checked]
    rejected: list[Rejection]
    sent: dict[tuple[str, str], list[int]]
    points: dict[str, float] = {}  # by symbol, where the sender says it


def check_payload(payload: Payload, symbols: Mapping[str, Symbol]) -> CheckedPayload:
    """Checks each candle by itself; what the sender's times mean is for its clock to say."""
    out = CheckedPayload([], [], {})
    for index, candle in enumerate(payload.candles):
        if isinstance(candle, str):
            out.rejected.append(Rejection(index, candle, "type"))
            continue
        try:
            checked = check(candle, index, payload, symbols)
        except Refusal as error:
            out.rejected.append(Rejection(index, str(error), error.code))
            continue
        out.good.append(checked)
        point = candle.point if candle.point is not None else payload.point
        if point is not None and 0 < point < math.inf:
            out.points[checked.symbol] = point
        out.sent.setdefault((checked.symbol, checked.timeframe), []).append(checked.sent)
    return out


def judge(
    payload: Payload,
    checked: CheckedPayload,
    now: float,
    series: Mapping[tuple[str, str], Series],
    symbols: Mapping[str, Symbol],
    conversion: Conversion = AS_UTC,
    bases: Mapping[tuple[tuple[str, str], int], Close] = {},
) -> Judged:
    """Decides what each candle of a payload is. ``now`` is our clock (epoch seconds).

    ``series`` holds what is known of the payload's series (missing: nothing). It is not changed, but for
    ``forming_by``, ``jumps`` and confirmed clocks, which describe the sender and not the stream, so that the same may be
    judged again. ``conversion`` says what the sender's times mean; ``bases`` the close before a bar (series and open
    time) where somebody else knows it. ``symbols`` has had its say in :func:`check_payload`.
    """
    out = Judged({}, [], 0, list(checked.rejected))
    groups: dict[tuple[str, str], list[Bar]] = {}
    for candle in checked.good:
        try:
            bar = place(candle, conversion)
        except Refusal as error:
            out.rejected.append(Rejection(candle.index, str(error), error.code))
            continue
        groups.setdefault((bar.symbol, bar.timeframe), []).append(bar)
    clock = _clock(payload, now, conversion)
    sent_at = conversion.sent_at(payload.server_time)
    for key, bars in groups.items():
        bars.sort(key=lambda bar: bar.ts)
        _judge_series(key, bars, payload, sent_at, clock, series.get(key) or Series(), bases, out)
    out.rejected.sort()
    return out


class _Clock(Struct, frozen=True):
    """The nows by which bars are judged (UTC epoch seconds); None: each bar's own end.

    ``payload`` closes bars; ``sender`` says that it is the sender's. ``ours`` is what a sender cannot set (but for a
    replay, whose now stands in for ours): nothing is believed that it contradicts.
    """

    payload: float | None
    ours: float | None
    sender: bool


def _clock(payload: Payload, now: float, conversion: Conversion) -> _Clock:
    if payload.replay:
        at = None if payload.gmt_time is None else float(payload.gmt_time)
        return _Clock(at, at, True)
    if payload.server_time is not None:
        at = float(conversion.to_utc(payload.server_time))
        if at - now <= AHEAD:  # a payload that waited somewhere is behind, which is right; one from the future is not
            return _Clock(at, now, True)
    return _Clock(now, now, False)


def _judge_series(
    key: tuple[str, str],
    bars: list[Bar],
    payload: Payload,
    sent_at: int | None,
    clock: _Clock,
    known: Series,
    bases: Mapping[tuple[tuple[str, str], int], Close],
    out: Judged,
) -> None:
    length = SECONDS[key[1]]
    while clock.ours is not None and bars and bars[-1].ts - clock.ours > length:
        out.rejected.append(Rejection(bars.pop().index, "ts is more than one bar in the future", "future"))
    if not bars:
        return
    newest = max(bars[-1].ts, known.last_ts or 0)
    source = payload.origin
    closed: list[Bar] = []
    for bar in bars:
        if _is_closed(bar, newest, clock, known, source):
            closed.append(bar)
        else:
            known.saw_forming(source)
            out.forming.append(bar)
    layers: list[list[Candle]] = []
    fingerprints: dict[int, set[int]] = {}
    previous: Close | None = None
    runs: _Runs | None = None
    for bar in closed:
        mark = digest(bar.candle)
        seen = fingerprints.setdefault(bar.ts, set())
        effect = "new" if seen else known.effect(bar.ts, source, mark, sent_at)
        if mark in seen or effect != "new":
            out.duplicates += 1
            previous = Close(bar.ts, bar.candle.close)
            if effect == "confirm":
                rows = out.confirmed.setdefault(key, [])
                if not rows or rows[-1].ts != bar.candle.ts:
                    rows.append(bar.candle)
            continue
        base, sure = _base(bar.ts, previous, known, length, bases.get((key, bar.ts)))
        if base is not None and _jumps(bar.candle, base):
            runs = runs or _Runs(closed, known)
            jump = Jump(bar.ts, bar.candle.low, bar.candle.high)
            if not runs.is_split(jump):
                known.refused(jump)
                reason = f"price jumps from {base} (over twice, or under half)"
                out.rejected.append(Rejection(bar.index, reason, "jump"))
                if not sure:
                    out.unsure.append((key, bar.ts))
                continue
        previous = Close(bar.ts, bar.candle.close)
        depth = len(seen)
        seen.add(mark)
        while len(layers) <= depth:
            layers.append([])
        layers[depth].append(bar.candle)
    if layers:
        out.layers[key] = layers


def _base(ts: int, previous: Close | None, known: Series, length: int, told: Close | None) -> tuple[float | None, bool]:
    """The close that a bar's prices are measured by (None: there is none), and whether it is surely the one before.

    It is that of the bar before, in the payload or in memory. Memory holds the newest bars only, and after a restart
    the log's last message: where the bar right before is not among them, what the archive ``told`` may be nearer. Of a
    bar older than everything that is known the next close after it is taken, if it is not too far away.
    """
    if previous is not None and ts - previous.ts <= length:
        return previous.price, True
    found = [close for close in (previous, told, known.before(ts)) if close is not None]
    if found:
        before = max(found)
        return before.price, told is not None or ts - before.ts <= length
    after = known.after(ts)
    return (after.price, False) if after is not None and after.ts - ts <= REACH * length else (None, False)


def _is_closed(bar: Bar, newest: int, clock: _Clock, known: Series, source: str) -> bool:
    if bar.closed is False:
        return False
    if bar.closed and (clock.ours is None or bar.end - clock.ours <= BELIEVED):
        return True
    if bar.ts < newest:
        return True
    if clock.payload is not None and clock.payload < bar.end:
        return False
    return clock.sender or source not in known.forming_by
