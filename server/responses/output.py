"""An answer's parts as the items of a response, and the events that tell how they come to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from server.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin
from server.protocol.items import Item, new_id

Event: TypeAlias = dict[str, Any]  # without its sequence number
Logprobs: TypeAlias = list[dict[str, Any]]


class Output:
    """The items of one answer. `items` are those that are complete."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._open: _OpenItem | None = None

    def add(self, parts: Sequence[Part], logprobs: Logprobs) -> Iterator[Event]:
        """`logprobs` are of the content among the parts; the first piece of it bears them all."""
        for part in parts:
            match part:
                case Content(text):
                    if not isinstance(self._open, _Message):
                        yield from self._begin(_Message())
                    yield from self._continue(text, logprobs)
                    logprobs = []
                case Reasoning(text):
                    if not isinstance(self._open, _Reasoning):
                        yield from self._begin(_Reasoning())
                    yield from self._continue(text)
                case ToolCallBegin(_, call_id, name):
                    yield from self._begin(_Call(call_id, name))
                case ToolCallArguments(_, text):
                    yield from self._continue(text)

    def finish(self, status: str) -> Iterator[Event]:
        """Closes the last item, with the answer's own status. An answer of nothing at all is a
        message of no text: clients look for one."""
        if not self.items and self._open is None:
            yield from self._begin(_Message())
        yield from self._close(status)

    def _begin(self, item: _OpenItem) -> Iterator[Event]:
        yield from self._close("completed")
        self._open = item
        added = {"type": "response.output_item.added", "item": item.shown("in_progress")}
        yield from self._placed([added, *item.opening()])

    def _continue(self, text: str, logprobs: Logprobs | None = None) -> Iterator[Event]:
        assert self._open is not None
        if text:
            yield from self._placed([self._open.add(text, logprobs or [])])

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is None:
            return
        item = self._open.shown(status)
        done = {"type": "response.output_item.done", "item": item}
        yield from self._placed([*self._open.closing(), done])
        self.items.append(item)
        self._open = None

    def _placed(self, events: Sequence[Event]) -> Iterator[Event]:
        assert self._open is not None
        for event in events:
            where = {} if "item" in event else {"item_id": self._open.id}
            yield {**event, **where, "output_index": len(self.items)}


class _OpenItem(Protocol):
    """An item that is being written. Implementations: _Text in two kinds, and _Call."""

    id: str

    def shown(self, status: str) -> Item: ...

    def opening(self) -> list[Event]: ...

    def add(self, text: str, logprobs: Logprobs) -> Event: ...

    def closing(self) -> list[Event]: ...


class _Text:
    """An item of one part of text."""

    id_prefix: str
    kind: str  # of the part, and of its events

    def __init__(self) -> None:
        self.id = new_id(self.id_prefix)
        self._texts: list[str] = []
        self._logprobs: Logprobs = []

    def part(self) -> dict[str, Any]:
        return {"type": self.kind, "text": "".join(self._texts)}

    def opening(self) -> list[Event]:
        added = {"type": "response.content_part.added", "content_index": 0, "part": self.part()}
        return [added]

    def add(self, text: str, logprobs: Logprobs) -> Event:
        self._texts.append(text)
        self._logprobs += logprobs
        return {"type": f"response.{self.kind}.delta", "content_index": 0, "delta": text}

    def closing(self) -> list[Event]:
        part = self.part()
        done = {"type": f"response.{self.kind}.done", "content_index": 0, "text": part["text"]}
        part_done = {"type": "response.content_part.done", "content_index": 0, "part": part}
        return [done, part_done]


class _Message(_Text):
    id_prefix = "msg"
    kind = "output_text"

    def part(self) -> dict[str, Any]:
        return super().part() | {"annotations": [], "logprobs": self._logprobs}

    def add(self, text: str, logprobs: Logprobs) -> Event:
        return super().add(text, logprobs) | {"logprobs": logprobs}

    def closing(self) -> list[Event]:
        done, part_done = super().closing()
        return [done | {"logprobs": self._logprobs}, part_done]

    def shown(self, status: str) -> Item:
        content = [] if status == "in_progress" else [self.part()]
        return {
            "id": self.id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }


class _Reasoning(_Text):
    """The reasoning itself: there is nobody who would sum it up."""

    id_prefix = "rs"
    kind = "reasoning_text"

    def shown(self, status: str) -> Item:
        content = [] if status == "in_progress" else [self.part()]
        return {
            "id": self.id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": content,
        }


class _Call:
    def __init__(self, call_id: str, name: str) -> None:
        self.id = new_id("fc")
        self._call_id = call_id
        self._name = name
        self._arguments: list[str] = []

    def shown(self, status: str) -> Item:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }

    def opening(self) -> list[Event]:
        return []

    def add(self, text: str, logprobs: Logprobs) -> Event:
        self._arguments.append(text)
        return {"type": "response.function_call_arguments.delta", "delta": text}

    def closing(self) -> list[Event]:
        arguments = "".join(self._arguments)
        done = {"type": "response.function_call_arguments.done", "name": self._name}
        return [done | {"arguments": arguments}]
