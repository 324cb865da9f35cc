"""The loader: defaults, file, environment; every problem one sentence; secrets masked."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.load import (
    MASK,
    SettingsError,
    describe,
    holds_secrets,
    load,
    mask_url,
    origins,
    settable,
    variables,
)
from schema.settings import ALIASES, SECRETS, Settings

TOML = """
home = "state"
[gateway]
port = 9001
api_keys = ["alpha", "beta"]
[trainer]
timeframes = ["M1", "H1"]
[symbols."EURUSD.m"]
point = 0.00001
"""


def problems(toml: str | None = None, **environ: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load(toml, environ)
    return caught.value.problems


def told(toml: str | None, environ: dict[str, str]) -> tuple[str, ...]:
    """The problems found; none where the settings are good."""
    try:
        load(toml, environ)
    except SettingsError as error:
        return error.problems
    return ()


def test_without_a_file_and_variables_all_is_default() -> None:
    assert load(None, {}) == Settings()


def test_the_file_is_read_and_the_environment_wins() -> None:
    settings = load(TOML, {"MT5_GATEWAY_PORT": "0", "MT5_HOME": "elsewhere"})
    assert settings.gateway.port == 0
    assert settings.home == "elsewhere"
    assert settings.gateway.api_keys == ("alpha", "beta")
    assert settings.trainer.timeframes == ("M1", "H1")
    assert settings.symbols["EURUSD.m"].point == 0.00001


def test_lists_are_comma_separated_and_booleans_are_words() -> None:
    settings = load(None, {"MT5_API_KEYS": " a, b ,,c", "MT5_LOG_JSON": "Yes"})
    assert settings.gateway.api_keys == ("a", "b", "c")
    assert settings.log.json is True


def test_an_empty_variable_is_unset() -> None:
    assert load(TOML, {"MT5_NATS_URL": "", "MT5_GATEWAY_PORT": " "}).gateway.port == 9001


@pytest.mark.parametrize("name", ["MT5_CONFIG", "MT5_READY_FD", "MT5_BENCH_ROUNDS", "MT5_TEST_HOME", "PATH", "MT5"])
def test_internal_and_foreign_variables_are_no_settings(name: str) -> None:
    assert load(None, {name: "x"}) == Settings()


def test_each_problem_is_one_sentence_and_all_are_told_at_once() -> None:
    found = problems(
        """
        port = 1
        [gateway]
        prot = 1
        port = "abc"
        body_timeout = 0
        [log]
        json = 1
        [symbols.X]
        pont = 1
        """,
        MT5_GATEWAY_PROT="1",
        MT5_NATS_PUBLISH_TIMEOUT="inf",
        MT5_LOG_JSON="maybe",
    )
    assert found == (
        "mt5.toml has an unknown key port: did you mean gateway.port or notify.smtp.port?",
        "mt5.toml has an unknown key gateway.prot: did you mean gateway.port?",
        'gateway.port in mt5.toml must be a whole number from 0 to 65535, not "abc".',
        "gateway.body_timeout in mt5.toml must be a number above 0, not 0.",
        "log.json in mt5.toml must be true or false, not 1.",
        'mt5.toml has an unknown key symbols."X".pont: did you mean symbols."X".point?',
        "MT5_GATEWAY_PROT is not a setting: did you mean MT5_GATEWAY_PORT?",
        'MT5_LOG_JSON must be true or false, not "maybe".',
        "MT5_NATS_PUBLISH_TIMEOUT must be a number above 0, not inf.",
    )


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("gateway = 3", "gateway in mt5.toml must be a section, written [gateway]."),
        ("[symbols]\nX = 3", 'symbols in mt5.toml must hold sections, written [symbols."NAME"].'),
        ("[trainer]\ntimeframes = ['1h']", 'trainer.timeframes has "1h", which is no timeframe: did you mean "H1"?'),
        ("[trainer]\ntimeframes = 'M1'", 'trainer.timeframes in mt5.toml must be a list of texts, not "M1".'),
        ("[trainer]\nschedule = '24:00'", 'trainer.schedule must be "HH:MM" or "Sat HH:MM", not "24:00".'),
        ("[log]\nlevel = 'loud'", 'log.level must be one of debug, info, warning, error, not "loud".'),
        ("[nats]\nurl = 'http://a:b@c'", 'nats.url must be a URL that starts with nats://, not "http://a:***@c".'),
        (
            "[database]\ndirect_url = 'postgresql://h/d'",
            "database.direct_url is set without database.url: set both, or neither for an embedded server.",
        ),
        ("[gateway]\napi_keys = 'secret'", "gateway.api_keys in mt5.toml must be a list of texts, not what is there."),
        ("[gateway]\nport = true", "gateway.port in mt5.toml must be a whole number from 0 to 65535, not true."),
    ],
)
def test_a_wrong_value_gets_its_sentence(toml: str, sentence: str) -> None:
    assert problems(toml) == (sentence,)


AGE = "age1" + "q" * 58
OPERATIONS = f"""
[health]
gateway = "https://mt5.example.org"
endpoints = ["/health", "http://127.0.0.1:8001/docs"]
maintenance = "Sun 03:10"
report = "04:40"
[alerts.rules."feed"]
severity = "warning"
[alerts.rules."feed.M1.EURUSD.m"]
after = 5
[alerts.rules."event.clock"]
mute = true
[alerts.maintenance."night"]
start = "22:30"
end = "24:00"
zone = "Europe/Athens"
days = ["Sat", "Sun"]
checks = ["feed", "nats.lag.recorder"]
[alerts.maintenance."always"]
start = "23:00"
end = "01:00"
[notify.smtp]
host = "mail.example.org"
user = "mt5"
password = "hunter2"
sender = "MT5 at night <mt5@example.org>"
recipients = ["owner@example.org", "Owner <owner@example.com>"]
[notify.webhook]
url = "https://hooks.example.org/T0"
secret = "hunter3"
[notify.telegram]
token = "1:A"
chat = "2"
[notify]
ping_url = "https://hc.example.org/x"
[backup]
schedule = "02:00"
drill = "Sun 05:00"
target = "mt5@backup.example.org:/srv/mt5"
recipient = "{AGE}"
postgres_bins = {{ 18 = "/usr/lib/postgresql/18/bin" }}
"""


def test_the_settings_of_operating_are_read() -> None:
    settings = load(OPERATIONS, {})
    assert settings.alerts.rules["feed.M1.EURUSD.m"].after == 5
    assert settings.alerts.maintenance["night"].days == ("Sat", "Sun")
    assert settings.backup.recipient == AGE
    assert "hunter" not in str(describe(settings))


def test_the_examples_of_the_page_about_alerts_can_be_used() -> None:
    page = (Path(__file__).parents[2] / "docs" / "alerts.md").read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    settings = load("\n".join(blocks), {})
    assert (
        msgspec.structs.replace(settings.alerts, rules={}, maintenance={}) == Settings().alerts
    )  # "these are the defaults"
    assert (len(settings.alerts.rules), len(settings.alerts.maintenance)) == (3, 2)


@pytest.mark.parametrize(
    "target",
    [
        "me@host:/srv",
        "me@10.0.0.1:/srv",
        "me@[fe80::1]:/srv",
        "me@host:2222:/srv",
        "host:/srv",
        "/srv/b@ck:up",
        "backups",
    ],
)
def test_a_backup_goes_to_a_host_or_a_folder(target: str) -> None:
    assert load(None, {"MT5_BACKUP_TARGET": target}).backup.target == target


@pytest.mark.parametrize(
    "target", ["me@host", "me@host:srv", "me@host:70000:/srv", "ssh://host/srv", "me@:/srv", "@host:/srv"]
)
def test_another_target_is_refused(target: str) -> None:
    assert problems(MT5_BACKUP_TARGET=target) == (
        f'backup.target must be user@host:/folder, user@host:port:/folder or a local folder, not "{target}".',
    )


WINDOW = "[alerts.maintenance.night]\n"


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("[health]\nreport = '4:40'", 'health.report must be "HH:MM" or "Sat HH:MM", not "4:40".'),
        ("[health]\nmaintenance = 'x'", 'health.maintenance must be "HH:MM" or "Sat HH:MM", not "x".'),
        ("[backup]\nschedule = '02:60'", 'backup.schedule must be "HH:MM" or "Sat HH:MM", not "02:60".'),
        ("[backup]\ndrill = 'Sunday 02:00'", 'backup.drill must be "HH:MM" or "Sat HH:MM", not "Sunday 02:00".'),
        (
            "[health]\ndisk_critical = 0.2",
            "health.disk_critical (0.2) must be below health.disk_free (0.1): a disk is critical when less is free than for a warning.",
        ),
        (
            "[health]\ngateway = 'localhost:8001'",
            'health.gateway must be a URL that starts with http:// or https://, not "localhost:8001".',
        ),
        (
            "[health]\nendpoints = ['docs']",
            'health.endpoints must be a path such as "/health" or a URL that starts with http:// or https://, not "docs".',
        ),
        (
            "[alerts.rules.feeds]\nafter = 3",
            'alerts.rules."feeds" has "feeds", which is no check: did you mean "feed"?',
        ),
        (
            "[alerts.rules.xyz]\nafter = 3",
            'alerts.rules."xyz" has "xyz", which is no check: they begin with database, pgbouncer, nats, disk, endpoint, actor, '
            "feed, model, backup, certificate, container, runner, outbox, event.",
        ),
        (
            f"{WINDOW}start = '24:00'\nend = '02:00'",
            'alerts.maintenance."night".start must be a time from "00:00" to "23:59", not "24:00".',
        ),
        (
            f"{WINDOW}start = '22:00'\nend = '2:00'",
            'alerts.maintenance."night".end must be a time from "00:00" to "24:00", not "2:00".',
        ),
        (
            f"{WINDOW}start = '22:00'\nend = '22:00'",
            'alerts.maintenance."night" begins and ends at 22:00: write "00:00" and "24:00" for a whole day.',
        ),
        (
            f"{WINDOW}start = '22:00'\nend = '23:00'\nzone = 'Europe/Atlantis'",
            'alerts.maintenance."night".zone must be a time zone such as "Europe/Athens" or "UTC", not "Europe/Atlantis".',
        ),
        (
            f"{WINDOW}start = '22:00'\nend = '23:00'\nzone = '../etc/passwd'",
            'alerts.maintenance."night".zone must be a time zone such as "Europe/Athens" or "UTC", not "../etc/passwd".',
        ),
        (
            f"{WINDOW}start = '22:00'\nend = '23:00'\nzone = ''",
            'alerts.maintenance."night".zone must be a time zone such as "Europe/Athens" or "UTC", not "".',
        ),
        (
            f"{WINDOW}start = '22:00'\nend = '23:00'\ndays = ['Saturday']",
            'alerts.maintenance."night".days has "Saturday", which is no day: they are Mon, Tue, Wed, Thu, Fri, Sat, Sun.',
        ),
        (
            f"{WINDOW}start = '22:00'\nend = '23:00'\nchecks = ['databse']",
            'alerts.maintenance."night".checks has "databse", which is no check: did you mean "database"?',
        ),
        (
            f"{WINDOW}end = '23:00'",
            'alerts.maintenance."night" in mt5.toml lacks start: it needs start and end.',
        ),
        (
            "[notify.smtp]\nhost = 'mail'",
            "notify.smtp.host is set without notify.smtp.recipients: say whom to write to.",
        ),
        (
            "[notify.smtp]\nrecipients = ['a@b']",
            "notify.smtp.recipients is set without notify.smtp.host: say which server takes the mail.",
        ),
        (
            "[notify.smtp]\nhost = 'mail'\nrecipients = ['owner']",
            'notify.smtp.recipients has "owner", which is no mail address: write mt5@example.org or MT5 <mt5@example.org>.',
        ),
        (
            "[notify.smtp]\nsender = 'MT5 <a@b>, c@d'",
            'notify.smtp.sender has "MT5 <a@b>, c@d", which is no mail address: write mt5@example.org or MT5 <mt5@example.org>.',
        ),
        (
            '[notify.smtp]\nsender = "a@b\\r\\nBcc: c@d"',
            r'notify.smtp.sender has "a@b\r\nBcc: c@d", which is no mail address: write mt5@example.org or MT5 <mt5@example.org>.',
        ),
        (
            "[notify.smtp]\nuser = 'a'",
            "notify.smtp.user is set without notify.smtp.password: set both, or neither for a server that asks for none.",
        ),
        (
            "[notify.smtp]\npassword = 'hunter2'",
            "notify.smtp.password is set without notify.smtp.user: set both, or neither for a server that asks for none.",
        ),
        (
            "[notify.smtp]\nhost = 'mail'\nrecipients = ['a@b']\nuser = 'a'\npassword = 'hunter2'\nsecurity = 'none'",
            'notify.smtp.security is "none", which would send the password in clear: write "starttls" or "tls".',
        ),
        (
            "[notify.webhook]\nurl = 'hooks.example.org/hunter2'",
            "notify.webhook.url must be a URL that starts with http:// or https://, not what is there.",
        ),
        (
            "[notify.webhook]\nsecret = 'hunter2'",
            "notify.webhook.secret is set without notify.webhook.url: say where to post to.",
        ),
        (
            "[notify.telegram]\ntoken = 'hunter2'",
            "notify.telegram.token is set without notify.telegram.chat: a bot needs both.",
        ),
        (
            "[notify.telegram]\nchat = '1'",
            "notify.telegram.chat is set without notify.telegram.token: a bot needs both.",
        ),
        (
            "[notify.telegram]\napi = 'api.telegram.org'",
            'notify.telegram.api must be a URL that starts with http:// or https://, not "api.telegram.org".',
        ),
        (
            '[notify]\nping_url = "https://hunter2\\n"',
            "notify.ping_url must be a URL that starts with http:// or https://, not what is there.",
        ),
        (
            "[backup]\nrecipient = 'age1x'",
            'backup.recipient must be an age public key (age1 and 58 letters and digits, as age-keygen prints it), not "age1x".',
        ),
        (
            "[backup]\nrecipient = 'AGE-SECRET-KEY-1HUNTER2'",
            "backup.recipient must be an age public key (age1 and 58 letters and digits, as age-keygen prints it), not a secret key.",
        ),
        (
            "[backup]\npostgres_bins = { x = '/bin' }",
            'backup.postgres_bins has "x", which is no major version of PostgreSQL: write 18=/usr/lib/postgresql/18/bin.',
        ),
    ],
)
def test_what_operating_cannot_use_gets_its_sentence(toml: str, sentence: str) -> None:
    assert problems(toml) == (sentence,)
    assert "hunter2" not in sentence.lower()


def test_a_password_in_clear_may_go_to_this_machine() -> None:
    smtp = "host = '127.0.0.1'\nrecipients = ['a@b']\nuser = 'a'\npassword = 'b'\nsecurity = 'none'"
    assert load(f"[notify.smtp]\n{smtp}", {}).notify.smtp.security == "none"


def test_line_breaks_in_keys_and_values_do_not_break_the_line() -> None:
    assert problems('"a\\nb" = 1\n[log]\nlevel = "x\\ny"')[0].startswith(r"mt5.toml has an unknown key a\nb: ")
    assert problems('[log]\nlevel = "x\\ny"') == (r'log.level must be one of debug, info, warning, error, not "x\ny".',)


def test_broken_toml_is_one_sentence_that_names_the_place() -> None:
    (sentence,) = problems("[gateway\n")
    assert sentence.startswith("mt5.toml is not valid TOML")
    assert "line 1" in sentence


def test_the_file_is_named_in_messages() -> None:
    with pytest.raises(SettingsError, match=r"^/etc/mt5/live\.toml has an unknown key x"):
        load("x = 1", {}, source="/etc/mt5/live.toml")


def test_a_table_is_set_in_the_file_only() -> None:
    assert problems(MT5_SYMBOLS_EURUSD="1") == (
        "MT5_SYMBOLS_EURUSD is not a setting: [symbols] is set in the settings file only.",
    )


def test_urls_by_actor_come_from_a_table_or_from_pairs() -> None:
    urls = {"collector": "nats://c:1@a:1,nats://c:1@b:1", "emitter": "nats://e:2@a:1"}
    assert load(None, {"MT5_NATS_URLS": ",".join(f"{name}={url}" for name, url in urls.items())}).nats.urls == urls
    table = "[nats.urls]\n" + "\n".join(f'{name} = "{url}"' for name, url in urls.items())
    settings = load(table, {})
    assert settings.nats.urls == urls
    assert describe(settings)["nats"]["urls"]["emitter"] == "nats://e:***@a:1"
    (line,) = problems(MT5_NATS_URLS="nats://a:hunter2@b")
    assert "NAME=TEXT" in line
    assert "hunter2" not in line
    assert problems(MT5_NATS_URLS="emitter=http://a:b@c") == (
        'nats.urls.emitter must be a URL that starts with nats://, not "http://a:***@c".',
    )


def test_two_names_of_one_setting_must_agree() -> None:
    assert load(None, {"MT5_API_KEYS": "a", "MT5_GATEWAY_API_KEYS": "a"}).gateway.api_keys == ("a",)
    assert problems(MT5_API_KEYS="a", MT5_GATEWAY_API_KEYS="b") == (
        "MT5_API_KEYS and MT5_GATEWAY_API_KEYS both set gateway.api_keys: keep one of them.",
    )


def test_every_setting_has_one_variable_of_its_own() -> None:
    by_name = variables()
    paths = set(by_name.values())
    assert paths == settable().keys() - {
        "symbols",
        "clock",
        "alerts.rules",
        "alerts.maintenance",
    }  # tables whose names are the user's own
    assert len(by_name) == len(paths) + sum(
        name != f"MT5_{path.upper().replace('.', '_')}" for name, path in ALIASES.items()
    )


def test_secrets_name_settings() -> None:
    assert set(settable()) >= SECRETS


def test_describe_masks_secrets_and_the_passwords_of_urls() -> None:
    settings = load(
        None,
        {
            "MT5_API_KEYS": "hunter2,hunter3",
            "MT5_NATS_URL": "nats://me:hunter4@a:4222,nats://hunter5@b:4222",
            "MT5_DATABASE_URL": "postgresql://me:hunt/er@6@db:5432/mt5?password=hunter7&x=1",
        },
    )
    described = describe(settings)
    assert "hunt" not in str(described)
    assert described["gateway"]["api_keys"] == [MASK, MASK]
    assert described["nats"]["url"] == "nats://me:***@a:4222,nats://***@b:4222"
    assert described["database"]["url"] == "postgresql://me:***@db:5432/mt5?password=***&x=1"


def test_no_message_shows_a_password() -> None:
    found = problems("[nats]\nurl = 'http://me:hunter2@a'", MT5_GATEWAY_PORT="nats://me:hunter3@b")
    assert "hunter" not in " ".join(found)


def test_origins_say_where_each_value_comes_from() -> None:
    found = origins(TOML, {"MT5_GATEWAY_PORT": "1", "MT5_API_KEYS": "a"})
    assert found["gateway.port"] == "MT5_GATEWAY_PORT"
    assert found["gateway.api_keys"] == "MT5_API_KEYS"
    assert found["home"] == "mt5.toml"
    assert found["log.level"] == "default"


@pytest.mark.parametrize(
    ("toml", "secret"),
    [
        ("[gateway]\napi_keys = ['a']", True),
        ("[gateway]\napi_keys = []", False),
        ("[nats]\nurl = 'nats://a:b@c'", True),
        ("[nats]\nurl = 'nats://c:4222'", False),
        ("[database]\nurl = 'postgresql://me@db/mt5'", False),
        ("not toml", True),
    ],
)
def test_whether_a_file_holds_secrets(toml: str, secret: bool) -> None:
    assert holds_secrets(toml) is secret


# --- properties --------------------------------------------------------------------------------------------------

PLAIN_TEXT = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=',"\\'), min_size=1, max_size=12
)
NUMBERS = {
    "gateway.port": st.integers(0, 65_535),
    "gateway.max_body": st.integers(1, 2**40),
    "database.pool_size": st.integers(1, 100),
    "trainer.seed": st.integers(-(2**40), 2**40),
    "nats.ping_interval": st.floats(1e-6, 1e9),
    "streams.candles_max_age": st.floats(1e-6, 1e9),
    "gateway.rate_limit": st.floats(0.1, 1e9),
    "log.json": st.booleans(),
    "gateway.api_keys": st.lists(PLAIN_TEXT, min_size=1, max_size=4),
    "gateway.host": PLAIN_TEXT,
}
VALUES = st.fixed_dictionaries({}, optional=NUMBERS)


def as_toml(values: dict[str, Any]) -> str:
    lines = []
    for path, value in values.items():
        section, name = path.split(".")
        lines.append(f"{section}.{name} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines)


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_environ(values: dict[str, Any]) -> dict[str, str]:
    return {f"MT5_{path.upper().replace('.', '_')}": as_text(value) for path, value in values.items()}


def get(settings: Settings, path: str) -> Any:
    section, name = path.split(".")
    value = getattr(getattr(settings, section), name)
    return list(value) if isinstance(value, tuple) else value


@given(VALUES, VALUES)
def test_the_environment_wins_over_the_file_over_the_default(file: dict[str, Any], env: dict[str, Any]) -> None:
    settings = load(as_toml(file), as_environ(env))
    default = Settings()
    for path in NUMBERS:
        assert get(settings, path) == env.get(path, file.get(path, get(default, path)))


@given(VALUES)
def test_file_and_environment_say_the_same(values: dict[str, Any]) -> None:
    settings = load(as_toml(values), {})
    assert settings == load(None, as_environ(values))
    assert msgspec.convert(msgspec.to_builtins(settings), Settings) == settings


@given(st.dictionaries(st.text(st.characters(codec="ascii", categories=["Ll", "Lu", "Nd"]), min_size=1), st.just("x")))
def test_an_unknown_variable_is_always_an_error(names: dict[str, str]) -> None:
    environ = {f"MT5_{name.upper()}": value for name, value in names.items()}
    known = variables()
    unknown = {
        n for n in environ if n not in known and not n.startswith(("MT5_CONFIG", "MT5_READY", "MT5_BENCH", "MT5_TEST"))
    }
    found = told(None, environ)
    assert all(any(sentence.startswith(f"{name} is not a setting: ") for sentence in found) for name in unknown)


@given(
    st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.lists(st.integers())),
    st.sampled_from(sorted(NUMBERS)),
)
def test_a_value_of_any_type_is_taken_or_told_in_one_line(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        text = "nan" if math.isnan(value) else "inf"
    else:
        text = msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    found = told(f"{path} = {text}", {})
    assert len(found) <= 1
    assert all(sentence.isprintable() for sentence in found)


@given(
    st.text(), st.text(st.characters(exclude_characters="/?#@,"), min_size=1), st.sampled_from(["nats", "postgresql"])
)
def test_a_password_never_survives_the_mask(user: str, password: str, scheme: str) -> None:
    secret = f"<{password}>"
    assert secret not in mask_url(f"{scheme}://{user.replace('/', '').replace('@', '')}:{secret}@host:1/x")
