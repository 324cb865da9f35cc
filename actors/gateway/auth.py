"""Who may ask: API keys, the page's session, and how many candles a second each client may send.

A gateway without keys answers only on loopback, only under a loopback name (so that a foreign web page cannot reach it
by pointing its own name here), and takes no write that another site's page sent.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from math import ceil, inf
from typing import Final

from aiohttp import web

from actors.gateway.problems import NO_STORE, Handler, HttpProblem
from bus.supervise import ConfigurationError
from schema.settings import Gateway

SESSION_PATH: Final = "/session"
SESSION_COOKIE: Final = "mt5_session"
SESSION_SECONDS: Final = 12 * 3_600
REMOTE_RATE_LIMIT: Final = (
    50_000.0  # candles a second and client, where the setting is absent and the host is not loopback
)
MAX_CLIENTS: Final = 4_096  # clients whose allowance is remembered
CLIENT: Final = web.RequestKey("client", str)  # who asks, as the allowance counts them

# What orchestrators probe, and pages that hold no data: a browser cannot send a key when it opens an address.
OPEN_PATHS: Final = frozenset({"/live", "/ready", "/", "/docs", "/openapi.json"})
OPEN_PREFIX: Final = "/web/"
_READS: Final = frozenset({"GET", "HEAD"})


def is_loopback(host: str) -> bool:
    """Whether a server bound to ``host`` is out of reach for other machines."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(gateway: Gateway) -> None:
    """Raises ConfigurationError where the gateway may not start: open to others without a key, or with a key nobody can send."""
    if not gateway.api_keys and not is_loopback(gateway.host):
        raise ConfigurationError(
            f'The gateway would listen on "{gateway.host}" without a key: set MT5_API_KEYS, or set MT5_GATEWAY_HOST to 127.0.0.1.'
        )
    if gateway.rate_limit is not None and not 0 < gateway.rate_limit < inf:
        raise ConfigurationError("gateway.rate_limit must be above 0: leave it out where there is to be no limit.")
    for position, key in enumerate(gateway.api_keys, start=1):
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise ConfigurationError(
                f"API key {position} cannot be sent in a header: use printable ASCII without spaces at its ends in MT5_API_KEYS."
            )


class RateLimiter:
    """A token bucket for each client, in a table that forgets who has not asked for longest.

    ``rate`` is tokens a second (None: no limit); a full bucket holds one second's worth, at least one. A request that
    asks for more than that is served from a full bucket and leaves it in debt, so that any size passes in its time.
    """

    def __init__(self, rate: float | None, *, max_clients: int = MAX_CLIENTS) -> None:
        self._rate = rate
        self._size = max(rate or 0.0, 1.0)
        self._max_clients = max_clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: (tokens, at)

    def take(self, client: str, tokens: float, now: float) -> float:
        """0 when ``tokens`` were taken at ``now`` (seconds, monotonic), else how long to wait until they could be."""
        if self._rate is None:
            return 0.0
        held, at = self._buckets.pop(client, (self._size, now))
        held = min(self._size, held + (now - at) * self._rate)
        missing = min(tokens, self._size) - held
        wait = missing / self._rate if missing > 1e-6 else 0.0  # rounding is no debt
        self._buckets[client] = (held if wait else held - tokens, now)
        if len(self._buckets) > self._max_clients:
            self._buckets.popitem(last=False)
        return wait


