"""Token ids to text as they come: whole characters only, and stop strings never shown in part."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from skipllm_core.tokenizer import Tokenizer

_MAX_UNFINISHED = 3  # bytes of a character of 4


class Detokenizer:
    """The text of one sequence. `add` each token, then `flush`; join what they return.

    What comes out does not depend on how the tokens were grouped into steps. Bytes that can still
    become a character are held back, and so is text that can still become a stop string:

        generated:  The answer is 42.\\nQuest
        released:   The answer is 42.            held: "\\nQuest", as "\\nQuestion:" stops

    Of several stop strings, the one completed first ends the text (the longest of those completed
    together). Text of the first `min_tokens` tokens is not searched. A stop string that spells a
    special token is found at that token, although it is not shown.

    The text goes on where `prompt_ids` end, which may be inside a character: that is shown whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown_tokens: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self.stopped_by: str | None = None  # the stop string found; nothing follows it
        self.num_chars = 0  # whole characters so far, held ones included
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._shown_tokens = frozenset(shown_tokens)  # special ones that are not skipped
        self._num_unsearched = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(unfinished_bytes(tokenizer, prompt_ids))
        self._held = ""

    def add(self, token_id: int, *, is_searched: bool = True) -> str:
        """The text that one more token releases; stop strings may be looked for in it."""
        assert self.stopped_by is None, "the text has ended"
        is_shown = (
            not self._skip_special_tokens
            or token_id in self._shown_tokens
            or not self._tokenizer.is_special(token_id)
        )
        raw = self._tokenizer.token_bytes(token_id)
        text = self._utf8.decode(raw) if is_shown else ""
        self.num_chars += len(text)
        if self._num_unsearched > 0:
            self._num_unsearched -= 1
            return text
        if not is_searched:
            return self.flush() + text
        if not self._stop:
            return text
        return self._search(text) if is_shown else self._pass(raw.decode(errors="replace"))

    def flush(self) -> str:
        """The text still held back, once no more tokens come. Bytes of an unfinished character
        never became text and are dropped."""
        held, self._held = self._held, ""
        return held

    def _pass(self, spelling: str) -> str:
        """What a special token that is not shown releases: all, if it is a stop string."""
        if spelling not in self._stop:
            return ""
        self.stopped_by = spelling
        return self.flush() + spelling * self._include_stop

    def _search(self, text: str) -> str:
        text = self._held + text
        found = [(text.index(s) + len(s), -len(s), s) for s in self._stop if s in text]
        if found:
            end, _, self.stopped_by = min(found)
            self._held = ""
            return text[: end if self._include_stop else end - len(self.stopped_by)]
        num_held = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def unfinished_bytes(tokenizer: Tokenizer, token_ids: Sequence[int]) -> bytes:
    """The first bytes of a character that the tokens end inside."""
    raw = b""
    for token_id in token_ids[: -_MAX_UNFINISHED - 1 : -1]:
        raw = tokenizer.token_bytes(token_id) + raw
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    utf8.decode(raw[-_MAX_UNFINISHED:])  # UTF-8 is understood from anywhere on
    return utf8.getstate()[0]


def whole_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of the tokens without a character that they end inside."""
    num_whole = len(token_ids)
    while num_whole and unfinished_bytes(tokenizer, token_ids[:num_whole]):
        num_whole -= 1
    rest = b"".join(map(tokenizer.token_bytes, token_ids[num_whole:]))
    head = tokenizer.decode(token_ids[:num_whole])
    return head + codecs.getincrementaldecoder("utf-8")("replace").decode(rest)


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` may be the beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
