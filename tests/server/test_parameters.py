"""Every parameter of every peer is done, ignored because it changes nothing, or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.extras import IGNORED, REFUSED
from tests.server.conftest import Server

DOCS = Path(__file__).parents[2] / "docs/api.md"
MODELS = {"chat": ChatRequest, "text": CompletionRequest}


def verdict(endpoint: str, name: str) -> str:
    if name in MODELS[endpoint].model_fields:
        return "done"
    return "refused" if name in REFUSED else "ignored" if name in IGNORED else "unknown"


def documented() -> dict[str, dict[str, str]]:
    """The verdicts of docs/api.md: by parameter and endpoint."""
    text = DOCS.read_text().partition("## Parameters")[2]
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \| (\w+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == len({name for name, *_ in rows}), "a parameter stands there twice"
    assert all(reason.strip() for *_, reason in rows)
    return {name: {"chat": chat, "text": text} for name, chat, text, _ in rows}


def test_the_table_is_what_the_code_does() -> None:
    known = {*REFUSED, *IGNORED, *ChatRequest.model_fields, *CompletionRequest.model_fields}
    found = documented()
    assert set(found) == known
    for name in known:
        assert found[name] == {endpoint: verdict(endpoint, name) for endpoint in MODELS}, name


def test_no_parameter_is_refused_and_ignored_or_done_everywhere() -> None:
    everywhere = ChatRequest.model_fields.keys() & CompletionRequest.model_fields.keys()
    assert not IGNORED & REFUSED.keys()
    assert not everywhere & (IGNORED | REFUSED.keys())


@pytest.mark.parametrize("endpoint", MODELS)
def test_every_parameter_of_openai_and_of_the_other_endpoint_is_known(endpoint: str) -> None:
    openai = {
        *get_type_hints(chat_params.CompletionCreateParamsBase),
        *get_type_hints(text_params.CompletionCreateParamsBase),
    }
    ours = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert {name for name in openai | ours if verdict(endpoint, name) == "unknown"} == set()


async def post(server: Server, endpoint: str, **body: Any) -> Any:
    if endpoint == "chat":
        return await server.chat(max_tokens=1, **body)
    return await server.post("/v1/completions", {"prompt": "hi", "max_tokens": 1} | body)


@pytest.mark.parametrize("endpoint", MODELS)
async def test_what_is_refused_is_named_and_what_asks_for_nothing_is_accepted(
    server: Server, endpoint: str
) -> None:
    for name in REFUSED.keys() - MODELS[endpoint].model_fields:
        reply = await post(server, endpoint, **{name: "something"})
        assert reply.status_code == 400, name
        error = reply.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert "is not supported by this server." in error["message"]
        for neutral in (None, *REFUSED[name]):
            reply = await post(server, endpoint, **{name: neutral})
            assert reply.status_code == 200, (name, neutral, reply.text)


@pytest.mark.parametrize("endpoint", MODELS)
async def test_what_is_ignored_changes_nothing(server: Server, endpoint: str) -> None:
    plain = (await post(server, endpoint, temperature=0)).json()
    names = IGNORED - set(MODELS[endpoint].model_fields)
    more = dict.fromkeys(names, "something")
    ignoring = (await post(server, endpoint, temperature=0, **more)).json()
    assert ignoring["choices"] == plain["choices"]
    info = (await server.http.get("/server_info")).json()
    assert info["num_unknown_fields_ignored"] == 0, "they are known"


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_of", True), ("priority", False), ("length_penalty", True), ("n_probs", False)],
)
async def test_a_truth_value_is_no_number(server: Server, name: str, value: bool) -> None:
    assert (await server.complete(**{name: value})).status_code == 400


@pytest.mark.parametrize("value", [-(2**63) - 1, -(10**40), 2**64, 10**40])
@pytest.mark.parametrize("name", ["seed", "top_k", "n", "min_tokens"])
async def test_an_integer_beyond_64_bits_is_an_integer(
    server: Server, name: str, value: int
) -> None:
    error = (await server.complete(**{name: value})).json()["error"]
    side = "above_max" if value > 0 else "below_min"
    assert (error["param"], error["code"]) == (name, f"integer_{side}_value")
