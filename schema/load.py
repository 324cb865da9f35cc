"""Settings from ``mt5.toml`` and the environment, checked whole: every problem is told at once, a sentence each.

Pure functions of a text and a mapping; who reads the file and the environment is the caller's business. A variable
that is set but empty counts as unset, so that ``MT5_NATS_URL=${NATS_URL:-}`` of a compose file means the default.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, get_args, get_origin
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import inspect

from schema.clock import parse_rule
from schema.health import KINDS
from schema.settings import ALIASES, SECRETS, Alerts, Backup, Health, Notify, Section, Settings
from schema.targets import parse_target
from schema.timeframes import canonical

PREFIX: Final = "MT5_"
MASK: Final = "***"

# Variables that steer the program itself and are no settings.
INTERNAL: Final = frozenset({"MT5_CONFIG", "MT5_READY_FD"})
INTERNAL_PREFIXES: Final = ("MT5_BENCH", "MT5_TEST")

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})
_PASSWORD: Final = re.compile(r"(password=)[^&\s]+", re.IGNORECASE)
_PAIRS: Final = re.compile(r",(?=\s*[\w-]+\s*=)")  # a URL may hold commas of its own
_LEVELS: Final = ("debug", "info", "warning", "error")
_SCHEDULE: Final = re.compile(r"((Mon|Tue|Wed|Thu|Fri|Sat|Sun) )?([01]\d|2[0-3]):[0-5]\d")
_TIME: Final = re.compile(r"([01]\d|2[0-3]):[0-5]\d")
_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MAILBOX: Final = re.compile(r"[^\s@<>,;]+@[^\s@<>,;]+|[^<>@\r\n]*<[^\s@<>,;]+@[^\s@<>,;]+>")
_AGE: Final = re.compile(r"age1[02-9ac-hj-np-z]{58}")  # Bech32, as long as an X25519 key makes it
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HTTP: Final = ("http", "https")
_NATS: Final = ("nats", "tls", "ws", "wss")
_POSTGRESQL: Final = ("postgresql", "postgres")


class SettingsError(Exception):
    """The settings cannot be used; ``problems`` holds one sentence for each reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(_one_line(problem) for problem in problems)
        super().__init__("\n".join(self.problems))


def load(toml_text: str | None, environ: Mapping[str, str], *, source: str = "mt5.toml") -> Settings:
    """The settings in force: defaults, then the file's text (None: no file), then the environment.

    ``source`` names the file in messages. Raises SettingsError with every problem found.
    """
    gathered = _gather(toml_text, environ, source)
    problems = gathered.problems
    if not problems:
        try:
            settings = msgspec.convert(gathered.tree, Settings)
        except msgspec.ValidationError as error:  # a rule that a section itself adds
            problems = [f"{source} or the environment: {error}."]
        else:
            problems = _rules(settings)
            if not problems:
                return settings
    raise SettingsError(problems)


def origins(toml_text: str | None, environ: Mapping[str, str], *, source: str = "mt5.toml") -> dict[str, str]:
    """Where each setting's value comes from: dotted path → ``default``, the file's name or the variable's."""
    found = _gather(toml_text, environ, source).origins
    return {path: found.get(path, "default") for path in settable()}


