"""A request's JSON body: read within a time and a size, unpacked, and decoded; each failure with its own answer."""

from __future__ import annotations

import asyncio
import re
import zlib
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from actors.gateway.problems import JSON, HttpProblem
from schema.settings import Gateway

T = TypeVar("T")

GZIP_WBITS: Final = 16 + zlib.MAX_WBITS
MAX_GZIP_MEMBERS: Final = 16  # a body of empty members would cost far more time than its size says
_BOMS: Final = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_LONE_SURROGATE: Final = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")  # msgspec waits for its pair
# What follows an early answer is not read: the connection cannot serve another request.
_CLOSE: Final = {"Connection": "close"}


async def read_body(request: web.Request, limits: Gateway) -> bytes:
    """The unpacked body without MQL5's trailing NUL: some UTF-8 text.

    Raises:
        HttpProblem: 415 (not JSON by its type, or packed otherwise than with gzip), 408 (not there within
            ``body_timeout``), 413 (packed or unpacked above ``max_body``), 400 (broken, empty or not UTF-8).

    The server must leave packed bodies alone (``auto_decompress=False``): unpacking here is what bounds them.
    """
    _check_type(request)
    unpacker = _unpacker(request, limits.max_body)
    if request.content_length is not None and request.content_length > limits.max_body:
        raise _too_large(limits.max_body)
    try:
        async with asyncio.timeout(limits.body_timeout):
            body = await _collect(request, unpacker, limits.max_body)
    except TimeoutError:
        raise HttpProblem(
            408, f"The body was not there within {limits.body_timeout:g} s: send it at once.", _CLOSE
        ) from None
    except web.RequestPayloadError as error:
        raise HttpProblem(400, f"The body ended early or is badly framed ({error}): send it whole.", _CLOSE) from None
    if body.endswith(b"\0"):
        del body[-1]  # MQL5's StringToCharArray copies the terminator
    _check_text(body)
    return bytes(body)


def decode_json(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """What :func:`read_body` gave as one JSON document.

    Raises:
        HttpProblem: 400, it is none, or holds a number that no float can; 422, it is of another shape than expected.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        _check_json(body)
        raise HttpProblem(422, f"The body is JSON of another shape than expected: {error}.") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise _not_json(body, error) from None


def _check_text(body: bytearray) -> None:
    if not body:
        raise HttpProblem(400, "The body is empty: send a candle, or an array of candles, as JSON.")
    if body.startswith(_BOMS):
        raise HttpProblem(400, "The body starts with a byte order mark: send UTF-8 without one.")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise HttpProblem(400, f"The body is not UTF-8 at byte {error.start}: send JSON in UTF-8.") from None
    if b"\0" in body:
        raise HttpProblem(400, "The body holds a NUL byte: one is allowed, at its very end.")


def _check_type(request: web.Request) -> None:
    # Without the header aiohttp says application/octet-stream; many EAs leave it out, and JSON is all there is to send.
    if "Content-Type" in request.headers and request.content_type != JSON:
        raise HttpProblem(
            415, f"The body's type is {request.content_type[:80]}: send JSON with the header Content-Type: {JSON}."
        )


def _unpacker(request: web.Request, limit: int) -> _Gunzip | None:
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return None
    if encoding in ("gzip", "x-gzip"):
        return _Gunzip(limit)
    raise HttpProblem(
        415, f"The body is packed with {encoding[:40]}: send it with gzip or as it is.", {"Accept-Encoding": "gzip"}
    )


async def _collect(request: web.Request, unpacker: _Gunzip | None, limit: int) -> bytearray:
    body = bytearray()
    read = 0
    while chunk := await request.content.readany():
        read += len(chunk)
        if read > limit:
            raise _too_large(limit)
        body += chunk if unpacker is None else unpacker.feed(chunk, limit - len(body))
    if unpacker is not None:
        unpacker.end()
    return body


class _Gunzip:
    """Unpacks gzip piece by piece and stops as soon as more comes out than there is room for."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._member = zlib.decompressobj(GZIP_WBITS)
        self._members = 1

    def feed(self, data: bytes, room: int) -> bytes:
        """What ``data`` unpacks to, at most ``room`` bytes; raises HttpProblem 400 or 413."""
        out = bytearray()
        while data:
            if self._member.eof:
                self._members += 1
                if self._members > MAX_GZIP_MEMBERS:
                    raise HttpProblem(400, f"The body has more than {MAX_GZIP_MEMBERS} gzip members: send one.", _CLOSE)
                self._member = zlib.decompressobj(GZIP_WBITS)
            try:
                out += self._member.decompress(data, room - len(out) + 1)
            except zlib.error as error:
                raise HttpProblem(400, f"The body is not gzip ({error}): pack it again.", _CLOSE) from None
            if len(out) > room:
                raise _too_large(self._limit)
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        return bytes(out)

    def end(self) -> None:
        """Raises HttpProblem 400 where the last member is not whole."""
        if not self._member.eof:
            raise HttpProblem(400, "The gzip body is cut short: pack it again and send it whole.")


def _check_json(body: bytes) -> None:
    """A typed decoder stops at the first wrong type: what is no JSON at all (or no number) still has to be 400."""
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _not_json(body, error) from None


def _not_json(body: bytes, error: Exception) -> HttpProblem:
    if isinstance(error, RecursionError):
        return HttpProblem(400, "The JSON is nested too deeply: candles need three levels.")
    if "surrogate" in str(error) or ("truncated" in str(error) and _LONE_SURROGATE.search(body)):
        return HttpProblem(400, "The JSON holds a lone surrogate: send text in UTF-8.")
    if isinstance(error, msgspec.ValidationError):
        return HttpProblem(400, f"The JSON holds a number that no float can hold: {error}.")
    return HttpProblem(400, f"The body is not one JSON document: {error}.")


def _too_large(limit: int) -> HttpProblem:
    return HttpProblem(
        413, f"The body is over {limit:,} bytes, packed or unpacked: send fewer candles at a time.", _CLOSE
    )
