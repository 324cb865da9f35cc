"""The HTTP endpoints that must answer: the gateway's own, and whole URLs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from actors.monitor.watch import Probe, result, words
from schema.health import CheckResult
from schema.load import mask_url
from schema.settings import Settings


@dataclass(slots=True)
class EndpointProbes:
    """``gateway`` is the URL that paths belong to; None where nobody knows it."""

    settings: Settings
    gateway: str | None

    def probes(self) -> list[Probe]:
        named: dict[str, str] = {}
        for path in dict.fromkeys(self.settings.health.endpoints):
            name, number = endpoint_name(path), 1
            while name in named:  # the same path with another query
                number += 1
                name = f"{endpoint_name(path)}-{number}"
            named[name] = path
        return [Probe(name, self._look(name, path)) for name, path in named.items()]

    def _look(self, name: str, path: str) -> Any:
        whole = "://" in path

        async def look() -> Sequence[CheckResult]:
            if not whole and self.gateway is None:
                return [result(name, "skipped", "No gateway is known here: set [health] gateway to its URL.")]
            url = path if whole else f"{self.gateway}{path}"
            keys = self.settings.gateway.api_keys
            headers = {"X-API-Key": keys[0]} if keys and not whole else {}  # nobody else's business
            return [await self._get(name, url, headers)]

        return look

    async def _get(self, name: str, url: str, headers: dict[str, str]) -> CheckResult:
        import aiohttp  # late: `up` is ready sooner

        shown = mask_url(url)
        budget = aiohttp.ClientTimeout(total=self.settings.health.timeout_seconds)
        began = time.monotonic()
        try:
            async with (
                aiohttp.ClientSession(timeout=budget, headers=headers) as session,
                session.get(url, allow_redirects=False) as answer,
            ):
                await answer.content.read(65_536)
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            said = words(error).replace(url, shown)
            way = "start it with `mt5 up collector`, or see its log" if headers or self._is_ours(url) else "see to it"
            return result(name, "critical", f"{shown} does not answer ({said}): {way}.")
        took = time.monotonic() - began
        if 200 <= status < 400:
            return result(name, "ok", f"{shown} answers {status}.", value=round(took, 6), unit="s", latency=took)
        return result(name, "critical", f"{shown} answers {status}.", value=round(took, 6), unit="s", latency=took)

    def _is_ours(self, url: str) -> bool:
        return self.gateway is not None and url.startswith(self.gateway)


def endpoint_name(path: str) -> str:
    """The check of a path or URL: without its query, which may be long or hold a token."""
    parts = urlsplit(path)
    return f"endpoint.{parts.hostname or ''}{parts.path or '/'}"


def gateway_of(settings: Settings) -> str | None:
    """Where this installation's gateway answers, as seen from this machine."""
    if settings.health.gateway is not None:
        return settings.health.gateway.rstrip("/")
    host, port = settings.gateway.host, settings.gateway.port
    if host in {"0.0.0.0", "::", ""}:  # noqa: S104 - compared, not bound
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}" if port else None
