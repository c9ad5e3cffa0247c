"""What an answer consists of: parts, as a parser finds them in the model's text and as the
endpoints word them; and its usage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, Protocol, TypeAlias

from skipllm_core.types import FinishReason, SkipUsage

# "tool_calls": the model stopped, and what it said has calls in it.
EndReason: TypeAlias = FinishReason | Literal["tool_calls"]


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    index: int  # of the call in its answer, from 0
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A further piece of the arguments' JSON text, of the call begun last."""

    index: int
    text: str


Part: TypeAlias = Content | Reasoning | ToolCallBegin | ToolCallArguments


class AnswerParser(Protocol):
    """Reads one answer as it comes. However its text is cut into pieces, the parts that come out
    join to the same answer. Implementations: PlainParser, and those of `server.tools`."""

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is still reasoning."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether nothing that may come next is wanted."""
        ...

    def feed(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """What was held back, once no more text comes."""
        ...


class PlainParser:
    """All text is content."""

    is_reasoning = False
    is_finished = False

    def feed(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        return []


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same parts; pieces of one text that follow each other are one."""
    found: list[Part] = []
    for (kind, _), run in groupby(parts, lambda part: (type(part), getattr(part, "index", None))):
        pieces: list[Any] = list(run)
        if kind is not ToolCallBegin:
            pieces = [replace(pieces[0], text="".join(piece.text for piece in pieces))]
        found += pieces
    return found


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON text, as the model wrote it


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: its parts joined."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def joined(parts: Iterable[Part]) -> Answer:
    content, reasoning = [], []
    begun: list[ToolCallBegin] = []
    arguments: list[list[str]] = []
    for part in parts:
        match part:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCallBegin():
                begun.append(part)
                arguments.append([])
            case ToolCallArguments(_, text):
                arguments[-1].append(text)
    calls = (
        ToolCall(call.id, call.name, "".join(texts))
        for call, texts in zip(begun, arguments, strict=True)
    )
    return Answer("".join(content), "".join(reasoning), tuple(calls))


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request took, over all its choices."""

    num_prompt_tokens: int
    num_cached_tokens: int = 0  # of these, whose K/V an earlier request had computed
    num_generated_tokens: int = 0
    num_reasoning_tokens: int = 0  # of these
    skip: SkipUsage = field(default_factory=SkipUsage)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_generated_tokens
