"""Every setting of the system, with its default: one frozen tree, checked whole at start.

Values come from ``mt5.toml`` and from the environment, which wins. A setting's variable is ``MT5_`` plus its path in
capitals (``[gateway] port`` is ``MT5_GATEWAY_PORT``); ``ALIASES`` lists the shorter, documented names.
Durations are seconds, sizes bytes, unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

Port = Annotated[int, Meta(ge=0, le=65_535)]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(gt=0, lt=1)]

ALIASES: Final[dict[str, str]] = {
    "MT5_HOME": "home",
    "MT5_NATS_URL": "nats.url",
    "MT5_DATABASE_URL": "database.url",
    "MT5_DATABASE_DIRECT_URL": "database.direct_url",
    "MT5_API_KEYS": "gateway.api_keys",
}


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: immutable, and an unknown key is an error."""


class Nats(Section, frozen=True):
    url: str | None = None  # None: an embedded nats-server under home
    urls: dict[str, str] = {}  # an actor's own URL (its own credentials), by the actor's name; others use url
    ping_interval: Positive = 10.0  # with two unanswered pings a frozen server is noticed within 30 s
    publish_timeout: Positive = 1.5  # an answer to a POST is due within 2 s, a 503 included


class Database(Section, frozen=True):
    url: str | None = None  # None: an embedded PostgreSQL under home; may be PgBouncer in transaction mode
    direct_url: str | None = None  # migrations, dump and restore; None: url
    pool_size: Count = 4


