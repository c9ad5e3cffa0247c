"""How a model takes part in conversations with tools and reasoning, found out at start by looking
at what its chat template makes of a few messages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from server.settings import ReasoningParser, ToolCallParser
from server.tools import reasoning
from server.tools.families import FAMILIES, HERMES, Family, family_of
from skipllm_core.errors import InvalidRequestError
from skipllm_core.tokenizer import Tokenizer

_USER = {"role": "user", "content": "probe"}
_SYSTEM = {"role": "system", "content": "probe_system"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string"}},
            "required": ["probe_key"],
        },
    },
}
_ARGUMENTS = {"probe_key": "probe_value"}
_ARGUMENTS_SHOWN = re.compile(r'\{"probe_key": ?"probe_value"\}')
_SHORT_IDS = ("probe0000", "probe0001")
_LONG_IDS = ("call_0123456789abcdef01234567", "call_0123456789abcdef01234568")


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """How a template wants the calls of past turns."""

    arguments: Literal["object", "text"]
    empty_content: str | None  # beside calls
    has_short_ids: bool  # nine letters and digits
    has_single_calls: bool  # one for each message
    shown: str  # what the template makes of one


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatStyle:
    """What a model's template can do, and how its answers are read."""

    family: Family | None  # None: calls are not read
    history: History | None  # None: the template knows no tools; our own text tells of them
    has_system: bool
    has_reasoning: bool
    shown_tokens: Mapping[int, str]  # special tokens that are markers, and how they are spelled

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        *,
        parser: ToolCallParser = "auto",
        reasoning_parser: ReasoningParser = "auto",
    ) -> ChatStyle:
        template = tokenizer.chat_template or ""
        has_reasoning = reasoning_parser == "think" or (
            reasoning_parser == "auto" and any(mark in template for mark in reasoning.MARKERS)
        )
        history = _history_of(tokenizer) if _shows(tokenizer, [_USER], "probe_tool") else None
        native = family_of(template + history.shown) if history is not None else None
        if parser == "auto" and native is None:
            history = None  # its calls could not be read: our own text asks for some that can
        family = FAMILIES.get(parser)
        if native is not None and (family is None or family.name == native.name):
            family = native
        if parser == "none":
            family = None
        elif family is None:
            family = HERMES
        markers = [*(family.markers if family else ()), *(reasoning.MARKERS * has_reasoning)]
        return cls(
            family=family,
            history=history,
            has_system=_shows(tokenizer, [_SYSTEM, _USER], "probe_system"),
            has_reasoning=has_reasoning,
            shown_tokens=_special_tokens(tokenizer, markers),
        )

    def summary(self) -> dict[str, Any]:
        """For operators: whether the template tells of tools, and how answers are read."""
        return {
            "template": self.history is not None,
            "parser": self.family.name if self.family is not None else "none",
            "reasoning_parser": "think" if self.has_reasoning else "none",
        }


def _history_of(tokenizer: Tokenizer) -> History | None:
    """None if the template does not show calls and their results."""
    kinds: tuple[Literal["object", "text"], ...] = ("object", "text")
    for kind in kinds:
        for content in ("", None):
            if shown := _shown_call(tokenizer, kind, content, _SHORT_IDS[:1]):
                return History(
                    arguments=kind,
                    empty_content=content,
                    has_short_ids=not _shown_call(tokenizer, kind, content, _LONG_IDS[:1]),
                    has_single_calls=not _shown_call(tokenizer, kind, content, _SHORT_IDS),
                    shown=shown,
                )
    return None


def _shown_call(
    tokenizer: Tokenizer, kind: str, content: str | None, call_ids: Sequence[str]
) -> str:
    """The prompt with calls and their results; nothing if one of them is not in it."""
    arguments = _ARGUMENTS if kind == "object" else json.dumps(_ARGUMENTS)
    function = {"name": "probe_tool", "arguments": arguments}
    calls = [{"id": i, "type": "function", "function": function} for i in call_ids]
    text = _rendered(
        tokenizer,
        [
            _USER,
            {"role": "assistant", "content": content, "tool_calls": calls},
            *({"role": "tool", "content": f"result of {i}", "tool_call_id": i} for i in call_ids),
        ],
    )
    results = all(f"result of {i}" in text for i in call_ids)
    return text if results and len(_ARGUMENTS_SHOWN.findall(text)) == len(call_ids) else ""


def _shows(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], text: str) -> bool:
    return text in _rendered(tokenizer, messages)


def _rendered(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt; nothing where the template refuses the messages."""
    try:
        return tokenizer.decode(tokenizer.encode_chat(messages, tools=[_TOOL]))
    except InvalidRequestError:
        return ""


def _special_tokens(tokenizer: Tokenizer, markers: Sequence[str]) -> dict[int, str]:
    found = {}
    for marker in markers:
        token_ids = tokenizer.encode(marker, add_special_tokens=False)
        if len(token_ids) == 1 and tokenizer.is_special(token_ids[0]):
            found[token_ids[0]] = marker
    return found