class Guard:
    """Decides for every request who asks and whether they may; counts what each client sends."""

    def __init__(
        self,
        gateway: Gateway,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        check_bind(gateway)
        self._keys = tuple(key.encode() for key in gateway.api_keys)
        self._clock = clock
        self._wall_clock = wall_clock
        rate = gateway.rate_limit
        if rate is None and not is_loopback(gateway.host):
            rate = REMOTE_RATE_LIMIT
        self._limiter = RateLimiter(rate)

    def charge(self, request: web.Request, candles: int) -> None:
        """Takes ``candles`` from the allowance of who asks; raises HttpProblem 429 with Retry-After."""
        wait = self._limiter.take(request[CLIENT], candles, self._clock())
        if wait > 0:
            seconds = ceil(wait)
            raise HttpProblem(429, f"Too many candles: send them again in {seconds} s.", {"Retry-After": str(seconds)})

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Sets ``request[CLIENT]``; raises HttpProblem 401, or 403 where a gateway without keys is asked by a foreign page."""
        request[CLIENT] = self._client(request)
        return await handler(request)

    async def open_session(self, request: web.Request) -> web.StreamResponse:
        """POST /session with a key: a cookie that lets this browser read, since EventSource cannot send a header."""
        response = web.Response(status=204, headers={"Cache-Control": NO_STORE})
        key = self._key(request)
        if key is not None:
            expires = int(self._wall_clock()) + SESSION_SECONDS
            response.set_cookie(
                SESSION_COOKIE,
                f"{expires}.{_session_mac(key, expires)}",
                max_age=SESSION_SECONDS,
                path="/",
                httponly=True,
                samesite="Strict",
                secure=request.secure,
            )
        return response

    async def close_session(self, request: web.Request) -> web.StreamResponse:
        """DELETE /session: the browser forgets its cookie."""
        response = web.Response(status=204, headers={"Cache-Control": NO_STORE})
        response.del_cookie(SESSION_COOKIE, path="/", httponly=True, samesite="Strict")
        return response

    def _client(self, request: web.Request) -> str:
        address = request.remote or "unknown"
        if request.path in OPEN_PATHS or request.path.startswith(OPEN_PREFIX):
            return address
        if request.method == "DELETE" and request.path == SESSION_PATH:
            return address  # a browser may always forget
        if not self._keys:
            _check_same_site(request)
            return address
        key = self._key(request)
        if key is not None:
            return hashlib.sha256(key).hexdigest()[:16]
        if request.method in _READS and self._in_session(request):
            return address
        # Absent and wrong look alike: the answer must not help to guess.
        raise HttpProblem(
            401,
            "A valid API key is needed: send it in the header X-API-Key, or as Authorization: Bearer.",
            {"WWW-Authenticate": 'Bearer realm="mt5"'},
        )

    def _key(self, request: web.Request) -> bytes | None:
        """The configured key that the request carries; every key is compared, whatever matched before."""
        given = [request.headers.get("X-API-Key", "")]
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given.append(token.strip())
        found = None
        for text in given:
            digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
            for key in self._keys:
                if hmac.compare_digest(digest, hashlib.sha256(key).digest()):
                    found = key
        return found

    def _in_session(self, request: web.Request) -> bool:
        expires, _, mac = request.cookies.get(SESSION_COOKIE, "").partition(".")
        if not (expires.isascii() and expires.isdecimal() and len(expires) <= 12 and mac.isascii()):
            return False
        valid = False
        for key in self._keys:
            valid |= hmac.compare_digest(mac, _session_mac(key, int(expires)))
        return valid and self._wall_clock() < int(expires)


def _session_mac(key: bytes, expires: int) -> str:
    # Keyed by the API key itself: a session survives a restart of the gateway and ends with the key.
    return hmac.new(key, f"mt5 read session until {expires}".encode(), hashlib.sha256).hexdigest()


def _check_same_site(request: web.Request) -> None:
    """Without keys the browser's own rules are all there is: raises HttpProblem 403 where they were worked around."""
    host = request.headers.get("Host", "")
    if host and not is_loopback(_hostname(host)):
        raise HttpProblem(
            403,
            "Without a key the gateway answers only to 127.0.0.1, localhost and [::1]: use one of these, or set MT5_API_KEYS.",
        )
    origin = request.headers.get("Origin")
    if request.method not in _READS and origin is not None and origin.partition("://")[2] != host:
        raise HttpProblem(403, "Another site's page may not write here: send without a browser, or set MT5_API_KEYS.")


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.rpartition(":")[0] if ":" in host else host
