"""Bodies as terminals, proxies and attackers send them, over real sockets; keys, sessions and allowances."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from actors.gateway.auth import CLIENT, MAX_CLIENTS, SESSION_SECONDS, Guard, RateLimiter, check_bind, is_loopback
from actors.gateway.body import MAX_GZIP_MEMBERS, decode_json, read_body
from actors.gateway.problems import answer
from bus.supervise import ConfigurationError
from schema.messages import Candle
from schema.settings import Gateway
from tests.gateway import Served, served

JSON = {"Content-Type": "application/json"}
GZIP = {**JSON, "Content-Encoding": "gzip"}
LIMITS = Gateway(body_timeout=0.3, max_body=200_000)
VALUE = {"symbol": "EURUSD.m", "note": "Ünïcödé 💹", "rows": [1.5, 2, None, True]}
ENCODED = msgspec.json.encode(VALUE)


def routes(limits: Gateway) -> Any:
    """POST /any echoes whatever JSON it gets; POST /candle wants a Candle; POST /fail fails."""

    async def any_json(request: web.Request) -> web.StreamResponse:
        return answer(decode_json(await read_body(request, limits), msgspec.json.Decoder()))

    async def candle(request: web.Request) -> web.StreamResponse:
        return answer(decode_json(await read_body(request, limits), msgspec.json.Decoder(Candle)))

    async def fail(_: web.Request) -> web.StreamResponse:
        raise ZeroDivisionError("secret detail")

    def made(guard: Guard) -> list[web.RouteDef]:
        async def charge(request: web.Request) -> web.StreamResponse:
            guard.charge(request, int(request.query["candles"]))
            return answer({"client": request[CLIENT]})

        return [
            web.post("/any", any_json),
            web.post("/candle", candle),
            web.post("/fail", fail),
            web.post("/charge", charge),
        ]

    return made


@pytest.fixture
async def echo() -> Any:
    async with served(settings=LIMITS, more=routes(LIMITS)) as running:
        yield running


async def post(
    running: Served, body: Any, headers: dict[str, str] = JSON, path: str = "/any"
) -> tuple[int, Any, aiohttp.ClientResponse]:
    async with running.client.post(path, data=body, headers=headers) as response:
        return response.status, await response.json(), response


async def raw(running: Served, *pieces: bytes | float) -> bytes:
    """Sends pieces over a socket (a number waits that long) and reads until the server closes or answers whole."""
    reader, writer = await asyncio.open_connection(running.host, running.port)
    try:
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            else:
                await asyncio.sleep(piece)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        )
        return head + await reader.readexactly(length)
    finally:
        writer.close()


def head(length: int | None = None, **headers: str) -> bytes:
    lines = ["POST /any HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {length}"] if length is not None else ["Transfer-Encoding: chunked"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


# --- what is taken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (ENCODED, JSON),
        (ENCODED, {"Content-Type": "application/json; charset=utf-8"}),
        (ENCODED, {"Content-Type": "Application/JSON"}),
        (ENCODED + b"\0", JSON),
        (b" \r\n" + ENCODED + b"\r\n ", JSON),
        (gzip.compress(ENCODED), GZIP),
        (gzip.compress(ENCODED + b"\0"), GZIP),
        (gzip.compress(ENCODED[:10]) + gzip.compress(ENCODED[10:]), GZIP),
        (ENCODED, {**JSON, "Content-Encoding": "identity"}),
    ],
    ids=["plain", "charset", "case", "nul", "space", "gzip", "gzip+nul", "two members", "identity"],
)
async def test_taken(echo: Served, body: bytes, headers: dict[str, str]) -> None:
    assert (await post(echo, body, headers))[:2] == (200, VALUE)


async def test_a_body_without_a_type_is_taken_as_json(echo: Served) -> None:
    request = head(len(ENCODED)).replace(b"Content-Type: application/json\r\n", b"")
    assert (await raw(echo, request, ENCODED)).endswith(ENCODED)


async def test_a_chunked_gzip_body_split_anywhere_is_taken(echo: Served) -> None:
    packed = gzip.compress(ENCODED)
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in packed)
    assert (await raw(echo, head(Content_Encoding="gzip"), pieces, b"0\r\n\r\n")).endswith(ENCODED)


async def test_expect_100_continue_is_answered(echo: Served) -> None:
    async with echo.client.post("/any", data=ENCODED, headers=JSON, expect100=True) as response:
        assert response.status == 200


async def test_exactly_the_limit_is_taken_and_one_byte_more_is_not(echo: Served) -> None:
    fits = b'"' + b"x" * (LIMITS.max_body - 2) + b'"'
    assert (await post(echo, fits))[0] == 200
    assert (await post(echo, gzip.compress(fits), GZIP))[0] == 200
    for body, headers in ((fits + b" ", JSON), (gzip.compress(fits + b" "), GZIP)):
        status, problem, _ = await post(echo, body, headers)
        assert (status, problem["error"]) == (
            413,
            "The body is over 200,000 bytes, packed or unpacked: send fewer candles at a time.",
        )


# --- what is refused ---------------------------------------------------------------------------------------------

NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is empty: send a candle, or an array of candles, as JSON."),
        (b"\0", "The body is empty: send a candle, or an array of candles, as JSON."),
        (b"{}\0\0", "The body holds a NUL byte: one is allowed, at its very end."),
        (b'{"a":"\0"}', "The body holds a NUL byte: one is allowed, at its very end."),
        (b"\xef\xbb\xbf{}", "The body starts with a byte order mark: send UTF-8 without one."),
        ("{}".encode("utf-16"), "The body starts with a byte order mark: send UTF-8 without one."),
        (b'{"a":"\xff"}', "The body is not UTF-8 at byte 6: send JSON in UTF-8."),
        (b'{"a":"\xed\xa0\x80"}', "The body is not UTF-8 at byte 6: send JSON in UTF-8."),
        (b'{"a":"\\ud800x"}', "The JSON holds a lone surrogate"),
        (b'{"a":"\\ud800\\u0041"}', "The JSON holds a lone surrogate"),
        (b"{}{}", "The body is not one JSON document: JSON is malformed: trailing characters (byte"),
        (b"{} []", "The body is not one JSON document"),
        (NESTED, "The JSON is nested too deeply: candles need three levels."),
        (NESTED + b"]" * 100_000, "The JSON is nested too deeply: candles need three levels."),
        (b'{"a":' * 20_000, "The JSON is nested too deeply: candles need three levels."),
        (b'{"a":NaN}', "The body is not one JSON document"),
        (b'{"a":-Infinity}', "The body is not one JSON document"),
        (b'{"a":1e999}', "The JSON holds a number that no float can hold"),
        (b"{'a':1}", "The body is not one JSON document"),
        (b'{"a":1', "The body is not one JSON document: Input data was truncated."),
        (b"symbol=EURUSD", "The body is not one JSON document"),
        (b"   ", "The body is not one JSON document"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else "",
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
async def test_not_json(echo: Served, body: bytes, sentence: str, packed: bool) -> None:
    sent, headers = (gzip.compress(body), GZIP) if packed else (body, JSON)
    status, problem, response = await post(echo, sent, headers)
    assert status == 400
    assert problem["error"].startswith(sentence)
    assert set(problem) == {"error"}
    assert response.content_type == "application/json"


@pytest.mark.parametrize(
    ("content_type", "named"),
    [
        ("text/plain", "text/plain"),
        ("application/x-www-form-urlencoded", "application/x-www-form-urlencoded"),
        ("multipart/form-data; boundary=x", "multipart/form-data"),
        ("application/jsonp", "application/jsonp"),
        ("nonsense", "application/octet-stream"),
    ],
)
async def test_another_type(echo: Served, content_type: str, named: str) -> None:
    status, problem, _ = await post(echo, ENCODED, {"Content-Type": content_type})
    assert (status, problem["error"]) == (
        415,
        f"The body's type is {named}: send JSON with the header Content-Type: application/json.",
    )


@pytest.mark.parametrize("encoding", ["deflate", "br", "zstd", "gzip, gzip"])
async def test_another_packing(echo: Served, encoding: str) -> None:
    answered = await raw(echo, head(len(ENCODED), Content_Encoding=encoding), ENCODED)
    assert answered.startswith(b"HTTP/1.1 415")
    assert b"Accept-Encoding: gzip" in answered
    assert f"packed with {encoding}: send it with gzip or as it is.".encode() in answered


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (ENCODED, "The body is not gzip ("),
        (zlib.compress(ENCODED), "The body is not gzip ("),
        (gzip.compress(ENCODED)[:-4], "The gzip body is cut short: pack it again and send it whole."),
        (gzip.compress(ENCODED)[:5], "The gzip body is cut short: pack it again and send it whole."),
        (gzip.compress(ENCODED)[:-8] + b"\0" * 8, "The body is not gzip ("),
        (gzip.compress(ENCODED) + b"tail", "The body is not gzip ("),
        (b"", "The gzip body is cut short: pack it again and send it whole."),
        (gzip.compress(b"") * (MAX_GZIP_MEMBERS + 1), f"The body has more than {MAX_GZIP_MEMBERS} gzip members"),
    ],
    ids=["plain", "zlib", "no trailer", "header only", "wrong checksum", "tail", "empty", "members"],
)
async def test_broken_gzip(echo: Served, body: bytes, sentence: str) -> None:
    status, problem, _ = await post(echo, body, GZIP)
    assert status == 400
    assert problem["error"].startswith(sentence)


@pytest.mark.parametrize("shape", ["one", "nested members"])
async def test_a_gzip_bomb_costs_no_more_than_the_limit(echo: Served, shape: str) -> None:
    bomb = gzip.compress(b" " * 60_000_000) if shape == "one" else gzip.compress(b" " * 100_000) * 10
    assert len(bomb) < LIMITS.max_body
    status, problem, _ = await post(echo, bomb, GZIP)
    assert status == 413
    assert "packed or unpacked" in problem["error"]


async def test_a_large_announced_body_is_refused_before_it_is_read(echo: Served) -> None:
    answered = await raw(echo, head(10**12))
    assert answered.startswith(b"HTTP/1.1 413")
    assert b"Connection: close" in answered


async def test_an_endless_chunked_body_is_cut_off(echo: Served) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert (await raw(echo, head(), *[chunk] * 4)).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("pieces", [[], [b"{", 0.1, b'"a":', 0.1, b"1", 0.1, b" "]], ids=["silent", "trickled"])
async def test_a_body_that_is_not_there_in_time(echo: Served, pieces: list[bytes | float]) -> None:
    answered = await raw(echo, head(500), *pieces)
    assert answered.startswith(b"HTTP/1.1 408")
    assert b"The body was not there within 0.3 s: send it at once." in answered


@pytest.mark.parametrize("request_", [head() + b"2\r\n{}XX", b"\x16\x03\x01TLS?\r\n\r\n", b"POST /any HTTP/9\r\n\r\n"])
async def test_what_is_no_http_is_400_without_a_traceback(
    echo: Served, request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert b" 400 Bad Request\r\n" in await raw(echo, request_)
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_sender_that_hangs_up_disturbs_nobody(echo: Served) -> None:
    _, writer = await asyncio.open_connection(echo.host, echo.port)
    writer.write(head(500) + b"{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await post(echo, ENCODED))[0] == 200


async def test_another_shape_is_422_unless_it_is_no_json_at_all(echo: Served) -> None:
    assert (await post(echo, b'{"ts":"2025-02-03T09:30:00Z"}', path="/candle"))[0] == 422
    status, problem, _ = await post(echo, b'{"ts":1} trailing', path="/candle")
    assert (status, problem["error"][:34]) == (400, "The body is not one JSON document:")
    assert (await post(echo, b'{"open":1e999}', path="/candle"))[0] == 400


# --- errors of every kind have one shape -------------------------------------------------------------------------


async def test_errors_are_sentences_and_never_tracebacks(echo: Served) -> None:
    status, problem, _ = await post(echo, b"", path="/fail")
    assert status == 500
    assert "secret" not in problem["error"]
    assert "details under" in problem["error"]
    status, problem, _ = await post(echo, ENCODED, path="/nowhere")
    assert (status, problem) == (404, {"error": "There is nothing at this path: /docs lists what there is."})
    async with echo.client.put("/any") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await response.json())["error"] == "This path takes POST, not PUT."


# --- keys --------------------------------------------------------------------------------------------------------

KEYS = ("first-key", "second key with spaces")
REFUSED = "A valid API key is needed: send it in the header X-API-Key, or as Authorization: Bearer."


@pytest.fixture
async def keyed() -> Any:
    settings = Gateway(host="0.0.0.0", api_keys=KEYS)
    async with served(settings=settings, more=routes(settings)) as running:
        yield running


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": KEYS[0]},
        {"X-API-Key": KEYS[1]},
        {"Authorization": f"Bearer {KEYS[0]}"},
        {"Authorization": f"bearer  {KEYS[1]}"},
        {"X-API-Key": "wrong", "Authorization": f"Bearer {KEYS[0]}"},
    ],
)
async def test_a_key_opens(keyed: Served, headers: dict[str, str]) -> None:
    async with keyed.client.get("/signals?timeframe=M1", headers=headers) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": ""},
        {"X-API-Key": "wrong"},
        {"X-API-Key": "first-ke"},
        {"X-API-Key": "first-key1"},
        {"X-API-Key": "schlüssel"},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": KEYS[0]},
        {"Cookie": "mt5_session=99999999999.00"},
        {"Cookie": "mt5_session=x"},
    ],
)
@pytest.mark.parametrize("path", ["/signals?timeframe=M1", "/signals/stream", "/health", "/metrics", "/nowhere"])
async def test_missing_and_wrong_keys_look_alike(keyed: Served, headers: dict[str, str], path: str) -> None:
    async with keyed.client.get(path, headers=headers) as response:
        assert response.status == 401
        assert await response.json() == {"error": REFUSED}
        assert response.headers["WWW-Authenticate"] == 'Bearer realm="mt5"'


@pytest.mark.parametrize("path", ["/live", "/ready", "/", "/docs", "/openapi.json", "/web/app.js"])
async def test_probes_and_pages_are_open(keyed: Served, path: str) -> None:
    async with keyed.client.get(path) as response:
        assert response.status == 200


async def test_a_session_reads_and_only_reads() -> None:
    now = 1_700_000_000.0
    settings = Gateway(host="0.0.0.0", api_keys=KEYS)
    guard = Guard(settings, wall_clock=lambda: now)
    async with served(settings=settings, guard=guard, more=routes(settings)) as running:
        async with running.client.post("/session") as response:
            assert response.status == 401
        async with running.client.post("/session", headers={"X-API-Key": KEYS[0]}) as response:
            assert response.status == 204
            cookie = response.cookies["mt5_session"]
            assert cookie["httponly"]
            assert cookie["samesite"] == "Strict"
        session = {"Cookie": f"mt5_session={cookie.value}"}
        read, write = "/signals?timeframe=M1", "/any"
        async with running.client.get(read, headers=session) as response:
            assert response.status == 200
        async with running.client.post(write, data=ENCODED, headers={**JSON, **session}) as response:
            assert response.status == 401
        expires, _, mac = cookie.value.partition(".")
        for forged in (f"{int(expires) + 1}.{mac}", f"{expires}.{mac[:-1]}", f"{expires}.{mac}0"):
            async with running.client.get(read, headers={"Cookie": f"mt5_session={forged}"}) as response:
                assert response.status == 401
        async with running.client.delete("/session") as response:
            assert response.status == 204
            assert response.cookies["mt5_session"].value == ""
        now += SESSION_SECONDS
        async with running.client.get(read, headers=session) as response:
            assert response.status == 401
    now -= SESSION_SECONDS
    without_it = Gateway(host="0.0.0.0", api_keys=KEYS[1:])
    async with (
        served(settings=without_it, guard=Guard(without_it, wall_clock=lambda: now)) as running,
        running.client.get(read, headers=session) as response,
    ):
        assert response.status == 401, "a session ends with its key"


# --- without keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:8001", "localhost", "LOCALHOST:9", "[::1]:8001", "127.1.2.3"])
async def test_a_keyless_gateway_answers_to_loopback_names(echo: Served, host: str) -> None:
    async with echo.client.get("/signals?timeframe=M1", headers={"Host": host}) as response:
        assert response.status == 200


async def test_a_keyless_gateway_does_not_answer_to_a_foreign_name(echo: Served) -> None:
    async with echo.client.get("/signals?timeframe=M1", headers={"Host": "attacker.example:8001"}) as response:
        assert response.status == 403
        assert "set MT5_API_KEYS" in (await response.json())["error"]


async def test_a_foreign_page_may_not_write_but_our_own_may(echo: Served) -> None:
    foreign = {**JSON, "Origin": "https://attacker.example"}
    assert (await post(echo, ENCODED, foreign))[0] == 403
    assert (await post(echo, ENCODED, {**JSON, "Origin": "null"}))[0] == 403
    assert (await post(echo, ENCODED, {**JSON, "Origin": echo.url}))[0] == 200


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.168.1.5", False),
        ("localhost.example.com", False),
    ],
)
def test_only_loopback_may_do_without_a_key(host: str, inside: bool) -> None:
    assert is_loopback(host) is inside
    check_bind(Gateway(host=host, api_keys=("k",)))
    if inside:
        check_bind(Gateway(host=host))
    else:
        with pytest.raises(ConfigurationError, match="without a key: set MT5_API_KEYS"):
            check_bind(Gateway(host=host))


@pytest.mark.parametrize("key", ["", " padded", "ключ", "line\nbreak"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ConfigurationError, match="API key 2 cannot be sent"):
        check_bind(Gateway(api_keys=("good", key)))


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_limit_of_nothing_is_refused(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="rate_limit"):
        check_bind(Gateway(rate_limit=rate))


# --- allowances --------------------------------------------------------------------------------------------------


def test_a_bucket_fills_at_its_rate_and_holds_one_second() -> None:
    limiter = RateLimiter(10.0)
    assert [limiter.take("a", 5, 0.0) for _ in range(2)] == [0.0, 0.0]
    assert limiter.take("a", 1, 0.0) == pytest.approx(0.1)
    assert limiter.take("b", 1, 0.0) == 0.0, "each client has its own"
    assert limiter.take("a", 5, 0.5) == 0.0
    assert limiter.take("a", 11, 100.0) == 0.0, "more than a full bucket is served from a full one"
    assert limiter.take("a", 10, 100.0) == pytest.approx(1.1), "and leaves it in debt"
    assert limiter.take("a", 5_000, 101.1) == 0.0


def test_the_table_of_clients_is_bounded() -> None:
    limiter = RateLimiter(1.0, max_clients=10)
    for client in range(1_000):
        limiter.take(str(client), 1, 0.0)
    assert len(limiter._buckets) == 10
    assert MAX_CLIENTS < 10_000


async def test_too_many_candles_are_429_with_the_time_to_wait() -> None:
    now = 0.0
    settings = Gateway(rate_limit=100.0)
    guard = Guard(settings, clock=lambda: now)
    async with served(settings=settings, guard=guard, more=routes(settings)) as running:
        assert (await post(running, b"", path="/charge?candles=250"))[0] == 200
        status, problem, response = await post(running, b"", path="/charge?candles=30")
        assert (status, problem["error"]) == (429, "Too many candles: send them again in 2 s.")
        assert response.headers["Retry-After"] == "2"
        now = 2.0
        assert (await post(running, b"", path="/charge?candles=30"))[0] == 200


async def test_loopback_has_no_limit_unless_set_and_others_have(keyed: Served) -> None:
    headers = {"X-API-Key": KEYS[0]}
    assert (await post(keyed, b"", headers, path="/charge?candles=100000"))[0] == 200
    assert (await post(keyed, b"", headers, path="/charge?candles=5000"))[0] == 429
    assert (await post(keyed, b"", {"X-API-Key": KEYS[1]}, path="/charge?candles=5000"))[0] == 200
    async with served(more=routes(LIMITS)) as loopback:
        for _ in range(3):
            assert (await post(loopback, b"", path="/charge?candles=100000"))[0] == 200
