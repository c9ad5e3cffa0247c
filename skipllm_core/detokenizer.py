"""Token ids to text as they come: whole characters only, and stop strings never shown in part."""

from __future__ import annotations

import codecs

from skipllm_core.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence. `add` each token, then `flush`; join what they return.

    What comes out does not depend on how the tokens were grouped into steps. Bytes that can still
    become a character are held back, and so is text that can still become a stop string:

        generated:  The answer is 42.\\nQuest
        released:   The answer is 42.            held: "\\nQuest", as "\\nQuestion:" stops

    Of several stop strings, the one completed first ends the text (the longest of those completed
    together). Text of the first `min_tokens` tokens is not searched.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self.stopped_by: str | None = None  # the stop string found; nothing follows it
        self.num_chars = 0  # whole characters so far, held ones included
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._num_unsearched = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token_id: int) -> str:
        """The text that one more token releases."""
        assert self.stopped_by is None, "the text has ended"
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            text = ""
        else:
            text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self.num_chars += len(text)
        if self._num_unsearched > 0:
            self._num_unsearched -= 1
            return text
        return self._search(text) if self._stop else text

    def flush(self) -> str:
        """The text still held back, once no more tokens come. Bytes of an unfinished character
        never became text and are dropped."""
        held, self._held = self._held, ""
        return held

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


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` may be the beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
