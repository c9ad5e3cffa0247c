"""Sequences that follow a grammar: when they can be admitted, and what moves them on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows

from skipllm_core.grammar.compiler import (
    UNUSABLE,
    Compilation,
    Grammar,
    GrammarCompiler,
    GrammarFault,
)
from skipllm_core.grammar.masks import MaskMaker
from skipllm_core.grammar.state import GrammarState
from skipllm_core.sequence import Sequence
from skipllm_core.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Grammars:
    """Belongs to the engine's thread; what takes time happens in others."""

    def __init__(self, load_tokenizer: Callable[[], Tokenizer], vocab_size: int) -> None:
        self._news = threading.Event()
        self._compiler = GrammarCompiler(load_tokenizer, vocab_size, self._news.set)
        self._masks = MaskMaker(self._news.set)
        self._compiling: dict[int, tuple[Sequence, Compilation]] = {}

    @property
    def num_compiling(self) -> int:
        return len(self._compiling)

    def add(self, seq: Sequence) -> None:
        """Begins to compile the sequence's grammar."""
        assert seq.params.grammar is not None
        self._compiling[seq.seq_id] = seq, self._compiler.compile(seq.params.grammar)

    def discard(self, seq: Sequence) -> bool:
        """Forgets a sequence; whether it was one that waited for its grammar."""
        return self._compiling.pop(seq.seq_id, None) is not None

    def pop_compiled(self) -> Iterator[tuple[Sequence, GrammarFault | None]]:
        """The sequences that need not wait any more, with what is wrong with their grammar, if
        anything is."""
        for seq, compilation in list(self._compiling.values()):
            outcome = compilation.outcome()
            if outcome is None:
                continue
            del self._compiling[seq.seq_id]
            if isinstance(outcome, Grammar):
                try:
                    seq.grammar = GrammarState(outcome, seq.params)
                except BaseException:  # what Rust panics with is no Exception
                    logger.exception("a grammar cannot be followed")
                    yield seq, GrammarFault(UNUSABLE, is_ours=True)
                else:
                    yield seq, None
            else:
                yield seq, outcome

    def move_on(self, seqs: Rows[Sequence]) -> None:
        """Begins to make the masks for the tokens after those just accepted."""
        states = [seq.grammar for seq in seqs if seq.grammar is not None]
        if states:
            self._masks.request(states)

    def wait(self, timeout_s: float) -> bool:
        """Until a grammar is compiled or a mask is made; whether one was."""
        has_news = self._news.wait(timeout_s)
        self._news.clear()
        return has_news
