"""The pages and what they load: read once from the package, served with validators and a strict policy."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import Final

from aiohttp import web

TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Everything comes from this origin and nothing is inline: what a symbol's name might smuggle in cannot run.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGES: Final = {"/": "index.html", "/docs": "docs.html"}


@dataclass(frozen=True, slots=True)
class Asset:
    body: bytes
    content_type: str
    etag: str


def load() -> dict[str, Asset]:
    """Path → asset, for the pages and, under ``/web/``, whatever they load."""
    found = sorted(files("deploy").joinpath("web").iterdir(), key=lambda entry: entry.name)
    assets = {f"/web/{entry.name}": _asset(entry) for entry in found if PurePath(entry.name).suffix in TYPES}
    return assets | {path: assets[f"/web/{name}"] for path, name in PAGES.items()}


def routes() -> list[web.RouteDef]:
    return [web.get(path, partial(_serve, asset)) for path, asset in load().items()]


def _asset(entry: Traversable) -> Asset:
    body = entry.read_bytes()
    return Asset(body, TYPES[PurePath(entry.name).suffix], hashlib.sha256(body).hexdigest()[:16])


async def _serve(asset: Asset, request: web.Request) -> web.StreamResponse:
    headers = {
        "Content-Type": asset.content_type,
        "Content-Security-Policy": POLICY,
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",  # kept, and asked for again: an upgrade shows at once
        "ETag": f'"{asset.etag}"',
    }
    if any(tag.value in (asset.etag, "*") for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=asset.body, headers=headers)
