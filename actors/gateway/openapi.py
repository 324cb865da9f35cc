"""The OpenAPI 3.1 document, made from the message structs; what JSON Schema cannot take from them is composed here."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from actors.gateway.answers import CandleList, FeatureList, HealthReport, ModelDetail, ModelList, Probe
from actors.gateway.gaps import GapReport
from actors.gateway.query import MAX_LIMIT
from actors.gateway.reads import DEFAULT_SIGNALS, DEFAULT_VERSIONS
from schema.messages import IngestAnswer, IngestCandle, Problem, SignalList
from schema.scorecard import Scorecard
from schema.settings import Gateway
from schema.timeframes import TIMEFRAMES

REF: Final = "#/components/schemas/{name}"
STRUCTS: Final = (
    CandleList, FeatureList, GapReport, HealthReport, IngestAnswer, IngestCandle, ModelDetail, ModelList, Probe, Problem, Scorecard,
    SignalList,
)  # fmt: skip

Schema = dict[str, Any]


def document(limits: Gateway, version: str) -> Schema:
    """The whole document; it changes with the structs and the gateway's limits only."""
    _, schemas = msgspec.json.schema_components(STRUCTS, ref_template=REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MT5 trading system",
            "version": version,
            "summary": "Candles in, signals out.",
            "description": (
                'Times are UTC in answers. Every error is `{"error": sentence}`. Without configured keys the gateway '
                "listens on loopback only and asks for none."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"apiKey": []}, {"bearer": []}, {"session": []}],
        "tags": [{"name": name} for name in ("candles", "signals", "models", "operations", "session")],
        "paths": _paths(limits),
        "components": {
            "schemas": {**schemas, **_ingest_schemas(schemas.pop("IngestCandle"), limits.max_candles)},
            "securitySchemes": {
                "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": "mt5_session",
                    "description": "Set by POST /session; reads only.",
                },
            },
        },
    }


# --- POST /ingest ------------------------------------------------------------------------------------------------


def _ingest_schemas(candle: Schema, max_candles: int) -> Schema:
    """The four shapes of a payload; the struct has its aliases side by side, so which are needed is said here."""
    candle = {
        **candle,
        "description": "A candle as senders write it; `ts` (or `time`) is the bar's open time: RFC 3339, epoch seconds or milliseconds.",
        "required": ["open", "high", "low", "close"],
        "allOf": [_any_required("ts", "time")],
    }
    items = {"type": "array", "items": _ref("IngestCandle"), "minItems": 1, "maxItems": max_candles}
    clock = {
        "source": {"type": "string", "description": "The broker's server: candle times are then its server time."},
        "server_time": {"type": "integer", "description": "TimeTradeServer(), epoch seconds."},
        "gmt_time": {"type": "integer", "description": "TimeGMT(), epoch seconds."},
        "point": {"type": "number", "description": "Size of a point, the unit of spread."},
        "history": {"type": "boolean", "description": "Archived and part of features, but no signals are made."},
        "replay": {"type": "boolean", "description": "gmt_time stands in for now."},
    }
    series = {"symbol": {"type": "string"}, **{name: _ref("Timeframe") for name in ("timeframe", "interval")}}
    named = {"properties": {"symbol": {"type": "string"}}, "required": ["symbol"]}
    return {
        "Timeframe": {
            "type": "string",
            "description": f"{', '.join(TIMEFRAMES)}; 1m, 15m, 1h, 4h and 1d are understood.",
            "examples": ["M1"],
        },
        "IngestCandle": candle,
        "OneCandle": {"allOf": [_ref("IngestCandle"), named, _any_required("timeframe", "interval")]},
        "CandleArray": {"type": "array", "items": _ref("OneCandle"), "minItems": 1, "maxItems": max_candles},
        "ItemsPayload": {
            "type": "object",
            "properties": {"items": {**items, "items": _ref("OneCandle")}, **clock},
            "required": ["items"],
        },
        "SeriesPayload": {
            "type": "object",
            "description": "Many candles of one series.",
            "properties": {**series, "candles": items, **clock},
            "required": ["symbol", "candles"],
            "allOf": [_any_required("timeframe", "interval")],
        },
        "IngestPayload": {
            "anyOf": [_ref(name) for name in ("OneCandle", "CandleArray", "ItemsPayload", "SeriesPayload")]
        },
    }


_EXAMPLE: Final[Schema] = {
    "symbol": "EURUSD",
    "timeframe": "M1",
    "candles": [
        {"time": "2025-02-03T09:30:00Z", "open": 1.0312, "high": 1.0315, "low": 1.0311, "close": 1.0314,
         "tick_volume": 84, "spread": 2}
    ],
}  # fmt: skip


