"""The items that a Responses request gives as its input. They are brought to one form here: that of
OpenAI's own lists of items, in which they are stored, too."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from server.protocol.nested import check_num_parts, kind_of, nested, texts_of
from server.protocol.wire import Wire, wrong

MAX_ITEMS = 4096

Item: TypeAlias = dict[str, Any]  # in its one form
ItemId = Annotated[str, Field(max_length=256)]

_CONTENT = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


class ContentPart(Wire):
    type: Literal["input_text", "output_text", "refusal"]
    """What the part is; this model reads text only."""
    text: str | None = None
    """The text; of a refusal, it is in `refusal`."""
    refusal: str | None = None
    """A refusal's text."""


class InputMessage(Wire):
    type: Literal["message"] = "message"
    """A message; items that have a role need not say so."""
    role: Literal["user", "assistant", "system", "developer"]
    """Who speaks."""
    content: str | list[ContentPart]
    """What is said: text, or parts of text."""
    id: ItemId | None = None
    """The item's id, if it has one."""

    @classmethod
    def read(cls, value: object, path: str) -> Item:
        message = nested(_Unread, value, path)
        texts = texts_of(message.content, f"{path}.content", _CONTENT)
        kind: dict[str, Any] = {"type": "input_text"}
        if message.role == "assistant":
            kind = {"type": "output_text", "annotations": []}
        return {
            "id": message.id or new_id("msg"),
            "type": "message",
            "status": "completed",
            "role": message.role,
            "content": [{**kind, "text": text} for text in texts],
        }


class _Unread(Wire):
    """A message whose content is looked at by hand: a union would name all that it is not."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Any
    id: ItemId | None = None


class FunctionCall(Wire):
    type: Literal["function_call"]
    """A call that the model made."""
    call_id: ItemId
    """The call's id, which its output refers to."""
    name: str
    """The function that was called."""
    arguments: str
    """Its arguments, as JSON text."""
    id: ItemId | None = None
    """The item's id, if it has one."""

    @classmethod
    def read(cls, value: object, path: str) -> Item:
        call = nested(cls, value, path)
        return {
            "id": call.id or new_id("fc"),
            "type": "function_call",
            "status": "completed",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
        }


class FunctionCallOutput(Wire):
    type: Literal["function_call_output"]
    """What a call returned."""
    call_id: ItemId
    """The call's id."""
    output: str | list[ContentPart]
    """Text, or parts of text."""
    id: ItemId | None = None
    """The item's id, if it has one."""

    @classmethod
    def read(cls, value: object, path: str) -> Item:
        given = nested(_UnreadOutput, value, path)
        texts = texts_of(given.output, f"{path}.output", {"input_text": "text"})
        return {
            "id": given.id or new_id("fco"),
            "type": "function_call_output",
            "status": "completed",
            "call_id": given.call_id,
            "output": "\n".join(texts),
        }


class _UnreadOutput(Wire):
    call_id: ItemId
    output: Any
    id: ItemId | None = None


class ReasoningItem(Wire):
    type: Literal["reasoning"]
    """What the model thought."""
    id: ItemId | None = None
    """The item's id, if it has one."""
    summary: list[dict[str, Any]] | None = None
    """Parts of the type `summary_text`; the model is not shown them."""
    content: list[dict[str, Any]] | None = None
    """Parts of the type `reasoning_text`, for templates that show them."""

    @classmethod
    def read(cls, value: object, path: str) -> Item:
        item = nested(cls, value, path)
        summary = texts_of(item.summary or [], f"{path}.summary", {"summary_text": "text"})
        content = texts_of(item.content or [], f"{path}.content", {"reasoning_text": "text"})
        return {
            "id": item.id or new_id("rs"),
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": text} for text in summary],
            "content": [{"type": "reasoning_text", "text": text} for text in content],
        }


class ItemReference(Wire):
    type: Literal["item_reference"]
    """An item of a stored response's output."""
    id: ItemId
    """Its id."""

    @classmethod
    def read(cls, value: object, path: str) -> Item:
        return {"type": "item_reference", "id": nested(cls, value, path).id}


InputItem = InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem | ItemReference

_READERS: dict[str, Callable[[object, str], Item]] = {
    "message": InputMessage.read,
    "function_call": FunctionCall.read,
    "function_call_output": FunctionCallOutput.read,
    "reasoning": ReasoningItem.read,
    "item_reference": ItemReference.read,
}


def read_items(value: Any) -> list[Item]:
    """The items of an `input`; a text is a user's message."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise wrong("input_type", "", value)
    check_num_parts(value, MAX_ITEMS)
    items = []
    for index, item in enumerate(value):
        path = f"[{index}]"
        default = "message" if isinstance(item, dict) and "role" in item else None
        kind = kind_of(item, path, tuple(_READERS), default)
        items.append(_READERS[kind](item, path))
    return items


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
