"""Parsers as the tests use them, and texts to feed them with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from server.parts import Answer, AnswerParser, Part, joined
from server.tools.calls import CallParser, Calls
from server.tools.families import HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, Family
from server.tools.reasoning import ThinkParser
from server.tools.source import Source

NAMES = ("get_weather", "add")
FAMILIES = {"hermes": HERMES, "llama3_json": LLAMA3_JSON, "mistral": MISTRAL}
WRITERS = {**FAMILIES, "mistral, newer": MISTRAL_NAMED}


def parser(
    family: Family,
    *,
    hidden: Iterable[str] = (),
    max_calls: int | None = None,
    thinks: bool | None = None,
) -> AnswerParser:
    """`thinks`: None: without reasoning; else whether the prompt has opened it."""
    ids = itertools.count()
    calls = Calls(NAMES, lambda: f"call {next(ids)}", max_calls)
    found = CallParser(family.read, Source(tuple(hidden)), calls)
    if thinks is None:
        return found
    return ThinkParser(found, Source(tuple(hidden)), is_reasoning=thinks)


def parts(parser: AnswerParser, pieces: Iterable[str]) -> list[Part]:
    found = [part for piece in pieces for part in parser.feed(piece)]
    return found + parser.finish()


def read(new_parser: Callable[[], AnswerParser], *pieces: str) -> Answer:
    return joined(parts(new_parser(), pieces))