class Gateway(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Port = 8001
    api_keys: tuple[str, ...] = ()
    rate_limit: float | None = None  # candles a second and client; None: no limit on loopback, 50,000 elsewhere
    body_timeout: Positive = 5.0
    max_body: Count = 1_048_576
    max_candles: Count = 5_000
    recent_signals: Count = 10_000  # newest signals kept in memory for GET /signals


class Streams(Section, frozen=True):
    candles_max_age: Positive = 7 * 86_400.0
    candles_max_bytes: Count = 2 * 1024**3
    derived_max_bytes: Count = 2 * 1024**3
    events_max_age: Positive = 400 * 86_400.0


class Features(Section, frozen=True):
    snapshot_seconds: Positive = 10.0
    quiet_seconds: Positive = 10.0  # how long bars before a series' first one must have been quiet to be taken in
    max_series: Count = 20_000


class Recorder(Section, frozen=True):
    batch_rows: Count = 5_000
    linger: Positive = 0.05  # how long a batch waits for more rows


class Trainer(Section, frozen=True):
    schedule: str | None = None  # "HH:MM" UTC every day, or "Sat HH:MM"; None: only on request
    timeframes: tuple[str, ...] = ("M1",)
    min_rows: Count = 5_000  # ready rows a symbol
    max_rows: Count = 500_000  # newest rows a symbol that a training reads
    trees: Count = 200
    max_depth: Count = 8
    min_samples_leaf: Count = 50
    folds: Count = 5
    seed: int = 7
    expire_days: Count = 90  # of market time after the newest row it was trained on


class Models(Section, frozen=True):
    """Which version may speak: what a shadow must show, what a champion must not."""

    keep: Count = 10  # versions of a model whose files are kept, beside those that serve or are followed
    shadows: Count = 3  # versions of a model that are followed at a time
    retrain_outcomes: Count = 1_000  # after so many a retrain of the champion's recipe replaces it …
    retrain_tolerance: Annotated[float, Meta(ge=0)] = 0.002  # … unless its Brier score is worse by more than this
    promote_evidence: Annotated[float, Meta(gt=1)] = (
        100.0  # e-value at which another recipe, or a provisional version, is promoted
    )
    rollback_evidence: Annotated[float, Meta(gt=1)] = 100.0  # e-value at which a champion is rolled back
    public_key: str | None = None  # file with the key that manifests must be signed with; None: home/keys/models.pub


class Scorer(Section, frozen=True):
    window: Count = 5_000  # newest outcomes of a model, symbol and timeframe that the scorecard's figures are of
    poll_seconds: Positive = 0.25  # how often it looks at what the recorder has stored
    audit_seconds: Positive = 3_600.0  # how often signals are rebuilt and compared
    audit_sample: Count = 20  # how many at a time


class Health(Section, frozen=True):
    """What the health monitor looks at and when it minds. Schedules are "HH:MM" UTC every day, or "Sat HH:MM"."""

    interval_seconds: Positive = 30.0
    timeout_seconds: Positive = 10.0  # of one check; one that takes longer has failed
    keep_days: Count = 30  # how long results stay in health_checks.db
    gateway: str | None = None  # the gateway's URL; None: the one of this `up`
    endpoints: tuple[str, ...] = ("/health", "/live", "/docs", "/signals?timeframe=M1&limit=1")  # or whole URLs
    disks: tuple[str, ...] = ()  # folders whose file system is watched, beside the home's
    disk_free: Share = 0.10  # less than this free is a warning …
    disk_critical: Share = 0.03  # … and less than this is critical
    database_max_bytes: Count | None = None
    stale_seconds: Positive = 180.0  # of open session without a bar that should have come: the feed is stale
    lag_messages: Count = 10_000  # that a reader may be behind
    model_days: Count = 45  # age of a model that serves
    backup_hours: Positive = 26.0  # age of the newest backup; looked at once a target or a schedule is set
    certificates: tuple[str, ...] = ()  # "host:port" or a PEM file
    certificate_days: Count = 21  # before their end
    docker_socket: str = "/var/run/docker.sock"  # where present
    containers: tuple[str, ...] = ()  # that must run; none named: every container of the project "mt5"
    runner_units: str = "actions.runner.*"  # of systemd, where there are any
    maintenance: str | None = "03:10"  # nightly VACUUM and ANALYZE, and partitions ahead
    report: str | None = None  # when the daily report is mailed; None: only on request, or by its systemd timer


class Rule(Section, frozen=True):
    """How a check becomes an alert; ``[alerts.rules."feed"]`` is for ``feed`` and every ``feed.…``. None: as [alerts]."""

    after: Count | None = None
    clear: Count | None = None
    remind_seconds: Positive | None = None
    severity: Literal["info", "warning", "critical"] | None = None  # at most this
    mute: bool = False  # observed and never told


class Maintenance(Section, frozen=True):
    """A window in which alerts are held back: every day from ``start`` to ``end`` in ``zone``, or on ``days`` only.

    A window may pass midnight and belongs to the day on which it begins. What still fails at its end is told then.
    """

    start: str  # "22:00"
    end: str
    zone: str = "UTC"
    days: tuple[str, ...] = ()  # "Mon" … "Sun"
    checks: tuple[str, ...] = ()  # names or prefixes of names; none: all


class Alerts(Section, frozen=True):
    """When a failing check is told, and how often."""

    after: Count = 2  # failures in a row that open
    clear: Count = 2  # successes in a row that close
    remind_seconds: Positive = 6 * 3_600.0
    group_seconds: Annotated[float, Meta(ge=0)] = 20.0  # an incident waits so long for what else fails with it
    flap_changes: Count = 6  # openings within flap_seconds from which a check stays open until it is steady
    flap_seconds: Positive = 3_600.0
    rules: dict[str, Rule] = {}
    maintenance: dict[str, Maintenance] = {}


class Smtp(Section, frozen=True):
    host: str | None = None  # None: no mail
    port: Port = 587
    security: Literal["starttls", "tls", "none"] = "starttls"
    user: str | None = None
    password: str | None = None
    sender: str | None = None  # "MT5 <mt5@example.org>"; None: the first recipient
    recipients: tuple[str, ...] = ()
    ca_file: str | None = None  # of a server with a certificate of its own


class Webhook(Section, frozen=True):
    url: str | None = None  # gets each notice as JSON
    secret: str | None = None  # signs it: X-MT5-Signature is the hex HMAC-SHA256 of the body


class Telegram(Section, frozen=True):
    token: str | None = None
    chat: str | None = None
    api: str = "https://api.telegram.org"


class Notify(Section, frozen=True):
    """Who is told. A notice stays in the outbox until every sender has taken it."""

    smtp: Smtp = Smtp()
    webhook: Webhook = Webhook()
    telegram: Telegram = Telegram()
    ping_url: str | None = None  # a dead man's switch: asked by GET while the monitor works and the mail leaves
    ping_seconds: Positive = 60.0
    keep_days: Count = 30  # how long sent notices stay in the outbox


class Backup(Section, frozen=True):
    schedule: str | None = None  # "HH:MM" UTC every day, or "Sat HH:MM"; None: only on request, or by its systemd timer
    target: str | None = None  # user@host:/folder or a local folder, beside home/backups; None: there only
    daily: Count = 7  # newest backups of that many days, …
    weekly: Count = 4  # … weeks …
    monthly: Count = 12  # … and months are kept, …
    verified: Count = 3  # … and never fewer than so many that were verified
    data: tuple[str, ...] = ()  # folders that belong to it: Grafana's, Prometheus', Loki's
    recipient: str | None = None  # an age public key (age1…): what is shipped is encrypted to it
    identity: str | None = None  # the file with its secret key, for verify and restore
    ssh_key: str | None = None  # file; None: the user's own keys and agent
    known_hosts: str | None = None  # file; None: the user's own; a host that is not in it is refused
    drill: str | None = None  # when the newest backup is restored for practice
    config: str | None = None  # the settings file that belongs to it; `up` and `backup run` say which
    postgres_bins: dict[str, str] = {}  # PostgreSQL's programs by major version; `up` finds those that are installed


class Symbol(Section, frozen=True):
    point: float | None = None
    spread: float | None = None  # points, where the feed's spread is unknown (0)
    allow_non_positive: bool = False
    priority: tuple[str, ...] = ()


class Clock(Section, frozen=True):
    """A source's clock. ``rule``: a zone ("Europe/Athens"), "new_york+7" or an offset ("+02:00"); None: from its clock
    fields, inferred, or UTC. ``grid``: the clock that its bars follow, where its times are in another (UTC, say).
    """

    rule: str | None = None
    grid: str | None = None


class Log(Section, frozen=True):
    level: str = "info"
    json: bool = False


class Settings(Section, frozen=True):
    home: str = "var"
    nats: Nats = Nats()
    database: Database = Database()
    gateway: Gateway = Gateway()
    streams: Streams = Streams()
    features: Features = Features()
    recorder: Recorder = Recorder()
    trainer: Trainer = Trainer()
    models: Models = Models()
    scorer: Scorer = Scorer()
    health: Health = Health()
    alerts: Alerts = Alerts()
    notify: Notify = Notify()
    backup: Backup = Backup()
    symbols: dict[str, Symbol] = {}
    clock: dict[str, Clock] = {}  # by source
    log: Log = Log()


# Never printed: `settings` shows these as "***", and URLs lose their password.
SECRETS: Final[frozenset[str]] = frozenset(
    {
        "gateway.api_keys",
        "notify.smtp.password",
        "notify.webhook.url",  # often holds a token
        "notify.webhook.secret",
        "notify.telegram.token",
        "notify.ping_url",
    }
)
