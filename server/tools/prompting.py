"""A conversation with tools as a chat template is to get it: in its own form if it knows tools, and
as text, in the form that the model's answers are read in, if it does not."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from server.tools.families import HERMES, Family
from server.tools.style import ChatStyle, History

Message: TypeAlias = Mapping[str, Any]

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


class _Call(NamedTuple):
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a template is given."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None

    @property
    def num_chars(self) -> int:
        """Of all that is said in it."""
        num_chars = 0
        values: list[object] = [*self.messages, *(self.tools or ())]
        while values:
            match values.pop():
                case str() as text:
                    num_chars += len(text)
                case dict() as found:
                    values += found.values()
                case list() as found:
                    values += found
        return num_chars


def prompt_of(
    style: ChatStyle, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> Prompt:
    history = style.history
    if history is not None:
        if history.has_single_calls:
            messages = list(_one_by_one(messages))
        return Prompt([_with_calls(history, message) for message in messages], tools or None)
    family = style.family or HERMES
    told = _as_text(family, messages)
    if tools:
        told = _with_system_text(told, introduction(family, tools), style.has_system)
    return Prompt(told, None)


def introduction(family: Family, tools: Iterable[Mapping[str, Any]]) -> str:
    """What a model is told of its tools, where its template has no words for them."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = family.head_of("<name>") + "{<arguments>}" + family.tail
    return (
        f"You can call these functions:\n<tools>\n{lines}\n</tools>\n"
        "To call one, answer with its name and its arguments as JSON, in this form:\n"
        f"{family.begin}{example}{family.end}"
    )


# Templates that know tools ------------------------------------------------------------------------


def _with_calls(history: History, message: Message) -> Message:
    if "tool_call_id" in message and history.has_short_ids:
        return {**message, "tool_call_id": _short_id(message["tool_call_id"])}
    if "tool_calls" not in message:
        return message
    return {
        **message,
        "content": message["content"] or history.empty_content,
        "tool_calls": [_call_for(history, call) for call in message["tool_calls"]],
    }


def _call_for(history: History, call: Mapping[str, Any]) -> dict[str, Any]:
    name, arguments = _called(call)
    return {
        "id": _short_id(call["id"]) if history.has_short_ids else call["id"],
        "type": "function",
        "function": {
            "name": name,
            "arguments": _parsed(arguments) if history.arguments == "object" else arguments,
        },
    }


def _called(call: Mapping[str, Any]) -> _Call:
    return _Call(call["function"]["name"], call["function"]["arguments"])


def _one_by_one(messages: Sequence[Message]) -> Iterator[Message]:
    """Calls that were made at once, as if each had waited for the result of the one before."""
    results: dict[str, Message] = {}
    for index, message in enumerate(messages):
        if "tool_calls" not in message:
            if message.get("tool_call_id") not in results:
                yield message
            continue
        results = {}
        for result in itertools.takewhile(_is_result, messages[index + 1 :]):
            results[result["tool_call_id"]] = result
        for call in message["tool_calls"]:
            yield {**message, "tool_calls": [call]}
            message = {**message, "content": ""}
            if call["id"] in results:
                yield results[call["id"]]


def _is_result(message: Message) -> bool:
    return bool(message["role"] == "tool")


def _parsed(arguments: str) -> Any:
    """An object; what is none stays text."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _short_id(call_id: str) -> str:
    """The same nine letters and digits for the same id."""
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]


# Templates that do not ----------------------------------------------------------------------------


def _as_text(family: Family, messages: Sequence[Message]) -> list[Message]:
    """Results are told by the user; those that follow each other at once, as speakers may have to
    alternate."""
    told: list[Message] = []
    for message in messages:
        match message:
            case {"role": "tool", "content": result}:
                text = f"<tool_response>\n{result}\n</tool_response>"
                if told and told[-1].get("role") == "results":
                    text = f"{told.pop()['content']}\n{text}"
                told.append({"role": "results", "content": text})
            case {"tool_calls": calls, "content": content, **rest}:
                said = family.write([_called(call) for call in calls])
                content = f"{content}\n{said}" if content else said
                told.append({**rest, "content": content})
            case _:
                told.append(message)
    return [{**m, "role": "user"} if m["role"] == "results" else m for m in told]


def _with_system_text(messages: Sequence[Message], text: str, has_system: bool) -> list[Message]:
    """The text joins the first message if that is the system's, or if no system can speak."""
    first, *rest = messages
    if first["role"] in ("system", "developer"):
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    if has_system:
        return [{"role": "system", "content": text}, *messages]
    if first["role"] == "user":
        return [{**first, "content": f"{text}\n\n{first['content']}"}, *rest]
    return [{"role": "user", "content": text}, *messages]
