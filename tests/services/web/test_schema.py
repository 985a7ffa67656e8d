"""What the API says of itself is so: requests made of its description, good and bad ones, get what it promises."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving import Served, Serving

# The server's threads use the random module while requests are being made up.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")

EXAMPLES = 6
# Never ends: it is asked for otherwise.
STREAM = "/api/v1/stream"
TABLES = ("candles", "features", "big-trades", "pressure", "rollups", "signals", "gaps")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
GENERATED = settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def operations(served: Served) -> dict[str, Any]:
    """What the description has, by method and path."""
    schema = schemathesis.openapi.from_dict(served.get("/openapi.json"))
    found = (result.ok() for result in schema.get_all_operations())
    return {f"{op.method.upper()} {op.path}": op for op in found if op.path != STREAM}


def asked(served: Served, operation: Any, mode: GenerationMode) -> list[int]:
    """The statuses of generated requests, each of which was answered as described."""
    statuses: list[int] = []

    @GENERATED
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        response = case.call(base_url=served.base, timeout=20)
        case.validate_response(response, checks=CHECKS)
        statuses.append(response.status_code)
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"code", "message"}
            assert error["message"].strip()
            assert "\n" not in error["message"]

    ask()
    return statuses


def test_good_requests_get_what_is_described(serving: Serving, market: str) -> None:
    served = serving(tapeline_store=market)
    found = operations(served)
    assert {f"GET /api/v1/{name}" for name in (*TABLES, "instruments", "pipeline", "meta", "alerts")} <= found.keys()
    for name, operation in found.items():
        statuses = asked(served, operation, GenerationMode.POSITIVE)
        assert statuses, name
        assert max(statuses) < 500, (name, statuses)


def test_bad_requests_are_refused(serving: Serving, market: str) -> None:
    served = serving(tapeline_store=market)
    for name, operation in operations(served).items():
        if operation.query or operation.body:
            statuses = asked(served, operation, GenerationMode.NEGATIVE)
            assert statuses, name
            assert all(400 <= status < 500 for status in statuses), (name, statuses)


def test_the_examples_of_the_description_work(serving: Serving, market: str) -> None:
    """What somebody tries first: each parameter as its example has it."""
    served = serving(tapeline_store=market)
    for path, methods in served.get("/openapi.json")["paths"].items():
        if path.removeprefix("/api/v1/") not in (*TABLES, "instruments"):
            continue
        told = {p["name"]: p["schema"] for p in methods["get"]["parameters"]}
        query = {name: schema["examples"][0] for name, schema in told.items() if "examples" in schema}
        query.pop("columns", None)
        answer = served.ask(f"{path}?{urlencode(query)}")
        assert answer.status == 200, (path, query, answer.body)
