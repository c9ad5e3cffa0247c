"""What the grammars of tools and reasoning are made of."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.tools.grammars import after, bounded, json_grammar, literal, marker
from skipllm_core.grammar.compiler import Grammar
from skipllm_core.grammar.state import GrammarState
from skipllm_core.tokenizer import ByteTokenizer
from skipllm_core.types import SamplingParams
from tests.grammar.texts import allowed, compiled, feed, outcome_of, state_of

ANSWER = json_grammar({"type": "integer", "minimum": 0, "maximum": 9})


@pytest.mark.parametrize("grammar", [ANSWER, 'start: "7"'])
@pytest.mark.parametrize(
    "text", ["I think.</think>7", "</think>\n\n7", "{<think> a < b </ </think>\n 7", "</think>7"]
)
def test_free_text_comes_first_up_to_a_mark(grammar: str, text: str) -> None:
    state = feed(state_of(after('"</think>"', grammar)), text.encode())
    assert state.is_complete


def test_the_answer_is_kept_to_behind_the_mark_and_needed() -> None:
    state = feed(state_of(after('"</think>"', ANSWER)), b"7 seven")
    assert ByteTokenizer.EOS not in allowed(state.mask())
    feed(state, b"</think>")
    assert set(bytes(allowed(state.mask()))) == set(b"0123456789 \n\r\t")


def test_a_mark_can_be_a_special_token() -> None:
    tokenizer = ByteTokenizer()
    state = state_of(after(f"<[{tokenizer.BOS}]>", ANSWER))
    feed(state, [*b"hm", tokenizer.BOS, ord("7")])
    assert state.is_complete


def test_what_comes_first_can_be_repeated() -> None:
    state = state_of(after('"<b>"', after('"<a>"', ANSWER)))
    assert feed(state, b"x<a>y<b>z<a>7").is_complete


def test_a_mark_is_written_as_the_tokenizer_needs_it() -> None:
    class WithCalls(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [self.BOS] if text == "[CALLS]" else super().encode(text)

    assert marker(WithCalls(), "[CALLS]") == f"<[{ByteTokenizer.BOS}]>"
    assert marker(WithCalls(), '<"call">') == r'"<\"call\">"'


CALL = {"type": "object", "properties": {"name": {"const": "f"}}, "required": ["name"]}
AUTO = rf"""
start: call* rest
rest: TEXT
call: trigger args "</call>"
trigger[lazy]: TEXT "<call>"
args: %json {json.dumps(bounded(CALL))}
TEXT: /(.|\n)*/
"""


@pytest.mark.parametrize(
    ("text", "may_end"),
    [
        ("hello", True),
        ("hello <call>", False),
        ('hello <call>{"name": "f"}</call>', True),
        ('<call>{"name":"f"}</call><call>\n'[:-1], False),
        ('<call>{"name":"f"}</call> and <call>{\n  "name": "f"\n}</call> bye', True),
    ],
)
def test_calls_within_free_text_are_kept_to_their_schema(text: str, may_end: bool) -> None:
    state = feed(state_of(AUTO), text.encode())
    assert (ByteTokenizer.EOS in allowed(state.mask())) == may_end


def test_a_call_of_another_function_cannot_be_written() -> None:
    state = feed(state_of(AUTO), b'<call>{"name":"')
    assert allowed(state.mask()) == [ord("f")]


def test_white_space_in_json_comes_to_an_end() -> None:
    state = feed(state_of(json_grammar({"type": "object"})), b"{\n" + b" " * 32)
    assert set(b" \n").isdisjoint(allowed(state.mask()))
    assert allowed(feed(state_of(json_grammar(CALL, "")), b"{").mask()) == [ord('"')]


@pytest.mark.parametrize("indent", [None, 2, 4, "\t"])
def test_white_space_is_enough_for_pretty_printing(indent: Any) -> None:
    value = {"a": [{"b": [1, {"c": None}]}], "d": {}}
    text = json.dumps(value, indent=indent)
    assert feed(state_of(json_grammar({"type": "object"})), text.encode()).is_complete


def test_a_schema_may_have_a_name_of_its_own() -> None:
    schema = {"$id": "http://localhost/x", "$ref": "#/$defs/n", "$defs": {"n": {"enum": [7]}}}
    outcome = outcome_of(json_grammar(schema))
    assert isinstance(outcome, Grammar)
    assert feed(GrammarState(outcome, SamplingParams(max_tokens=9)), b"7").is_complete


def test_text_is_quoted_for_lark() -> None:
    for text in ('"', "\\", "\n", "é日本🚀", "\x00", "</a>", "/"):
        grammar = compiled(f"start: {literal(text)}")
        assert feed(GrammarState(grammar, SamplingParams(max_tokens=99)), text.encode()).is_complete


def test_formats_that_json_schema_does_not_define_say_nothing() -> None:
    schema = {
        "type": "object",
        "properties": {
            "format": {"type": "string", "format": "password"},
            "paths": {"items": {"$ref": "#/$defs/Path"}},
            "day": {"anyOf": [{"type": "string", "format": "date"}, {"format": "path"}]},
        },
        "default": {"format": "path"},
        "$defs": {"Path": {"type": "string", "format": "path"}},
    }
    (grammar,) = json.loads(json_grammar(schema))["grammars"]
    del grammar["json_schema"]["x-guidance"]
    assert grammar["json_schema"] == {
        "type": "object",
        "properties": {
            "format": {"type": "string"},
            "paths": {"items": {"$ref": "#/$defs/Path"}},
            "day": {"anyOf": [{"type": "string", "format": "date"}, {}]},
        },
        "default": {"format": "path"},
        "$defs": {"Path": {"type": "string"}},
    }
