"""Calls and reasoning in what a model says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.parts import (
    Answer,
    AnswerParser,
    Content,
    ToolCall,
    ToolCallArguments,
    ToolCallBegin,
    joined,
)
from server.tools.families import HERMES, LLAMA3_JSON, MISTRAL, Family, new_id, new_short_id
from tests.server.tools.parsing import FAMILIES, WRITERS, parser, parts, read

PARIS = '{"city": "Paris",\n "note": "a \\"}]<tool_call> {"}'
MARKERS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<think>", "</think>", "```", "```json",
]  # fmt: skip
FRAGMENTS = [
    *MARKERS, "\n", " ", ";", ",", "{", "}", "[", "]", '"', "\\", ":", "a", "é🦊", "null", "12",
    "get_weather", "add", "nope", '"name": ', '"get_weather"', '"arguments": ', '"parameters": ',
    '{"name": "add", "arguments": ', '{"name": "get_weather", "parameters": ', '{"a": 1}',
    '{"name": "add", "arguments": {"a": [1, {"b": "}"}]}}', '{"arguments": {}, "name": "add"}',
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@st.composite
def cut(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> list[str]:
    """A text in pieces."""
    text = draw(texts)
    ends = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


OPTIONS = st.fixed_dictionaries(
    {
        "family": st.sampled_from(list(FAMILIES.values())),
        "hidden": st.sampled_from([(), tuple(MARKERS[2:6]), tuple(MARKERS)]),
        "max_calls": st.sampled_from([None, 1]),
        "thinks": st.sampled_from([None, False, True]),
    }
)


@settings(deadline=None)
@given(cut(), OPTIONS)
def test_however_a_text_is_cut_the_answer_is_the_same(
    pieces: list[str], options: dict[str, Any]
) -> None:
    new_parser = partial(parser, **options)
    whole = read(new_parser, "".join(pieces))
    assert read(new_parser, *pieces) == whole
    assert read(new_parser, *"".join(pieces)) == whole


@settings(deadline=None)
@given(TEXTS, st.sampled_from(list(FAMILIES.values())))
def test_an_answer_without_calls_is_its_text(text: str, family: Family) -> None:
    answer = read(partial(parser, family), text)
    if not answer.tool_calls:
        assert answer == Answer(text)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["get_weather", "add"]),
            st.dictionaries(
                st.text(max_size=5),
                st.recursive(
                    st.none() | st.integers() | st.text(max_size=9) | st.sampled_from(MARKERS),
                    lambda inner: (
                        st.lists(inner, max_size=3)
                        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
                    ),
                    max_leaves=6,
                ),
                max_size=3,
            ),
            st.sampled_from([None, 2]),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(list(WRITERS.values())),
    st.sampled_from(["", "Let me see. "]),
    st.data(),
)
def test_arguments_are_the_models_own_text(
    said: list[tuple[str, dict[str, Any], int | None, bool]],
    family: Family,
    before: str,
    data: st.DataObject,
) -> None:
    calls = [
        ToolCall(f"call {index}", name, json.dumps(arguments, indent=indent, ensure_ascii=ascii_))
        for index, (name, arguments, indent, ascii_) in enumerate(said)
    ]
    text = before + family.write(calls)
    pieces = data.draw(cut(st.just(text)))
    assert read(partial(parser, family), *pieces) == Answer(before, "", tuple(calls))


@pytest.mark.parametrize("name", WRITERS)
def test_arguments_are_told_as_they_come(name: str) -> None:
    family = WRITERS[name]
    text = family.write([ToolCall("", "add", '{"a": "' + "x" * 50 + '"}')])
    streaming = parser(family)
    begun = [len(streaming.feed(char)) > 0 for char in text]
    assert sum(begun) > 50
    assert isinstance(parts(parser(family), text)[0], ToolCallBegin)


NO_CALLS = {
    "hermes": [
        '<tool_call>\n{"name": "nope", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {a: 1}}\n</tool_call>',
        '<tool_call>\n{"name": "add"}\n</tool_call>',
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": ',
        '<tool_call>\n{"arguments": {"a": 1}',
        '<tool_call>\n["add"]\n</tool_call>',
        "<tool_call>add(1)</tool_call>",
        "<tool_call>",
        "a < b, <tool_calls> and </tool_call>",
        'Say {"name": "add", "arguments": {}}',  # without tags, only where an answer begins
        '{"name": "nope", "arguments": {}}',
        '```json\n{"name": "nope", "arguments": {}}\n```',
        "```python\nadd()\n```",
        "``` json",
    ],
    "llama3_json": [
        '{"name": "nope", "parameters": {}}',
        '{"city": "Paris"}',
        '{"name": "add", "parameters": "1"}',
        "{{{ {",
        "<|python_tag|>print(1)",
        '{"name": "add", "para',
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "nope", "arguments": {}}]',
        "[TOOL_CALLS] []",
        "[TOOL_CALLS]nope[ARGS]{}",
        "[TOOL_CALLS]add[ARGS]1",
        "[TOOL_CALLS]",
        "[TOOL_CALL] [1]",
    ],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in NO_CALLS.items() for text in texts]
)
def test_what_looks_like_a_call_and_is_none_is_content(name: str, text: str) -> None:
    for piece in (text, f"Well: {text}", f"{text} indeed"):
        assert read(partial(parser, FAMILIES[name]), piece) == Answer(piece)


@pytest.mark.parametrize(
    ("family", "text", "content"),
    [
        (HERMES, 'Hi\n<tool_call>{"name": "add", "arguments": {}}</tool_call>\n', "Hi\n"),
        (HERMES, '\n\n<tool_call>{"name": "add", "arguments": {}}', ""),
        (HERMES, '{"name": "add", "arguments": {}}', ""),
        (HERMES, '```json\n{"name": "add", "arguments": {}}\n```', ""),
        (HERMES, '```{"name": "add",\n "arguments": {}}```\nSo', "\nSo"),
        (HERMES, '<tool_call>{"id": "x", "arguments": {}, "name": "add"}</tool_call>.', "."),
        (HERMES, '<tool_call>\n{"name": "add", "arguments": {}, "x": [1, "}"]}', ""),
        (HERMES, '<tool_call><tool_call>{"name": "add", "arguments": {}}', "<tool_call>"),
        (LLAMA3_JSON, '<|python_tag|>{"name": "add", "parameters": {}}', ""),
        (LLAMA3_JSON, '{"type": "function", "name": "add", "parameters": {}}', ""),
        (LLAMA3_JSON, 'So: {"name": "add", "parameters": {}}', "So: "),
        (MISTRAL, '[TOOL_CALLS][{"arguments": {}, "name": "add", "id": "123456789"}]', ""),
        (MISTRAL, '[TOOL_CALLS] {"name": "add", "arguments": {}}', ""),
        (MISTRAL, "Ok[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{}", "Ok"),
        (MISTRAL, "[TOOL_CALLS]add{}", ""),
    ],
)
def test_the_ways_in_which_models_write_calls(family: Family, text: str, content: str) -> None:
    calls = (ToolCall("call 0", "add", "{}"),)
    assert read(partial(parser, family), text) == Answer(content, "", calls)


def test_a_call_that_has_begun_stays_one_even_if_it_is_cut_off() -> None:
    """As with OpenAI: nobody can take back what was streamed."""
    text = '<tool_call>\n{"name": "add", "arguments": {"a": "1'
    calls = (ToolCall("call 0", "add", '{"a": "1'),)
    assert read(partial(parser, HERMES), text) == Answer("", "", calls)


@pytest.mark.parametrize("name", FAMILIES)
def test_after_the_only_call_that_is_wanted_nothing_is_read(name: str) -> None:
    family = FAMILIES[name]
    text = "Well: " + family.write([ToolCall("", "add", "{}"), ToolCall("", "add", PARIS)])
    single = parser(family, max_calls=1)
    found = [*single.feed(text), *single.feed(" More."), *single.finish()]
    assert single.is_finished
    assert joined(found) == Answer("Well: ", "", (ToolCall("call 0", "add", "{}"),))
    assert len(read(partial(parser, family), text).tool_calls) == 2


@pytest.mark.parametrize(
    ("family", "text", "content"),
    [
        (LLAMA3_JSON, "<|python_tag|>print(1)", "print(1)"),
        (MISTRAL, "[TOOL_CALLS]nope[ARGS]{} [ARGS]", "nope{} "),
        (MISTRAL, "[TOOL_CALLS", "[TOOL_CALLS"),
    ],
)
def test_special_tokens_are_never_content(family: Family, text: str, content: str) -> None:
    hidden = ("<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")
    assert read(partial(parser, family, hidden=hidden), text) == Answer(content)


def test_white_space_alone_is_content_if_there_is_nothing_else() -> None:
    assert read(partial(parser, HERMES), " \n", " ") == Answer(" \n ")


def test_pieces_of_one_text_are_one_part() -> None:
    streaming = parser(HERMES)
    begin, arguments = streaming.feed('<tool_call>{"name": "add", "arguments": {"a": [{}, "{"]}')
    assert (begin, arguments) == (
        ToolCallBegin(0, "call 0", "add"),
        ToolCallArguments(0, '{"a": [{}, "{"]}'),
    )
    assert parser(HERMES).feed("a {b} <i>c</i>") == [Content("a {b} <i>c</i>")]


THOUGHTS = [
    (False, "<think>\nHm.\n\nSo\n</think>\n\nYes", Answer("Yes", "Hm.\n\nSo")),
    (False, "\n<think>Hm", Answer("", "Hm")),
    (False, "Hm</think>Yes", Answer("Hm</think>Yes")),
    (False, "Well <think>Hm</think>", Answer("Well <think>Hm</think>")),
    (False, "<think>\n\n</think>\n\nYes", Answer("Yes")),
    (False, "<thin", Answer("<thin")),
    (True, "\nHm </thing>\n</think>\nYes <think>", Answer("Yes <think>", "Hm </thing>")),
    (True, "<think>\nHm</think>Yes", Answer("Yes", "Hm")),
    (True, "</think>Yes", Answer("Yes")),
    (True, "Hm </think", Answer("", "Hm </think")),
    (True, "<thin", Answer("", "<thin")),
]


@pytest.mark.parametrize(("is_open", "text", "answer"), THOUGHTS)
def test_reasoning_comes_before_the_answer(is_open: bool, text: str, answer: Answer) -> None:
    assert read(partial(parser, HERMES, thinks=is_open), text) == answer
    assert read(partial(parser, HERMES, thinks=is_open), *text) == answer


def test_calls_are_looked_for_behind_the_reasoning_only() -> None:
    call = HERMES.write([ToolCall("", "add", PARIS)])
    answer = read(partial(parser, HERMES, thinks=True), f"I {call}?</think>{call}")
    assert answer == Answer("", f"I {call}?", (ToolCall("call 0", "add", PARIS),))


def test_a_parser_knows_what_is_reasoning() -> None:
    thinking = parser(HERMES, thinks=False)
    states = []
    for piece in ("<th", "ink>", "a", "</thi", "nk>", "b"):
        thinking.feed(piece)
        states.append(thinking.is_reasoning)
    assert states == [False, True, True, True, False, False]
    assert parser(HERMES, thinks=True).is_reasoning


HOSTILE: list[tuple[str, str, str]] = [
    ("llama3_json", "", "{"),
    ("llama3_json", "", '{"name": "add", "type": "'),
    ("llama3_json", '{"name": "add", "parameters": ', '{"a":'),
    ("hermes", "", "<tool_call>"),
    ("hermes", "", '<tool_call>{"name": "add", '),
    ("hermes", '<tool_call>{"name": "add", "arguments": ', "["),
    ("hermes", '<tool_call>{"arguments": {"a": ', "[{"),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "', '\\"'),
    ("hermes", '<tool_call>{"id": "', "x"),
    ("hermes", "", " "),
    ("hermes", "", "<"),
    ("mistral", "", '[TOOL_CALLS][{"name":'),
    ("mistral", "", "[TOOL_CALLS]add"),
]


def num_steps(work: Callable[[], object]) -> int:
    """Lines of our own that are run."""
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        if "/server/" not in frame.f_code.co_filename:
            return None
        steps += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return steps


@pytest.mark.parametrize("size", [5, 10**9])
@pytest.mark.parametrize(("name", "head", "unit"), HOSTILE)
def test_twice_the_text_is_twice_the_work(name: str, head: str, unit: str, size: int) -> None:
    def reading(count: int) -> Callable[[], object]:
        text = head + unit * count
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        new_parser: Callable[[], AnswerParser] = partial(parser, FAMILIES[name], thinks=False)
        return lambda: read(new_parser, *pieces)

    assert num_steps(reading(600)) < 2.5 * num_steps(reading(300)) + 100


@pytest.mark.parametrize("text", ["{" * 10**6, "<tool_call>" * 10**4, '{"a":' * 2 * 10**4])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_megabyte_of_nonsense_is_read_through(name: str, text: str) -> None:
    assert read(partial(parser, FAMILIES[name]), text) == Answer(text)
    call = '[TOOL_CALLS] <tool_call> {"name": "add", "arguments": ' + text
    found = read(partial(parser, FAMILIES[name]), call)
    assert found.content + "".join(call.arguments for call in found.tool_calls)


def test_ids_are_as_openai_and_mistral_write_them() -> None:
    assert len({new_id() for _ in range(100)}) == 100
    assert all(len(i) == 29 and i.startswith("call_") for i in (new_id(), new_id()))
    assert all(len(i) == 9 and i.isalnum() for i in (new_short_id(), new_short_id()))
