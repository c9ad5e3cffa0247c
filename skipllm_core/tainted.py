"""Text that remembers which of it is not the template's own (taint tracking, span by span).

A chat template joins what it writes itself with what others have said. A `Tainted` is a str whose
value is the plain text, so that every condition of a template sees a message as it is. The spans
that others wrote go with it through concatenation, slicing, split, strip, replace and so on.

Where Python makes an ordinary str of it (`str(text)`, `"%s" % text`, a dict that is printed), the
spans are written into the text, between marks that nobody can guess, and `Marks.read` finds them:

    str(text)  ->  OPEN "hi" CLOSE  ->  Marks.read  ->  text
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from enum import IntFlag
from operator import index
from typing import Any, NamedTuple, Self, SupportsIndex


class Origin(IntFlag):
    """Who wrote a span; in what is mixed beyond recognition, several have."""

    INSTRUCTOR = 1  # anyone but the user: the application, the model, a tool
    USER = 2
    FINAL = 4  # besides: it belongs to the message that is to be continued


class Span(NamedTuple):
    start: int
    end: int
    origin: Origin


class Marks:
    """How spans stand in an ordinary str: in ASCII letters and digits, which no quoting changes."""

    def __init__(self) -> None:
        self._nonce = f"q{secrets.token_hex(8)}"
        self._any = re.compile(f"{self._nonce}([0-7])z")

    def write(self, text: str, spans: Iterable[Span]) -> str:
        parts: list[str] = []
        position = 0
        for start, end, origin in spans:
            parts += text[position:start], self._mark(origin), text[start:end], self._mark(0)
            position = end
        return "".join((*parts, text[position:]))

    def read(self, marked: str) -> str:
        """The text without its marks, Tainted if there were any. If an operation that knows
        nothing of marks cut off one of a pair, more is tainted and never less."""
        if self._nonce not in marked:
            return marked
        text, *rest = self._any.split(marked)
        opened: list[Origin] = []
        pieces = [text]
        for mark, piece in zip(rest[::2], rest[1::2], strict=True):
            if mark != "0":
                opened.append(Origin(int(mark)))
            elif opened:
                opened.pop()
            else:  # what was open until here is not known
                pieces = [self.taint("".join(map(plain, pieces)), Origin.USER)]
            pieces.append(self.taint(piece, _union(opened)) if opened else piece)
        return self.join(pieces)

    def taint(self, value: Any, origin: Origin) -> Any:
        """A copy of a JSON value in which every string is of that origin, keys included."""
        if isinstance(value, str):
            return Tainted(plain(value), (Span(0, len(value), origin),), self)
        if isinstance(value, Mapping):
            return {self.taint(k, origin): self.taint(v, origin) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.taint(item, origin) for item in value]
        return value

    def join(self, parts: Iterable[str]) -> Tainted:
        parts = list(parts)
        spans: list[Span] = []
        position = 0
        for part in parts:
            for start, end, origin in spans_of(part):
                moved = Span(start + position, end + position, origin)
                if spans and spans[-1].end == moved.start and spans[-1].origin == origin:
                    moved = Span(spans.pop().start, moved.end, origin)
                spans.append(moved)
            position += len(part)
        return Tainted("".join(map(plain, parts)), spans, self)

    def whole(self, text: str, *sources: object) -> str:
        """A text that was made of the sources in a way that lost the spans: all of it is of
        whoever wrote in them."""
        found = self.read(str(text))
        origins = [span.origin for source in sources for span in spans_of(source)]
        return found if spans_of(found) or not origins else self.taint(found, _union(origins))

    def _mark(self, number: int) -> str:
        return f"{self._nonce}{number:d}z"


class Tainted(str):
    """A text with the spans of it that others wrote, in ascending order.

    Methods of str that are not here return an ordinary str without marks: `Marks.whole` is for
    what they return.
    """

    __slots__ = ("_marks", "_spans")  # templates cannot name what begins with an underscore
    _marks: Marks
    _spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: Iterable[Span], marks: Marks) -> Self:
        self = super().__new__(cls, plain(text))
        self._spans = tuple(span for span in spans if span.start < span.end)
        self._marks = marks
        return self

    def __str__(self) -> str:
        return self._marks.write(plain(self), self._spans)

    def __repr__(self) -> str:
        return str(self._marks.whole(repr(plain(self)), self))

    def __format__(self, spec: str) -> str:
        return str(self._marks.whole(format(plain(self), spec), self)) if spec else str(self)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, str):
            return plain(self) + other  # raises what str raises
        return self._marks.join((self, other))

    def __radd__(self, other: Any) -> Any:
        return self._marks.join((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> str:
        return self._marks.join([self] * index(count))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return self._marks.whole(plain(self) % values, self)

    def __rmod__(self, template: str) -> str:
        return self._marks.read(template % (str(self),))

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if not isinstance(key, slice):
            at = range(len(self))[index(key)]  # an IndexError is raised here
            return self._part(at, at + 1)
        start, stop, step = key.indices(len(self))
        if step == 1:
            return self._part(start, max(start, stop))
        return self._marks.join(self._part(i, i + 1) for i in range(start, stop, step))

    def __iter__(self) -> Iterator[str]:
        return (self._part(i, i + 1) for i in range(len(self)))

    def join(self, parts: Iterable[str]) -> str:
        joined: list[str] = []
        for part in parts:
            joined += (self, part) if joined else (part,)
        return self._marks.join(joined)

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        if not old:
            return self._marks.whole(plain(self).replace(old, plain(new), count), self, new)
        return Tainted(new, spans_of(new), self._marks).join(self.split(old, count))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(plain(self).split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(plain(self).rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._located(plain(self).splitlines(True), "")
        ends = map(len, plain(self).splitlines(keepends))
        return [line[:end] for line, end in zip(lines, ends, strict=True)]

    def partition(self, sep: str) -> tuple[str, str, str]:
        head, _, _ = plain(self).partition(sep)
        return self._parted(len(head), sep)

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        head, found, _ = plain(self).rpartition(sep)
        return self._parted(len(head), sep if found else "")

    def strip(self, chars: str | None = None) -> str:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> str:
        return self[len(self) - len(plain(self).lstrip(chars)) :]

    def rstrip(self, chars: str | None = None) -> str:
        return self[: len(plain(self).rstrip(chars))]

    def removeprefix(self, prefix: str) -> str:
        return self[len(self) - len(plain(self).removeprefix(prefix)) :]

    def removesuffix(self, suffix: str) -> str:
        return self[: len(plain(self).removesuffix(suffix))]

    def upper(self) -> str:
        return self._recased(plain(self).upper())

    def lower(self) -> str:
        return self._recased(plain(self).lower())

    def title(self) -> str:
        return self._recased(plain(self).title())

    def capitalize(self) -> str:
        return self._recased(plain(self).capitalize())

    def _part(self, start: int, end: int) -> str:
        cut = (
            Span(max(a, start) - start, min(b, end) - start, origin) for a, b, origin in self._spans
        )
        return Tainted(plain(self)[start:end], cut, self._marks)

    def _located(self, pieces: list[str], sep: str | None) -> list[str]:
        """The pieces of the text, which lie in it one after the other with `sep` between."""
        found = []
        position = 0
        for piece in pieces:
            if sep is None:  # any white space, and no piece begins with it unless it is the first
                position = plain(self).index(piece, position)
            found.append(self._part(position, position + len(piece)))
            position += len(piece) + len(sep or "")
        return found

    def _parted(self, at: int, sep: str) -> tuple[str, str, str]:
        behind = at + len(sep)
        return self[:at], self[at:behind], self[behind:]

    def _recased(self, text: str) -> str:
        if len(text) != len(self):  # "ß".upper() is longer
            return self._marks.whole(text, self)
        return Tainted(text, self._spans, self._marks)


def plain(text: str) -> str:
    """The text as an ordinary str, without any spans."""
    return str.__str__(text)


def spans_of(value: object) -> tuple[Span, ...]:
    return value._spans if isinstance(value, Tainted) else ()


def _union(origins: Iterable[Origin]) -> Origin:
    union = Origin(0)
    for origin in origins:
        union |= origin
    return union
