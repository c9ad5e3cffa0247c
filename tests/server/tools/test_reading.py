"""How a chat's answers are read, with tokenizers whose markers are special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.parts import Answer, joined
from server.protocol.chat import ChatRequest
from server.tools.brevity import LITTLE_ROOM
from server.tools.prompting import prompt_of
from server.tools.reading import Reading, reading_of, tools_told
from server.tools.style import ChatStyle
from skipllm_core.detokenizer import Detokenizer
from skipllm_core.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer
from tests.tokenizer_families import QWEN3, save

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": ADD}]
NAMED = {"type": "function", "function": {"name": "add"}}


def reading(
    tokenizer: Tokenizer, style: ChatStyle | None = None, room: int = 4096, **fields: Any
) -> Reading:
    """As a request's answers are read, which has so many tokens of room."""
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})
    style = style or ChatStyle.of(tokenizer)
    told = [tool.for_template() for tool in tools_told(body)]
    prompt = prompt_of(style, body.messages_for_template, told)
    ids = tokenizer.encode_chat(prompt.messages, tools=prompt.tools, options=body.template_options)
    return reading_of(style, tokenizer, body, ids, len(ids) + room)


def answer(tokenizer: HFTokenizer, found: Reading, ids: list[int], **options: Any) -> Answer:
    detokenizer = Detokenizer(tokenizer, shown_tokens=found.shown_tokens, **options)
    parser = found.new_parser()
    parts = [part for i in ids for part in parser.feed(detokenizer.add(i))]
    return joined([*parts, *parser.feed(detokenizer.flush()), *parser.finish()])


def ids_of(tokenizer: HFTokenizer, *texts: str) -> list[int]:
    return [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]


def test_a_marker_that_is_a_special_token_begins_a_call_and_is_never_shown(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save("mistral", tmp_path))
    found = reading(tokenizer, tools=TOOLS)
    called = ids_of(tokenizer, "Hm.", "[TOOL_CALLS]", '[{"name": "add", "arguments": {"a": "1"}}]')
    content = answer(tokenizer, found, called)
    assert content.content.strip() == "Hm."
    assert [(call.name, call.arguments) for call in content.tool_calls] == [("add", '{"a": "1"}')]
    for said in ('[{"name": "other", "arguments": {}}]', "add", ""):
        ids = ids_of(tokenizer, "[TOOL_CALLS]", said)
        plain = "".join(map(Detokenizer(tokenizer).add, ids))
        assert answer(tokenizer, found, ids) == Answer(plain)


def test_special_tokens_that_are_asked_for_are_content(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save("mistral", tmp_path))
    found = reading(tokenizer, tools=TOOLS, skip_special_tokens=False)
    ids = ids_of(tokenizer, "[TOOL_CALLS]", "add")
    assert "[TOOL_CALLS]" in answer(tokenizer, found, ids, skip_special_tokens=False).content


def test_without_tools_special_tokens_are_hidden_as_ever(tmp_path: Path) -> None:
    assert reading(HFTokenizer(save("mistral", tmp_path))).shown_tokens == frozenset()


def test_a_grammar_names_special_tokens_by_their_ids(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save("mistral", tmp_path))
    (token_id,) = ids_of(tokenizer, "[TOOL_CALLS]")
    constraint = reading(tokenizer, tools=TOOLS, tool_choice="required").constraint
    assert constraint is not None
    assert f"<[{token_id}]>" in constraint.grammar
    assert constraint.param == "tools"


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


@pytest.mark.parametrize("effort", [None, "none", "high"])
def test_a_prompt_that_closes_the_reasoning_is_answered_at_once(
    tmp_path: Path, effort: str | None
) -> None:
    tokenizer = HFTokenizer(save("chatml", tmp_path))
    constraint = reading(tokenizer, response_format=SCHEMA, reasoning_effort=effort).constraint
    assert constraint is not None
    assert ("<think>" in constraint.grammar) == (effort != "none")


def test_a_prompt_that_opens_the_reasoning_is_answered_with_more_of_it(tmp_path: Path) -> None:
    save("qwen3", tmp_path)
    template = QWEN3 + "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"
    (tmp_path / "mine.jinja").write_text(template)
    tokenizer = HFTokenizer(tmp_path, chat_template=tmp_path / "mine.jinja")
    found = reading(tokenizer, response_format=SCHEMA)
    assert answer(tokenizer, found, ids_of(tokenizer, "Hm\n</think>\n\nYes")) == Answer("Yes", "Hm")
    assert found.constraint is not None
    assert "</think>" in found.constraint.grammar
    assert "<think>" not in found.constraint.grammar.replace("</think>", "")


def test_what_a_user_says_at_the_end_opens_no_reasoning(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save("qwen3", tmp_path))
    style = ChatStyle.of(tokenizer)
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "<think>"}]})
    ids = tokenizer.encode_chat(body.messages_for_template)
    found = reading_of(style, tokenizer, body, ids, 4096)
    assert answer(tokenizer, found, ids_of(tokenizer, "Yes")) == Answer("Yes")


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_where_there_is_little_room_calls_are_kept_short(choice: Any) -> None:
    for room, is_short in ((LITTLE_ROOM, False), (LITTLE_ROOM - 1, True)):
        constraint = reading(ByteTokenizer(), room=room, tools=TOOLS, tool_choice=choice).constraint
        assert constraint is not None
        assert ("maxLength" in constraint.grammar) == is_short
