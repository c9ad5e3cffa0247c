"""llama.cpp's grammars, whatever its own parser takes."""

from __future__ import annotations

import time

import pytest
from llguidance import LLMatcher

from server.tools.gbnf import is_gbnf, lark_of
from skipllm_core.grammar.compiler import new_matcher
from skipllm_core.grammar.vocabulary import Vocabulary
from skipllm_core.tokenizer import ByteTokenizer

VOCABULARY = Vocabulary.of(ByteTokenizer(), 320)


def matches(grammar: str, text: str) -> bool:
    assert is_gbnf(grammar)
    matcher: LLMatcher = new_matcher(VOCABULARY, lark_of(grammar))
    assert not matcher.is_error(), matcher.get_error()
    num_taken = matcher.try_consume_tokens(list(text.encode()))
    return bool(num_taken == len(text.encode()) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= ("a"*)* "."', "aaa.", "b."),
        ('root ::= (("a"+))? "."', ".", "b."),
        ('root ::= ("a"{2,3}){2}', "aaaaa", "aaa"),
        ('root ::= ("b" | ("a"?)+ )* "." # )*', "abab.", "c."),
        (r'root ::= "\U0001F600\u00e9\u0041"', "😀éA", "😀éB"),
        (r"root ::= [\U0001F600-\U0001F64F]+", "😀🙏", "x"),
        (r"root ::= [\u0041-\u005A\u00e9]+", "AZé", "a"),
        (r'root ::= "\\u0041"', r"\u0041", "A"),
        ('root ::= "(" [)*] "*"', "()*", "(**)"),
        ('root ::= start "."\nstart ::= "x"', "x.", "."),
    ],
)
def test_a_grammar_means_what_it_means_to_llama_cpp(grammar: str, good: str, bad: str) -> None:
    assert matches(grammar, good)
    assert not matches(grammar, bad)


def test_lark_is_told_from_gbnf() -> None:
    assert not is_gbnf('start: "a"')
    assert not is_gbnf('%llguidance {}\nstart: "::="')
    assert is_gbnf('root ::= "a"\nstart ::= "b"')


@pytest.mark.parametrize("text", ["\n", "[", '"', "{", "(", "a ", "*", "\\", "start "])
def test_the_time_it_takes_does_not_grow_with_the_square(text: str) -> None:
    start_s = time.thread_time()
    is_gbnf(text * 500_000)
    with pytest.raises(Exception):  # noqa: B017, PT011 - the translation's own
        lark_of((text * 16_000)[:16_000])
    assert time.thread_time() - start_s < 2
