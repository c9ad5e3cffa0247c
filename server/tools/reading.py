"""How the answers to one chat are read, and what they have to follow."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.parts import AnswerParser, PlainParser
from server.protocol.chat import ChatRequest
from server.protocol.tools import Tool, ToolChoice
from server.tools import call_grammars, reasoning
from server.tools.brevity import LITTLE_ROOM, brief
from server.tools.calls import CallParser, Calls
from server.tools.families import Family, new_id, new_short_id
from server.tools.grammars import Constraint, after, checked, constraint_of, marker
from server.tools.reasoning import ThinkParser
from server.tools.source import Source
from server.tools.style import ChatStyle
from skipllm_core.errors import InvalidRequestError
from skipllm_core.tokenizer import Tokenizer

_TAIL_TOKENS = 32  # of a prompt: more than what a template writes to open or close the reasoning


class Thinking(enum.Enum):
    """Where the end of a prompt leaves the reasoning."""

    POSSIBLE = enum.auto()  # the answer may begin with it
    OPEN = enum.auto()
    OVER = enum.auto()


@dataclass(frozen=True, slots=True)
class Reading:
    new_parser: Callable[[], AnswerParser] = PlainParser
    constraint: Constraint | None = None
    shown_tokens: frozenset[int] = frozenset()  # special ones that the parser has to see


def tools_told(body: ChatRequest) -> list[Tool]:
    """The tools that the model is told of."""
    return [] if choice_of(body).mode == "none" else list(body.tools or ())


def choice_of(body: ChatRequest) -> ToolChoice:
    return body.tool_choice or ToolChoice("auto" if body.tools else "none")


def reading_of(
    style: ChatStyle,
    tokenizer: Tokenizer,
    body: ChatRequest,
    prompt_ids: Sequence[int],
    max_model_len: int,
) -> Reading:
    """Raises InvalidRequestError for what cannot be promised."""
    choice = choice_of(body)
    tools = {tool.name: tool for tool in tools_told(body)}
    if choice.names is not None:
        tools = {name: tools[name] for name in choice.names}
    if style.family is None and choice.mode in ("required", "named"):
        raise InvalidRequestError(
            "This server reads no calls in answers (--tool-call-parser none), so 'tool_choice' "
            "cannot ask for one.",
            param="tool_choice",
            code="unsupported_value",
        )
    family = style.family if tools else None
    is_single = choice.mode == "named" or body.parallel_tool_calls is False
    constraint = constraint_of(body)
    room = max_model_len - len(prompt_ids)
    if choice.mode in ("required", "named") and room < LITTLE_ROOM:
        tools = {name: brief(tool, room) for name, tool in tools.items()}
        is_single = True
    if family is not None:
        constraint = _calls_in(
            tokenizer, family, tuple(tools.values()), choice, constraint, is_single=is_single
        )
    thinking = _thinking(style, tokenizer, prompt_ids)
    if constraint is not None and thinking is not Thinking.OVER:
        constraint = _behind_reasoning(tokenizer, constraint, thinking)
    shown = style.shown_tokens if family is not None or style.has_reasoning else {}
    hidden = shown.values() if body.skip_special_tokens is not False else ()

    has_short_ids = style.history is not None and style.history.has_short_ids

    def new_parser() -> AnswerParser:
        parser: AnswerParser = PlainParser()
        if family is not None:
            calls = Calls(
                tools,
                new_short_id if has_short_ids else new_id,
                max_calls=1 if is_single else None,
            )
            parser = CallParser(family.read, Source(hidden), calls)
        if style.has_reasoning:
            is_open = thinking is Thinking.OPEN
            parser = ThinkParser(parser, Source(hidden), is_reasoning=is_open)
        return parser

    return Reading(new_parser, constraint, frozenset(shown))


def _calls_in(
    tokenizer: Tokenizer,
    family: Family,
    tools: Sequence[Tool],
    choice: ToolChoice,
    content: Constraint | None,
    *,
    is_single: bool,
) -> Constraint | None:
    """What an answer with calls has to follow, or one with content."""
    if choice.mode in ("required", "named"):
        grammar = call_grammars.calls_only(tokenizer, family, tools, is_single=is_single)
    elif content is not None:
        grammar = call_grammars.calls_only(
            tokenizer, family, tools, is_single=is_single, content=content.grammar
        )
    elif any(tool.function.strict for tool in tools):
        grammar = call_grammars.calls_in_text(tokenizer, family, tools, is_single=is_single)
    else:
        return None
    return checked(grammar, "tools" if content is None else content.param)


def _thinking(style: ChatStyle, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> Thinking:
    if not style.has_reasoning:
        return Thinking.OVER
    tail = tokenizer.decode(prompt_ids[-_TAIL_TOKENS:]).rstrip()
    if tail.endswith(reasoning.BEGIN):
        return Thinking.OPEN
    return Thinking.OVER if tail.endswith(reasoning.END) else Thinking.POSSIBLE


def _behind_reasoning(
    tokenizer: Tokenizer, constraint: Constraint, thinking: Thinking
) -> Constraint:
    if thinking is Thinking.OPEN:
        grammar = after(marker(tokenizer, reasoning.END), constraint.grammar)
    else:
        grammar = call_grammars.perhaps_after_reasoning(tokenizer, constraint.grammar)
    return checked(grammar, constraint.param)
