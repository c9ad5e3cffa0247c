"""Grammars compiled: each once, within bounds, and told what is wrong with them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from skipllm_core.grammar import compiler as compilers
from skipllm_core.grammar.compiler import (
    Compilation,
    Grammar,
    GrammarCompiler,
    GrammarFault,
    new_matcher,
)
from skipllm_core.grammar.vocabulary import Vocabulary
from skipllm_core.tokenizer import ByteTokenizer, Tokenizer
from skipllm_core.types import MAX_GRAMMAR_BYTES
from tests.grammar.texts import VOCAB, of_schema, outcome_of


def fault(text: str) -> str:
    outcome = outcome_of(text)
    assert isinstance(outcome, GrammarFault)
    assert not outcome.is_ours
    return outcome.message


class Counting:
    def __init__(self) -> None:
        self.num_loads = 0
        self.done = threading.Semaphore(0)
        self.compiler = GrammarCompiler(self.load, VOCAB, self.done.release)

    def load(self) -> Tokenizer:
        self.num_loads += 1
        return ByteTokenizer()

    def wait(self, compilation: Compilation) -> Grammar:
        assert self.done.acquire(timeout=60)
        outcome = compilation.outcome()
        assert isinstance(outcome, Grammar)
        return outcome


def test_a_grammar_is_compiled_once_and_the_tokenizer_loaded_once() -> None:
    counting = Counting()
    assert counting.num_loads == 0
    first = counting.wait(counting.compiler.compile('start: "a"'))
    assert counting.compiler.compile('start: "a"').outcome() is first
    counting.wait(counting.compiler.compile('start: "b"'))
    assert counting.num_loads == 1


def test_what_was_not_asked_for_lately_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "MAX_CACHED_GRAMMARS", 2)
    counting = Counting()
    texts = [f'start: "{letter}"' for letter in "abc"]
    first, second, _ = [counting.compiler.compile(text) for text in texts]
    for _ in texts:
        assert counting.done.acquire(timeout=60)
    assert counting.compiler.compile(texts[1]) is second
    again = counting.compiler.compile(texts[0])
    assert again is not first
    counting.wait(again)


def test_the_memory_of_grammars_is_bounded_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "MAX_CACHED_BYTES", 1000)
    counting = Counting()
    long = [f'start: "{letter * 600}"' for letter in "ab"]
    first = counting.compiler.compile(long[0])
    counting.compiler.compile(long[1])
    assert counting.compiler.compile(long[0]) is not first
    for _ in range(3):
        assert counting.done.acquire(timeout=60)


def test_a_grammar_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "COMPILE_LIMIT_S", 0.0)
    going_on, may_end = threading.Event(), threading.Event()

    def compile_slowly(vocabulary: object, text: str) -> Any:
        going_on.set()
        may_end.wait(60)
        raise RuntimeError("too late to tell anybody")

    monkeypatch.setattr(compilers, "new_matcher", compile_slowly)
    counting = Counting()
    compilation = counting.compiler.compile("start: /a/")
    assert going_on.wait(60)
    outcome = compilation.outcome()
    assert isinstance(outcome, GrammarFault)
    assert "takes longer" in outcome.message
    may_end.set()


def test_a_tokenizer_that_cannot_be_read_is_not_the_requests_fault() -> None:
    def load() -> Tokenizer:
        raise OSError("no such file")

    done = threading.Event()
    compilation = GrammarCompiler(load, VOCAB, done.set).compile('start: "a"')
    assert done.wait(60)
    outcome = compilation.outcome()
    assert isinstance(outcome, GrammarFault)
    assert outcome.is_ours
    assert "no such file" not in outcome.message


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"properties": {"a": {"items": {"not": {}}}}}, "at properties.a.items: the keyword 'not'"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "at properties.a: "),
        ({"anyOf": [{}, {"if": {}}]}, "at anyOf[1]: the keyword 'if'"),
        (
            {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"items": {"not": {}}}}},
            "at $defs.x.items: the keyword 'not'",
        ),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "at properties.a: regex"),
        ({"properties": {"a": {"$ref": "http://localhost/x"}}}, "at properties.a: references to"),
        ({"$ref": "file:///etc/passwd"}, "references to other documents are not followed"),
        ({"$ref": "#/$defs/nothing"}, "does not exist"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3)"),
        ({"$ref": "#"}, "no text can follow it"),
        ({"type": "string", "format": "idn-email"}, "Unknown format: idn-email"),
        ({"enum": []}, "Unsatisfiable"),
    ],
)
def test_a_bad_schema_is_told_where_it_is_bad(schema: dict[str, Any], message: str) -> None:
    assert message in fault(of_schema(schema))


def test_a_bad_schema_within_another_grammar_is_told_alike_and_nothing_of_what_is_around_it() -> (
    None
):
    schema = {"properties": {"a": {"items": {"not": {}}}}}
    lark = f'start: "x" json\njson: %json {json.dumps(schema)}'
    text = "at properties.a.items: the keyword 'not' is not supported"
    assert fault(lark) == text
    around = [{"lark_grammar": "start: @calls"}, {"lark_grammar": lark, "name": "calls"}]
    assert fault(json.dumps({"grammars": around})) == text


def test_an_error_that_quotes_a_long_text_is_soon_told() -> None:
    pattern = "(" * 30_000  # followed, in the error, by as many spaces
    start_s = time.process_time()
    message = fault(of_schema({"properties": {"a": {"type": "string", "pattern": pattern}}}))
    assert message.startswith("at properties.a: regex parse error")
    assert len(message) < 400
    assert time.process_time() - start_s < 2


# Both were 5 s and more of work, which goes on when its request has been told of the limit.
DOUBLING = "\n".join(
    ["start:" + " R1" * 8, *(f"R{i}:{f' R{i + 1}' * 8}" for i in range(1, 40)), 'R40: "a"']
)


@pytest.mark.parametrize("text", [DOUBLING, "start: /(a{1000}){1000}/"])
def test_no_grammar_holds_its_thread_for_long(text: str) -> None:
    start_s = time.process_time()
    new_matcher(Vocabulary.of(ByteTokenizer(), VOCAB), text).compute_bitmask()
    assert time.process_time() - start_s < 3


@pytest.mark.parametrize(
    "text", ["start: nothing", "start: (", "", "start: <|nothing|>", "{", "{}", '{"grammars": []}']
)
def test_what_is_no_grammar_is_a_fault(text: str) -> None:
    assert fault(text)


def chain(link: Callable[[str], dict[str, Any]], length: int) -> str:
    definitions: dict[str, Any] = {f"d{i}": link(f"#/$defs/d{i + 1}") for i in range(length)}
    return of_schema({"$ref": "#/$defs/d0", "$defs": definitions | {f"d{length}": {}}})


def nested(opening: str, closing: str, depth: int) -> str:
    return f'{{"grammars": [{{"json_schema": {opening * depth}{{}}{closing * depth}}}]}}'


HOSTILE = {
    "references in a circle": of_schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    "itself twice": of_schema({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}),
    "3000 deep": nested('{"items":', "}", 3000),
    "3000 references": chain(lambda ref: {"$ref": ref}, 3000),
    "3000 references through items": chain(lambda ref: {"items": {"$ref": ref}}, 3000),
    "a megabyte": of_schema({"enum": ["x" * 2**20]}),
    "doubled 40 times": chain(lambda ref: {"allOf": [{"$ref": ref}, {"$ref": ref}]}, 40),
    "a million items": of_schema({"type": "array", "minItems": 10**6, "items": {}}),
    "a million letters": of_schema({"type": "string", "minLength": 10**6}),
    "2000 choices in an enum": of_schema({"enum": [f"choice {i}" for i in range(2000)]}),
    "a regex that backtrackers die of": r"start: /(a+)+b/",
    "repetitions of repetitions": "start: /((a{1,1000}){1,1000}){1,1000}/",
    "a regex of parentheses": f"start: /{'(' * 30_000}a{')' * 30_000}/",
    "a grammar of parentheses": f"start: {'(' * 30_000}'a'{')' * 30_000}",
    "stars of stars": f"start: /{'(a*)*' * 5000}/",
    "12000 rules": "start: r0\n" + "\n".join(f"r{i}:r{i + 1}" for i in range(9000)) + '\nr9000:"a"',
    "terminals doubled 60 times": "start: R0\n"
    + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(60))
    + '\nR60: "a"',
    "an ambiguous one": 'start: e\ne: e e | "a" |',
    "4000 optional properties": of_schema({"properties": {f"p{i}": {} for i in range(4000)}}),
    "one long literal": f'start: "{"x" * 100_000}"',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_grammar_is_compiled_or_refused(text: str) -> None:
    outcome = outcome_of(text)
    if isinstance(outcome, GrammarFault):
        assert not outcome.is_ours
        assert len(outcome.message) < 400
    if len(text) > MAX_GRAMMAR_BYTES:
        assert isinstance(outcome, GrammarFault)


def test_a_refusal_repeats_little_of_what_was_sent() -> None:
    assert len(fault(json.dumps({"grammars": [{"json_schema": {"type": "x" * 50_000}}]}))) < 400
