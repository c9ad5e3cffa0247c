"""Reasoning between `<think>` and `</think>`, before the answer proper."""

from __future__ import annotations

from server.parts import AnswerParser, Part, Reasoning
from server.tools.source import Script, Source

BEGIN, END = MARKERS = "<think>", "</think>"


class ThinkParser:
    """An AnswerParser that leaves what follows the reasoning to another. White space around the
    reasoning belongs to neither. `is_reasoning`: the prompt has opened it already."""

    def __init__(self, inner: AnswerParser, source: Source, *, is_reasoning: bool) -> None:
        self.is_reasoning = is_reasoning
        self._inner = inner
        self._source = source
        self._has_text = False
        self._spaces: list[str] = []  # part of the reasoning only if more of it follows
        self._parts: list[Part] = []
        self._script = self._read()
        self._is_over = False

    @property
    def is_finished(self) -> bool:
        return self._inner.is_finished

    def feed(self, text: str) -> list[Part]:
        if self._is_over or not text:
            return self._inner.feed(text)
        self._source.give(text)
        return self._resume()

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if not self._is_over:
            self._source.end()
            parts = self._resume()
        return parts + self._inner.finish()

    def _resume(self) -> list[Part]:
        for _ in self._script:
            break
        else:
            self._is_over = True
            self._parts += self._inner.feed(self._source.held() + self._source.rest())
        parts, self._parts = self._parts, []
        return parts

    def _read(self) -> Script[None]:
        source = self._source
        yield from source.hold_spaces()
        start = source.mark()
        marker = yield from source.hold_literal(BEGIN, END)
        if not self.is_reasoning and marker != BEGIN:
            return
        self.is_reasoning = True
        if not marker:
            self._emit(source.held_since(start))
        source.held()
        if marker != END:
            yield from source.until([END], self._emit)
        self.is_reasoning = False
        source.held()
        yield from source.hold_spaces()
        source.held()

    def _emit(self, text: str) -> None:
        kept = text.rstrip()
        if kept:
            text_so_far = "".join((*self._spaces, kept))
            self._parts.append(Reasoning(text_so_far if self._has_text else text_so_far.lstrip()))
            self._has_text = True
            self._spaces.clear()
        self._spaces.append(text[len(kept) :])