def describe(settings: Settings) -> dict[str, Any]:
    """The settings as builtins for printing: secrets are ``***`` and URLs lose their password or token."""

    def masked(value: Any, path: str) -> Any:
        if path in SECRETS:
            return [MASK] * len(value) if isinstance(value, (list, tuple)) else value and MASK
        if isinstance(value, dict):
            return {key: masked(item, f"{path}.{key}" if path else key) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [masked(item, path) for item in value]
        return mask_url(value) if isinstance(value, str) else value

    described: dict[str, Any] = masked(msgspec.to_builtins(settings), "")
    return described


def mask_url(text: str) -> str:
    """``text`` without the passwords and tokens of the URLs in it (``nats://TOKEN@host`` is a token)."""
    urls = re.split(r",(?=\s*[a-zA-Z][\w+.-]*://)", text)
    return ",".join(_mask_one(url) for url in urls)


def holds_secrets(toml_text: str) -> bool:
    """Whether a settings file holds something that others must not read."""
    try:
        table = tomllib.loads(toml_text)
    except tomllib.TOMLDecodeError:
        return True  # nothing is known about it: keep it closed
    return any(
        bool(value) if path in SECRETS else isinstance(value, str) and mask_url(value) != value
        for path, value in _flat(table)
    )


def variables() -> dict[str, str]:
    """Every environment variable that sets something: name → dotted path."""
    return {_variable(path): path for path, kind in settable().items() if not _is_table(kind)} | ALIASES


def settable() -> dict[str, Any]:
    """Every setting: dotted path → its annotation. A table whose names are the user's own is one entry."""
    return dict(_leaves(Settings, ""))


# --- gathering ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Gathered:
    """Values on their way to Settings, with where each came from and what is wrong with them."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, path: str, value: Any, origin: str) -> None:
        *sections, name = path.split(".")
        table = self.tree
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
        self.origins[path] = origin


def _gather(toml_text: str | None, environ: Mapping[str, str], source: str) -> _Gathered:
    gathered = _Gathered()
    if toml_text is not None:
        try:
            table = tomllib.loads(toml_text)
        except tomllib.TOMLDecodeError as error:
            gathered.problems.append(f"{source} is not valid TOML: {error}.")
        else:
            _read_table(gathered, table, Settings, "", source)
    _read_environment(gathered, environ)
    return gathered


def _read_table(gathered: _Gathered, table: dict[str, Any], struct: type[Section], prefix: str, source: str) -> None:
    fields = _types(struct)
    for key, value in table.items():
        path = f"{prefix}{key}"
        kind = fields.get(key)
        if kind is None:
            gathered.problems.append(f"{source} has an unknown key {path}: {_suggest_key(key, prefix, fields)}")
        elif _is_section(kind):
            if isinstance(value, dict):
                _read_table(gathered, value, kind, f"{path}.", source)
            else:
                gathered.problems.append(f"{path} in {source} must be a section, written [{path}].")
        elif _is_table(kind):
            _read_named(gathered, value, get_args(kind)[1], path, source)
        else:
            _put_checked(gathered, path, value, kind, f"{path} in {source}", source)


def _read_named(gathered: _Gathered, value: Any, struct: type[Section], path: str, source: str) -> None:
    """A table whose keys are the user's own, such as ``[symbols."EURUSD.m"]``."""
    if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
        gathered.problems.append(f'{path} in {source} must hold sections, written [{path}."NAME"].')
        return
    fields = _types(struct)
    entries: dict[str, Any] = {}
    for name, table in value.items():
        entry: dict[str, Any] = {}
        for key, item in table.items():
            where = f'{path}."{name}".{key}'
            kind = fields.get(key)
            if kind is None:
                hint = _suggest_key(key, f'{path}."{name}".', fields)
                gathered.problems.append(f"{source} has an unknown key {where}: {hint}")
            elif not _fits(item, kind):
                gathered.problems.append(f"{where} in {source} must be {_expected(kind)}, not {_shown(item, path)}.")
            else:
                entry[key] = item
        lacking = [item.encode_name for item in msgspec.structs.fields(struct) if item.required]
        for key in lacking:
            if key not in table:
                gathered.problems.append(f'{path}."{name}" in {source} lacks {key}: it needs {" and ".join(lacking)}.')
        entries[name] = entry
    gathered.put(path, entries, source)


def _read_environment(gathered: _Gathered, environ: Mapping[str, str]) -> None:
    known = variables()
    types = settable()
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in INTERNAL or name.startswith(INTERNAL_PREFIXES):
            continue
        path = known.get(name)
        if path is None:
            gathered.problems.append(f"{name} is not a setting: {_suggest_variable(name, known)}")
            continue
        text = environ[name].strip()
        if not text:
            continue
        if gathered.origins.get(path, "") in known:
            if environ[gathered.origins[path]].strip() != text:
                gathered.problems.append(f"{gathered.origins[path]} and {name} both set {path}: keep one of them.")
            continue
        _put_checked(gathered, path, _parse(text, types[path]), types[path], name, name)


def _put_checked(gathered: _Gathered, path: str, value: Any, kind: Any, where: str, origin: str) -> None:
    if _fits(value, kind):
        gathered.put(path, value, origin)
    else:
        gathered.problems.append(f"{where} must be {_expected(kind)}, not {_shown(value, path)}.")


# --- types -------------------------------------------------------------------------------------------------------


def _types(struct: type[Section]) -> dict[str, Any]:
    return {item.encode_name: item.type for item in msgspec.structs.fields(struct)}


def _leaves(struct: type[Section], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, kind in _types(struct).items():
        if _is_section(kind):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _is_table(kind: Any) -> bool:
    """Whether a setting is a table of sections whose names are the user's own."""
    return get_origin(kind) is dict and _is_section(get_args(kind)[1])


def _variable(path: str) -> str:
    return PREFIX + path.upper().replace(".", "_")


def _plain(kind: Any) -> inspect.Type:
    """A setting's type; ``T | None`` as T, since leaving a setting out is how it becomes None."""
    info = inspect.type_info(kind)
    if isinstance(info, inspect.UnionType):
        return next(member for member in info.types if not isinstance(member, inspect.NoneType))
    return info


def _parse(text: str, kind: Any) -> Any:
    """A variable's text as a value of its setting's type, or the text itself where it is none."""
    plain = _plain(kind)
    if isinstance(plain, inspect.VarTupleType):
        return [item.strip() for item in text.split(",") if item.strip()]
    if isinstance(plain, inspect.DictType):
        pairs = [item.partition("=") for item in _PAIRS.split(text) if item.strip()]
        return {name.strip(): value.strip() for name, _, value in pairs} if all(sep for _, sep, _ in pairs) else text
    if isinstance(plain, inspect.BoolType):
        return True if text.lower() in _TRUE else False if text.lower() in _FALSE else text
    for known, number in ((inspect.IntType, int), (inspect.FloatType, float)):
        if isinstance(plain, known):
            try:
                return number(text)
            except ValueError:
                return text
    return text


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _expected(kind: Any) -> str:
    plain = _plain(kind)
    if isinstance(plain, inspect.VarTupleType):
        return "a list of texts"
    if isinstance(plain, inspect.DictType):
        return "texts by name (NAME=TEXT,… in a variable)"
    if isinstance(plain, inspect.BoolType):
        return "true or false"
    if isinstance(plain, (inspect.IntType, inspect.FloatType)):
        noun = "a whole number" if isinstance(plain, inspect.IntType) else "a number"
        if plain.ge is not None and plain.le is not None:
            return f"{noun} from {plain.ge} to {plain.le}"
        bounds = (("above", plain.gt), ("of at least", plain.ge), ("below", plain.lt), ("of at most", plain.le))
        limits = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        return f"{noun} {limits}".rstrip()
    if isinstance(plain, inspect.LiteralType):
        return "one of " + ", ".join(map(str, plain.values))
    return "a text"


def _one_line(text: str) -> str:
    """Text of any origin in one line: a key or value may hold line breaks and control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shown(value: Any, path: str) -> str:
    """A wrong value as a message may show it: secrets never, and nothing long."""
    if path in SECRETS:
        return "what is there"
    text = str(value).lower() if isinstance(value, bool) else mask_url(str(value))
    text = f'"{text}"' if isinstance(value, str) else text
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- hints -------------------------------------------------------------------------------------------------------


def _suggest_key(key: str, prefix: str, fields: Mapping[str, Any]) -> str:
    near = _nearest(key, fields)
    if near is not None:
        return f"did you mean {prefix}{near}?"
    elsewhere = [path for path in settable() if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    place = f"[{prefix[:-1]}]" if prefix else "the top level"
    return f"{place} knows {', '.join(sorted(fields))}."


def _suggest_variable(name: str, known: Mapping[str, str]) -> str:
    for path, kind in settable().items():
        if _is_table(kind) and name.startswith(_variable(path)):
            return f"[{path}] is set in the settings file only."
    near = _nearest(name, known)
    return f"did you mean {near}?" if near else "`mt5 settings` lists the variables."


def _nearest(name: str, names: Iterable[str]) -> str | None:
    import difflib  # only a mistake needs it

    near = difflib.get_close_matches(name.upper(), {item.upper() for item in names}, n=1, cutoff=0.7)
    return next((item for item in names if near and item.upper() == near[0]), None)


# --- rules and masks ---------------------------------------------------------------------------------------------


def _rules(settings: Settings) -> list[str]:
    """What no single type can say."""
    problems = []
    if settings.log.level not in _LEVELS:
        problems.append(f'log.level must be one of {", ".join(_LEVELS)}, not "{settings.log.level}".')
    for name in settings.trainer.timeframes:
        if canonical(name) != name:
            known = f'did you mean "{canonical(name)}"?' if canonical(name) else "MT5's names are M1 to MN1."
            problems.append(f'trainer.timeframes has "{name}", which is no timeframe: {known}')
    for path, schedule in {
        "trainer.schedule": settings.trainer.schedule,
        "health.maintenance": settings.health.maintenance,
        "health.report": settings.health.report,
        "backup.schedule": settings.backup.schedule,
        "backup.drill": settings.backup.drill,
    }.items():
        if schedule is not None and not _SCHEDULE.fullmatch(schedule):
            problems.append(f'{path} must be "HH:MM" or "Sat HH:MM", not "{schedule}".')
    for source, clock in settings.clock.items():
        for name, rule in (("rule", clock.rule), ("grid", clock.grid)):
            try:
                if rule is not None:
                    parse_rule(rule)
            except ValueError as error:
                problems.append(f'clock."{source}".{name}: {error}.')
    if not settings.home:
        problems.append("home must name a folder.")
    urls = {
        "nats.url": settings.nats.url,
        **{f"nats.urls.{name}": url for name, url in settings.nats.urls.items()},
        "database.url": settings.database.url,
        "database.direct_url": settings.database.direct_url,
    }
    for path, url in urls.items():
        schemes = _NATS if path.startswith("nats") else _POSTGRESQL
        if url is not None and url.partition("://")[0] not in schemes:
            problems.append(f'{path} must be a URL that starts with {schemes[0]}://, not "{mask_url(url)}".')
    if settings.database.direct_url is not None and settings.database.url is None:
        problems.append("database.direct_url is set without database.url: set both, or neither for an embedded server.")
    problems += _health_rules(settings.health)
    problems += _alert_rules(settings.alerts)
    problems += _notify_rules(settings.notify)
    problems += _backup_rules(settings.backup)
    return problems


def _health_rules(health: Health) -> Iterator[str]:
    if health.disk_critical >= health.disk_free:
        yield (
            f"health.disk_critical ({health.disk_critical:g}) must be below health.disk_free ({health.disk_free:g}): "
            "a disk is critical when less is free than for a warning."
        )
    if health.gateway is not None:
        yield from _web("health.gateway", health.gateway)
    for endpoint in health.endpoints:
        if not endpoint.startswith("/"):
            yield from _web("health.endpoints", endpoint, 'a path such as "/health" or ')


def _alert_rules(alerts: Alerts) -> Iterator[str]:
    for name in alerts.rules:
        yield from _kind(f'alerts.rules."{name}"', name)
    for name, window in alerts.maintenance.items():
        where = f'alerts.maintenance."{name}"'
        if not _TIME.fullmatch(window.start):
            yield f'{where}.start must be a time from "00:00" to "23:59", not "{window.start}".'
        if not _TIME.fullmatch(window.end) and window.end != "24:00":
            yield f'{where}.end must be a time from "00:00" to "24:00", not "{window.end}".'
        elif window.end == window.start:
            yield f'{where} begins and ends at {window.start}: write "00:00" and "24:00" for a whole day.'
        if not _is_zone(window.zone):
            yield f'{where}.zone must be a time zone such as "Europe/Athens" or "UTC", not "{window.zone}".'
        for day in window.days:
            if day not in _DAYS:
                yield f'{where}.days has "{day}", which is no day: they are {", ".join(_DAYS)}.'
        for check in window.checks:
            yield from _kind(f"{where}.checks", check)


def _kind(where: str, check: str) -> Iterator[str]:
    """A rule for a check that cannot be is one that silently does nothing."""
    kind = check.partition(".")[0]
    if kind not in KINDS:
        near = _nearest(kind, KINDS)
        hint = f'did you mean "{near}"?' if near else f"they begin with {', '.join(KINDS)}."
        yield f'{where} has "{check}", which is no check: {hint}'


def _notify_rules(notify: Notify) -> Iterator[str]:
    smtp = notify.smtp
    if smtp.host is not None and not smtp.recipients:
        yield "notify.smtp.host is set without notify.smtp.recipients: say whom to write to."
    if smtp.host is None and smtp.recipients:
        yield "notify.smtp.recipients is set without notify.smtp.host: say which server takes the mail."
    for path, addresses in (("recipients", smtp.recipients), ("sender", (smtp.sender,))):
        for address in addresses:
            if address is not None and not _MAILBOX.fullmatch(address):
                yield (
                    f'notify.smtp.{path} has "{address}", which is no mail address: '
                    "write mt5@example.org or MT5 <mt5@example.org>."
                )
    if (smtp.user is None) != (smtp.password is None):
        there, lacking = ("user", "password") if smtp.password is None else ("password", "user")
        yield f"notify.smtp.{there} is set without notify.smtp.{lacking}: set both, or neither for a server that asks for none."
    if smtp.security == "none" and smtp.password is not None and smtp.host not in _LOOPBACK:
        yield 'notify.smtp.security is "none", which would send the password in clear: write "starttls" or "tls".'
    if notify.webhook.url is not None:
        yield from _web("notify.webhook.url", notify.webhook.url)
    elif notify.webhook.secret is not None:
        yield "notify.webhook.secret is set without notify.webhook.url: say where to post to."
    if (notify.telegram.token is None) != (notify.telegram.chat is None):
        there, lacking = ("token", "chat") if notify.telegram.chat is None else ("chat", "token")
        yield f"notify.telegram.{there} is set without notify.telegram.{lacking}: a bot needs both."
    yield from _web("notify.telegram.api", notify.telegram.api)
    if notify.ping_url is not None:
        yield from _web("notify.ping_url", notify.ping_url)


def _backup_rules(backup: Backup) -> Iterator[str]:
    if backup.target is not None:
        try:
            parse_target(backup.target)
        except ValueError:
            forms = "user@host:/folder, user@host:port:/folder or a local folder"
            yield f'backup.target must be {forms}, not "{mask_url(backup.target)}".'
    recipient = backup.recipient
    if recipient is not None and not _AGE.fullmatch(recipient):
        shown = "a secret key" if recipient.upper().startswith("AGE-SECRET-KEY") else f'"{recipient}"'
        yield f"backup.recipient must be an age public key (age1 and 58 letters and digits, as age-keygen prints it), not {shown}."
    for major in backup.postgres_bins:
        if not major.isdecimal():
            yield f'backup.postgres_bins has "{major}", which is no major version of PostgreSQL: write 18=/usr/lib/postgresql/18/bin.'


def _web(path: str, url: str, other: str = "") -> Iterator[str]:
    scheme, _, place = url.partition("://")
    if scheme not in _HTTP or not place or any(not c.isprintable() or c.isspace() for c in url):
        yield f"{path} must be {other}a URL that starts with http:// or https://, not {_shown(url, path)}."


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # no such zone, no name of one, a folder of zones
        return False
    return True


def _mask_one(text: str) -> str:
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _PASSWORD.sub(rf"\g<1>{MASK}", text)
    userinfo, at, place = rest.rpartition("@")
    if at:
        user, colon, _ = userinfo.partition(":")
        if colon:
            userinfo = f"{user}:{MASK}"
        elif scheme in _NATS:
            userinfo = MASK  # nats://TOKEN@host
    return f"{scheme}{separator}{userinfo}{at}" + _PASSWORD.sub(rf"\g<1>{MASK}", place)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
