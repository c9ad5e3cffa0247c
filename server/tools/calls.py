"""Calls, found in what the model says: what the parsers of all families have in common.

A call begins as soon as its name is known to be a tool's and its arguments have begun. From then on
its arguments are what the model writes, to the end of the object. What looks like a call and has
not come so far is content, exactly as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeAlias

from server.parts import Content, Part, ToolCallArguments, ToolCallBegin, merged
from server.tools.source import Script, Source

ARGUMENTS = ("arguments", "parameters")  # Hermes and Mistral say the one, Llama the other
KEYS = {"name", *ARGUMENTS, "id", "type"}  # other objects are not held until they end


class Calls:
    """The parts found so far, up to the last call that is wanted."""

    def __init__(
        self, names: Collection[str], new_id: Callable[[], str], max_calls: int | None = None
    ) -> None:
        self.is_finished = False  # what follows is of no interest
        self._names = frozenset(names)
        self._new_id = new_id
        self._max_calls = max_calls
        self._num_calls = 0
        self._parts: list[Part] = []
        self._is_bare = True  # no content since the beginning, or since the last call
        self._spaces: list[str] = []

    def take(self) -> list[Part]:
        """The parts found since the last time, pieces of the same joined."""
        parts, self._parts = self._parts, []
        return merged(parts)

    def knows(self, name: str) -> bool:
        return name in self._names

    def content(self, text: str) -> None:
        """White space that stands alone before, between or after calls is no content."""
        if self.is_finished:
            return
        if self._is_bare and not text.strip():
            self._spaces.append(text)
            return
        text = "".join((*self._spaces, text))
        self._spaces.clear()
        self._is_bare = False
        self._parts.append(Content(text))

    def begin(self, name: str) -> None:
        if not self.is_finished:
            self._spaces.clear()
            self._parts.append(ToolCallBegin(self._num_calls, self._new_id(), name))
            self._num_calls += 1

    def arguments(self, text: str) -> None:
        if not self.is_finished:
            self._parts.append(ToolCallArguments(self._num_calls - 1, text))

    def end(self) -> None:
        """The call begun last is complete."""
        self._is_bare = True
        self.is_finished |= self._num_calls == self._max_calls

    def finish(self) -> None:
        """No more text comes."""
        if self._num_calls == 0 and self._spaces:
            self._parts.append(Content("".join(self._spaces)))
        self._spaces.clear()


Reader: TypeAlias = Callable[[Source, Calls], Script[None]]  # a family's way of writing calls


class CallParser:
    """An AnswerParser of one family's calls."""

    is_reasoning = False

    def __init__(self, read: Reader, source: Source, calls: Calls) -> None:
        self._source = source
        self._calls = calls
        self._script = read(source, calls)

    @property
    def is_finished(self) -> bool:
        return self._calls.is_finished

    def feed(self, text: str) -> list[Part]:
        if not text or self.is_finished:
            return []
        self._source.give(text)
        self._resume()
        return self._calls.take()

    def finish(self) -> list[Part]:
        if not self.is_finished:
            self._source.end()
            self._resume()
        self._calls.finish()
        return self._calls.take()

    def _resume(self) -> None:
        for _ in self._script:
            return


def release(source: Source, calls: Calls) -> None:
    """What is held was no call."""
    if held := source.held():
        calls.content(held)


def read_call(source: Source, calls: Calls) -> Script[bool]:
    """Reads `{"name": .., "arguments": {..}}` behind its first brace, in any order. Whether a call
    was begun; if not, what was read is held."""
    name: str | None = None
    early: str | None = None  # arguments that came before the name
    while (key := (yield from _key(source))) is not None:
        if key == "name" and name is None:
            name = yield from source.hold_string()
            is_member = name is not None and calls.knows(name)
        elif key in ARGUMENTS and name is not None:
            return (yield from read_arguments(source, calls, name)) and (
                yield from _end_call(source, calls)
            )
        elif key in ARGUMENTS and early is None:
            early = yield from _held_object(source)
            is_member = early is not None
        else:
            is_member = key in KEYS and (yield from source.hold_value())
        if is_member and name is not None and early is not None:
            _begin(source, calls, name, early)
            return (yield from _end_call(source, calls))
        yield from source.hold_spaces()
        if not is_member or not (yield from source.hold_literal(",")):
            break
    return False


def _end_call(source: Source, calls: Calls) -> Script[bool]:
    """Leaves out the rest of a call's object."""
    yield from source.hold_spaces()
    while (yield from source.hold_literal(",")):
        if (yield from _key(source)) is None or not (yield from source.hold_value()):
            break
        yield from source.hold_spaces()
    yield from source.hold_literal("}")
    source.held()
    calls.end()
    return True


def read_arguments(source: Source, calls: Calls, name: str) -> Script[bool]:
    """Begins the call if an object comes next, and passes that on as it comes."""
    start = source.mark()
    if not (yield from _hold_opening(source)):
        return False
    _begin(source, calls, name, source.held_since(start))
    yield from source.follow_brackets(calls.arguments, depth=1)
    return True


def _begin(source: Source, calls: Calls, name: str, arguments: str) -> None:
    source.held()
    calls.begin(name)
    calls.arguments(arguments)


def _key(source: Source) -> Script[str | None]:
    """The next key of an object, with its colon."""
    yield from source.hold_spaces()
    key = yield from source.hold_string()
    yield from source.hold_spaces()
    has_colon = yield from source.hold_literal(":")
    yield from source.hold_spaces()
    return key if has_colon else None


def _hold_opening(source: Source) -> Script[bool]:
    """Whether an object comes next, as far as its first key or its end."""
    if (yield from source.peek()) != "{":
        return False
    source.hold_char()
    yield from source.hold_spaces()
    return (yield from source.peek()) in ('"', "}")


def _held_object(source: Source) -> Script[str | None]:
    start = source.mark()
    is_object = (yield from _hold_opening(source)) and (yield from source.hold_brackets(depth=1))
    return source.held_since(start) if is_object else None
