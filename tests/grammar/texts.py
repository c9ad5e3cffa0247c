"""Grammars, and a walk through one that asks nobody but its masks."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Sequence
from typing import Any

from skipllm_core.grammar.compiler import Grammar, GrammarCompiler, GrammarFault
from skipllm_core.grammar.state import GrammarState
from skipllm_core.tokenizer import ByteTokenizer, Tokenizer
from skipllm_core.types import SamplingParams

EOS = ByteTokenizer.EOS
VOCAB = 320  # logits are wider than the tokenizer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "déf"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def of_schema(schema: Any) -> str:
    return json.dumps({"grammars": [{"json_schema": schema}]})


def compact(schema: dict[str, Any]) -> str:
    """The same, without white space, so that a random walk comes to an end."""
    return of_schema(schema | {"x-guidance": {"whitespace_flexible": False}})


def compiled(text: str, tokenizer: Tokenizer | None = None, vocab_size: int = VOCAB) -> Grammar:
    outcome = outcome_of(text, tokenizer, vocab_size)
    assert isinstance(outcome, Grammar), outcome
    return outcome


def outcome_of(
    text: str, tokenizer: Tokenizer | None = None, vocab_size: int = VOCAB
) -> Grammar | GrammarFault:
    done = threading.Event()
    compiler = GrammarCompiler(lambda: tokenizer or ByteTokenizer(), vocab_size, done.set)
    compilation = compiler.compile(text)
    while (outcome := compilation.outcome()) is None:
        assert done.wait(60)
    return outcome


def allowed(mask: bytes | None, vocab_size: int = VOCAB) -> list[int]:
    assert mask is not None
    return [i for i in range(vocab_size) if mask[i >> 3] >> (i & 7) & 1]


def state_of(text: str, **params: Any) -> GrammarState:
    """A new sequence's, under parameters that stop at EOS."""
    settings: dict[str, Any] = {"max_tokens": 1000, "stop_token_ids": (EOS,)} | params
    return GrammarState(compiled(text), SamplingParams(**settings))


def feed(state: GrammarState, token_ids: Sequence[int]) -> GrammarState:
    for token_id in token_ids:
        assert token_id in allowed(state.mask()), (token_id, allowed(state.mask()))
        state.accept(token_id)
        if not state.is_complete:
            state.fill()
    return state


def random_text(state: GrammarState, rng: random.Random, max_tokens: int = 1000) -> list[int]:
    """Tokens up to the end, which is not among them."""
    token_ids: list[int] = []
    while not state.is_complete:
        token_id = rng.choice(allowed(state.mask()))
        if state.ends_with(token_id):
            break
        token_ids.append(token_id)
        assert len(token_ids) < max_tokens
        feed(state, [token_id])
    return token_ids
