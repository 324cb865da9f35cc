"""The OpenAPI document: sound by itself, true to the routes that are served, and its payload schema to real payloads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest

from actors.gateway.openapi import document
from schema.settings import Gateway
from tests.gateway import served

DOCUMENT = msgspec.json.decode(msgspec.json.encode(document(Gateway(), "0.1.0")))
METHODS = {"get", "post", "put", "delete", "patch"}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            assert method in METHODS
            yield path, method, operation


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    )


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    names = {reference.removeprefix("#/components/schemas/") for reference in references(DOCUMENT)}
    assert names == set(DOCUMENT["components"]["schemas"])


@pytest.mark.parametrize("name", DOCUMENT["components"]["schemas"])
def test_schemas_are_json_schema_2020_12(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(DOCUMENT["components"]["schemas"][name])


def test_operations_are_whole() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(ids) == len(set(ids))
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for path, _, operation in operations():
        assert operation["summary"]
        assert set(operation["tags"]) <= tags
        assert all(response["description"] for response in operation["responses"].values())
        in_path = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path))
        for scheme in operation.get("security", DOCUMENT["security"]):
            assert set(scheme) <= set(DOCUMENT["components"]["securitySchemes"])


async def test_the_document_lists_what_is_served_and_who_may_ask() -> None:
    settings = Gateway(host="0.0.0.0", api_keys=("k",))
    async with served(settings=settings) as running:
        routes = {
            (route.resource.canonical, route.method.lower())
            for route in running.app_runner.app.router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
        pages = {"/", "/docs", "/openapi.json"}
        spoken = {route for route in routes if route[0] not in pages and not route[0].startswith("/web/")}
        # POST /ingest is the collector's own.
        assert spoken | {("/ingest", "post")} == {(path, method) for path, method, _ in operations()}
        for path, method, operation in operations():
            async with running.client.request(method, path.replace("{name}", "x")) as response:
                open_to_all = operation.get("security") == [{}]
                assert (response.status == 401) is not open_to_all, path
                assert str(response.status) in operation["responses"]
        async with running.client.get("/openapi.json") as response:
            assert await response.json() == DOCUMENT


BAR = {"open": 1.0, "high": 1.0, "low": 1.0, "close": 1.0}
ONE = {"symbol": "EURUSD", "timeframe": "M1", "time": 1738575000, "tick_volume": 3, **BAR}


@pytest.mark.parametrize(
    "payload",
    [
        ONE,
        {**ONE, "time": "2025-02-03T09:30:00Z", "closed": True, "spread": 2, "real_volume": 0},
        {"symbol": "EURUSD", "interval": "1m", "ts": 1738575000123, "volume": 1, **BAR},
        [ONE, ONE],
        {"items": [ONE], "source": "Broker-Demo", "server_time": 1738582200, "gmt_time": 1738575000},
        {"symbol": "EURUSD", "timeframe": "H1", "candles": [{"ts": 1738575000, "volume": 1, **BAR}], "history": True},
        {"symbol": "EURUSD", "interval": "1h", "candles": [{"ts": 1738575000, **BAR}], "replay": True, "gmt_time": 1},
    ],
)
def test_payloads_of_every_shape_are_valid(payload: Any) -> None:
    validator("IngestPayload").validate(payload)


@pytest.mark.parametrize(
    "payload",
    [
        {},
        [],
        "EURUSD",
        BAR,
        {**ONE, "symbol": None},
        {**ONE, "open": "1.0"},
        {"items": []},
        {"candles": [{"ts": 1, **BAR}], "timeframe": "M1"},
        {"candles": [{"ts": 1, **BAR}], "symbol": "EURUSD"},
        {"candles": [BAR], "symbol": "EURUSD", "timeframe": "M1"},
    ],
)
def test_other_payloads_are_not(payload: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator("IngestPayload").validate(payload)


def test_the_example_is_valid() -> None:
    media = DOCUMENT["paths"]["/ingest"]["post"]["requestBody"]["content"]["application/json"]
    validator("IngestPayload").validate(media["example"])


def test_limits_are_those_in_force() -> None:
    text = str(document(Gateway(max_candles=7, max_body=99, body_timeout=1.5), "1"))
    for said in ("99 bytes", "7 candles", "within 1.5 s", "'maxItems': 7"):
        assert said in text