def _ingest(limits: Gateway) -> Schema:
    json_body = {"schema": _ref("IngestPayload"), "example": _EXAMPLE}
    return {
        "operationId": "ingest",
        "tags": ["candles"],
        "summary": "Send candles",
        "description": (
            "Answered with 200 only after the log has stored every accepted candle; sending again is safe. The body may "
            f"be packed with gzip; at most {limits.max_body:,} bytes unpacked and {limits.max_candles:,} candles."
        ),
        "parameters": [{
            "name": "Content-Encoding", "in": "header", "schema": {"type": "string", "enum": ["gzip", "identity"]},
        }],
        "requestBody": {"required": True, "content": {"application/json": json_body}},
        "responses": {
            "200": _json("At least one candle was taken, was a duplicate or is forming.", "IngestAnswer"),
            "422": {
                "description": "No candle was taken: each with its reason, or the shape as a whole.",
                "content": {"application/json": {"schema": {"anyOf": [_ref("IngestAnswer"), _ref("Problem")]}}},
            },
            **_problems({
                "400": "Not one JSON document in UTF-8.",
                "408": f"The body was not there within {limits.body_timeout:g} s.",
                "413": "Too many bytes or candles.",
                "415": "Not application/json, or packed otherwise than with gzip.",
            }),
            "429": _retry("More candles than this client may send."),
            "503": _retry("The log did not acknowledge: unknown whether it is stored, send again."),
            **_problems(_DENIED),
        },
    }  # fmt: skip


# --- the other operations ----------------------------------------------------------------------------------------

_DENIED: Final = {
    "401": "The API key is missing or wrong.",
    "403": "A gateway without keys was asked under a foreign name or by a foreign page.",
}
_OPEN: Final[Schema] = {"security": [{}]}

_SYMBOL: Final = "The symbol as the broker spells it."
_LIMIT: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT}
_TIME: Final[Schema] = {"type": "string", "examples": ["2025-02-03T09:30:00Z"]}
_TIME_TEXT: Final = "RFC 3339, epoch seconds or milliseconds; UTC where no offset is given."


def _paths(limits: Gateway) -> Schema:
    return {
        "/ingest": {"post": _ingest(limits)},
        "/signals": {"get": _signals()},
        "/signals/stream": {"get": _stream()},
        "/candles": {"get": _rows("candles", "candles", "Archived candles", "CandleList")},
        "/candles/gaps": {"get": _gaps()},
        "/features": {"get": _rows("features", "candles", "Archived feature rows", "FeatureList")},
        "/models": {"get": _read("models", "models", "Every model's versions", [], "ModelList", archive=True)},
        "/models/{name}": {"get": _model()},
        "/scorecard": {"get": _scorecard()},
        "/health": {"get": _health()},
        "/live": {"get": _probe("live", "Whether the process answers", ready=False)},
        "/ready": {"get": _probe("ready", "Whether candles are taken", ready=True)},
        "/metrics": {"get": _metrics("metrics")},
        "/prometheus": {"get": _metrics("prometheus")},
        "/session": {"post": _session(), "delete": _session_end()},
    }


def _signals() -> Schema:
    operation = _read(
        "signals", "signals", "Signals, newest first",
        [
            _parameter("timeframe", _ref("Timeframe"), "", required=True),
            _parameter("symbol", {"type": "string"}, _SYMBOL),
            _parameter("limit", {**_LIMIT, "default": DEFAULT_SIGNALS}, "At most that many."),
            _parameter("since", _TIME, f"Bars from this time on. {_TIME_TEXT}"),
        ],
        "SignalList",
    )  # fmt: skip
    operation["description"] = "The newest come from memory; without the archive, memory alone answers."
    operation["responses"]["200"]["headers"] = {
        "X-Archive": {
            "description": "`unavailable` where the answer is memory's alone: older signals may be missing.",
            "schema": {"type": "string", "enum": ["ok", "unavailable"]},
        }
    }
    return operation


def _stream() -> Schema:
    operation = _read(
        "signalStream", "signals", "Signals as Server-Sent Events",
        [
            _parameter("timeframe", _ref("Timeframe"), ""),
            _parameter("symbol", {"type": "string"}, _SYMBOL),
            {**_parameter("Last-Event-ID", {"type": "string"}, "Resumes after this event."), "in": "header"},
        ],
        "Problem",
    )  # fmt: skip
    operation["description"] = (
        "A message's data is a Signal and its id the place to resume from. An event `resync` says that signals were left "
        "out: read GET /signals."
    )
    content = {"text/event-stream": {"schema": {"type": "string"}}}
    operation["responses"]["200"] = {"description": "An endless stream.", "content": content}
    operation["responses"]["503"] = _retry("Too many streams are open, or the gateway stops.")
    return operation


def _rows(operation_id: str, tag: str, summary: str, struct: str) -> Schema:
    operation = _read(
        operation_id, tag, summary,
        [
            _parameter("symbol", {"type": "string"}, _SYMBOL, required=True),
            _parameter("timeframe", _ref("Timeframe"), "", required=True),
            _parameter("from", _TIME, f"First bar; without it, the newest bars. {_TIME_TEXT}"),
            _parameter("to", _TIME, f"Last bar, included. {_TIME_TEXT}"),
            _parameter("limit", {**_LIMIT, "default": MAX_LIMIT}, "At most that many rows."),
        ],
        struct,
        archive=True,
    )  # fmt: skip
    operation["description"] = "Oldest first."
    return operation


