"""An answer's characters as they come, for parsers that read ahead no further than they must.

A parser is a generator: it yields where it needs more text. Text that may turn out to be a call is
held, to be dropped when it does and to be released as content when it does not:

    "Let me see. <tool"      content: "Let me see. "     held: "<tool"
    "Let me see. <tools>"    content: all of it

Every character is looked at a bounded number of times; nothing is read twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Script: TypeAlias = Generator[None, None, T]  # returns T; is resumed when there is more text

_SPACES = re.compile(r"[ \t\r\n]+")
_SCALAR = re.compile(r"[^\s,:{}\[\]\"]+")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_IN_STRING = re.compile(r'["\\]')
_STRUCTURE = re.compile(r'["{}\[\]]')


class Source:
    """`hidden` are markers that are special tokens: shown to parsers alone, never content."""

    def __init__(self, hidden: Collection[str] = ()) -> None:
        self._hidden = frozenset(hidden)
        self._text = ""
        self._pos = 0
        self._has_ended = False
        self._held: list[str] = []

    def give(self, text: str) -> None:
        assert self._pos == len(self._text), "what was given before is not read"
        self._text, self._pos = text, 0

    def end(self) -> None:
        self._has_ended = True

    def rest(self) -> str:
        """All that was given and is not read."""
        start, self._pos = self._pos, len(self._text)
        return self._text[start:]

    def held(self) -> str:
        """What is held, which is not held any more."""
        held = "".join(self._held)
        self._held.clear()
        return held

    def peek(self) -> Script[str]:
        """The next character; "" at the end."""
        while self._pos == len(self._text):
            if self._has_ended:
                return ""
            yield
        return self._text[self._pos]

    def until(self, markers: Collection[str], emit: Callable[[str], None]) -> Script[str]:
        """Emits what comes before the first of the markers, and holds that. Returns it; "" at the
        end. A marker's first character must not come again in it."""
        wanted = {*markers, *self._hidden}
        first = re.compile("|".join(sorted({_beginning_of(marker) for marker in wanted})))
        while (yield from self.peek()):
            found = first.search(self._text, self._pos)
            if found is None:
                emit(self.rest())
                continue
            if found.start() > self._pos:
                emit(self._text[self._pos : found.start()])
                self._pos = found.start()
            text = yield from self._longest_match(wanted)
            if text in markers:
                self._hold(text)
                return text
            if text not in self._hidden:
                emit(text)
        return ""

    def _longest_match(self, markers: Collection[str]) -> Script[str]:
        """As much of the text as agrees with one of the markers, up to a whole one."""
        agreed = ""
        while agreed not in markers and (char := (yield from self.peek())):
            markers = [marker for marker in markers if marker.startswith(agreed + char)]
            if not markers:
                break
            agreed += char
            self._pos += 1
        return agreed

    # Holding --------------------------------------------------------------------------------------

    def mark(self) -> int:
        return len(self._held)

    def held_since(self, mark: int) -> str:
        return "".join(self._held[mark:])

    def _hold(self, text: str) -> None:
        if text and text not in self._hidden:
            self._held.append(text)

    def hold_char(self) -> None:
        """The one that was peeked at."""
        self._held.append(self._text[self._pos])
        self._pos += 1

    def hold_literal(self, *literals: str) -> Script[str]:
        """The one of them that comes next, or ""; as much as agrees is held."""
        agreed = yield from self._longest_match(literals)
        self._hold(agreed)
        return agreed if agreed in literals else ""

    def hold_spaces(self) -> Script[None]:
        yield from self._hold_run(_SPACES)

    def hold_name(self) -> Script[str]:
        return (yield from self._hold_run(_NAME))

    def _hold_run(self, pattern: re.Pattern[str]) -> Script[str]:
        """The longest run of a pattern that may be cut anywhere."""
        start = self.mark()
        while (yield from self.peek()) and (found := pattern.match(self._text, self._pos)):
            self._held.append(found[0])
            self._pos = found.end()
        return self.held_since(start)

    # JSON: what follows the brackets and strings; values are not checked further ------------------

    def hold_string(self) -> Script[str | None]:
        """The string that comes next; None if none does."""
        if (yield from self.peek()) != '"':
            return None
        start = self.mark()
        self.hold_char()
        if not (yield from self._follow_string(self._held.append)):
            return None
        try:
            value = json.loads(self.held_since(start), strict=False)
        except ValueError:
            return None
        assert isinstance(value, str)
        return value

    def hold_value(self) -> Script[bool]:
        """Whether a JSON value comes next."""
        match (yield from self.peek()):
            case '"':
                return (yield from self.hold_string()) is not None
            case "{" | "[":
                return (yield from self.hold_brackets())
            case _:
                return bool((yield from self._hold_run(_SCALAR)))

    def hold_brackets(self, depth: int = 0) -> Script[bool]:
        return (yield from self.follow_brackets(self._held.append, depth))

    def follow_brackets(self, emit: Callable[[str], None], depth: int = 0) -> Script[bool]:
        """Emits the text of the array or object that comes next, or whose rest does (`depth`: how
        many are open), piece by piece. Whether it was closed before the end."""
        while (yield from self.peek()):
            found = _STRUCTURE.search(self._text, self._pos)
            if found is None:
                emit(self.rest())
                continue
            emit(self._text[self._pos : found.end()])
            self._pos = found.end()
            if found[0] == '"':
                yield from self._follow_string(emit)
            else:
                depth += 1 if found[0] in "{[" else -1
                if not depth:
                    return True
        return False

    def _follow_string(self, emit: Callable[[str], None]) -> Script[bool]:
        """The same for a string, behind its first quote."""
        while (yield from self.peek()):
            found = _IN_STRING.search(self._text, self._pos)
            end = len(self._text) if found is None else found.end()
            emit(self._text[self._pos : end])
            self._pos = end
            if found is not None and found[0] == '"':
                return True
            if found is not None and (char := (yield from self.peek())):  # escaped
                emit(char)
                self._pos += 1
        return False


def _beginning_of(marker: str) -> str:
    """A pattern of its first character, where more of it may follow."""
    if marker == "{":  # of an object that is not empty; code is full of others
        return r'\{(?=["\s]|\Z)'
    return re.escape(marker[0])