def _gaps() -> Schema:
    operation = _read(
        "gaps", "candles", "What is missing of a series and why",
        [
            _parameter("symbol", {"type": "string"}, _SYMBOL, required=True),
            _parameter("timeframe", _ref("Timeframe"), "", required=True),
            _parameter("from", _TIME, f"Gaps that reach past this time. {_TIME_TEXT}"),
            _parameter("to", _TIME, f"Gaps that begin by this time. {_TIME_TEXT}"),
            _parameter("limit", {**_LIMIT, "default": MAX_LIMIT}, "At most that many gaps, the newest."),
        ],
        "GapReport",
        archive=True,
    )  # fmt: skip
    operation["description"] = (
        "Oldest first, each span of missing bars with its class: `closed session` (named in the broker's clock), `no tick` or "
        "`transport loss`. Judged by the series' own newest 200,000 bars of that time."
    )
    operation["responses"].update(_problems({"404": "The archive has no such bars."}))
    return operation


def _model() -> Schema:
    name = {**_parameter("name", {"type": "string", "examples": ["rf_m1"]}, "The model.", required=True), "in": "path"}
    limit = _parameter("limit", {**_LIMIT, "default": DEFAULT_VERSIONS}, "At most that many versions.")
    operation = _read(
        "model", "models", "One model's versions and manifests", [name, limit], "ModelDetail", archive=True
    )
    operation["responses"].update(_problems({"404": "No such model."}))
    return operation


def _scorecard() -> Schema:
    operation = _read(
        "scorecard", "models", "What the signals have been worth, beside the base rate",
        [
            _parameter("model", {"type": "string", "examples": ["rf_m1"]}, "A model, or one version of it."),
            _parameter("symbol", {"type": "string"}, _SYMBOL),
            _parameter("timeframe", _ref("Timeframe"), ""),
        ],
        "Scorecard",
    )  # fmt: skip
    operation["description"] = (
        "Over the newest outcomes of each version, symbol and timeframe, five bars after each signal; serving versions first. "
        "Intervals are 95 %, from redrawing blocks of 60 bars."
    )
    operation["responses"]["503"] = _retry("The scorer did not answer within two seconds.")
    return operation


def _health() -> Schema:
    operation = _read("health", "operations", "How the parts do", [], "HealthReport")
    operation["responses"]["503"] = _json("Candles cannot be taken.", "HealthReport")
    return operation


def _probe(operation_id: str, summary: str, *, ready: bool) -> Schema:
    responses = {"200": _json("Yes.", "Probe")}
    if ready:
        responses["503"] = _json("Not yet, or not now.", "Probe")
    return {"operationId": operation_id, "tags": ["operations"], "summary": summary, "responses": responses, **_OPEN}


def _metrics(operation_id: str) -> Schema:
    content = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "operationId": operation_id,
        "tags": ["operations"],
        "summary": "Prometheus metrics of every process",
        "responses": {"200": {"description": "Text format.", "content": content}, **_problems(_DENIED)},
    }


def _session() -> Schema:
    return {
        "operationId": "openSession",
        "tags": ["session"],
        "summary": "Let this browser read",
        "description": "With a key in its header: sets a cookie for reads, since EventSource cannot send a header.",
        "security": [{"apiKey": []}, {"bearer": []}],
        "responses": {"204": {"description": "The cookie is set."}, **_problems(_DENIED)},
    }


def _session_end() -> Schema:
    responses = {"204": {"description": "The cookie is gone."}}
    return {
        "operationId": "closeSession",
        "tags": ["session"],
        "summary": "Forget the key",
        "responses": responses,
        **_OPEN,
    }


# --- pieces ------------------------------------------------------------------------------------------------------


def _read(
    operation_id: str, tag: str, summary: str, parameters: list[Schema], struct: str, *, archive: bool = False
) -> Schema:
    responses: Schema = {"200": _json("Found.", struct)}
    if parameters:
        responses |= _problems({"400": "A parameter is missing or badly written."})
    if archive:
        responses["503"] = _retry("The archive is not reachable.")
    return {
        "operationId": operation_id,
        "tags": [tag],
        "summary": summary,
        "parameters": parameters,
        "responses": {**responses, **_problems(_DENIED)},
    }


def _parameter(name: str, schema: Schema, description: str, *, required: bool = False) -> Schema:
    described = {"description": description} if description else {}
    return {"name": name, "in": "query", "required": required, "schema": schema, **described}


def _json(description: str, struct: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": _ref(struct)}}}


def _problems(descriptions: dict[str, str]) -> Schema:
    return {status: _json(description, "Problem") for status, description in descriptions.items()}


def _retry(description: str) -> Schema:
    headers = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return {**_json(description, "Problem"), "headers": headers}


def _ref(name: str) -> Schema:
    return {"$ref": REF.format(name=name)}


def _any_required(*names: str) -> Schema:
    return {"anyOf": [{"required": [name]} for name in names]}
