"""Grammars compiled beside the engine: in threads of their own, each text once, within limits."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from llguidance import LLMatcher, LLParserLimits

from skipllm_core.grammar.fault import explain
from skipllm_core.grammar.vocabulary import Vocabulary
from skipllm_core.tokenizer import Tokenizer
from skipllm_core.types import MAX_GRAMMAR_BYTES

COMPILE_LIMIT_S = 2.0
NUM_THREADS = 2
# What a grammar takes is up to a thousand times its text.
MAX_CACHED_BYTES = 2 * MAX_GRAMMAR_BYTES
MAX_CACHED_GRAMMARS = 64
# Compiling descends as deep as a schema's references do: thousands of levels, some KiB for each.
# Only what is used is ever there.
STACK_BYTES = 256 * 2**20
# Alternatives at one place: an object's optional properties are 4 each.
MAX_ITEMS_IN_ROW = 10_000
MAX_SYMBOLS = 30_000  # time and memory grow with these: 2 s, and tens of MiB, at the most
# Of llguidance's own measure of work on regular expressions: a second. Whoever takes longer has an
# answer after COMPILE_LIMIT_S, yet holds a thread until it is done.
MAX_REGEX_WORK = 300_000

UNUSABLE = "grammars cannot be used with this model"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar. Who follows it works on a copy of its matcher."""

    matcher: LLMatcher
    vocabulary: Vocabulary
    first_mask: bytes  # what it allows at its beginning, a bit for each token


@dataclass(frozen=True, slots=True)
class GrammarFault:
    """Why there is no grammar; `is_ours` if another text would not have helped."""

    message: str
    is_ours: bool = False


class Compilation:
    """A grammar that is being compiled. Any thread may ask for its outcome."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.started_s: float | None = None  # by time.monotonic
        self._outcome: Grammar | GrammarFault | None = None

    def outcome(self) -> Grammar | GrammarFault | None:
        """None: not yet."""
        outcome, started_s = self._outcome, self.started_s
        if outcome is not None or started_s is None:
            return outcome
        if time.monotonic() - started_s < COMPILE_LIMIT_S:
            return None
        return GrammarFault(f"it takes longer than {COMPILE_LIMIT_S:g} s to compile")

    def end(self, outcome: Grammar | GrammarFault) -> None:
        self._outcome = outcome


class GrammarCompiler:
    """Compiles grammars for one model. `on_done` is called, in a thread, when one has ended.

    The tokenizer is loaded with the first grammar. Not thread-safe: `compile` belongs to the
    engine's thread.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._on_done = on_done
        self._vocabulary: Vocabulary | None = None
        self._vocabulary_lock = threading.Lock()
        self._jobs: SimpleQueue[Compilation] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._cache: OrderedDict[str, Compilation] = OrderedDict()  # the last used one last

    def compile(self, text: str) -> Compilation:
        """Begins to compile, or finds what has been. Never waits."""
        compilation = self._cache.get(text)
        if compilation is None:
            compilation = Compilation(text)
            if len(text.encode()) > MAX_GRAMMAR_BYTES:
                compilation.end(GrammarFault(f"it is larger than {MAX_GRAMMAR_BYTES} bytes"))
                return compilation
            self._cache[text] = compilation
            self._trim_cache()
            self._start_threads()
            self._jobs.put(compilation)
        self._cache.move_to_end(text)
        return compilation

    def _trim_cache(self) -> None:
        num_bytes = sum(map(len, self._cache))
        while len(self._cache) > MAX_CACHED_GRAMMARS or num_bytes > MAX_CACHED_BYTES:
            text, _ = self._cache.popitem(last=False)
            num_bytes -= len(text)

    def _start_threads(self) -> None:
        if self._threads:
            return
        before = threading.stack_size(STACK_BYTES)
        try:
            for _ in range(NUM_THREADS):
                thread = threading.Thread(target=self._run, name="grammars", daemon=True)
                thread.start()
                self._threads.append(thread)
        finally:
            threading.stack_size(before)

    # In the threads.

    def _run(self) -> None:
        while True:
            compilation = self._jobs.get()
            try:
                outcome = self._compile(compilation)
            except BaseException:  # what Rust panics with is no Exception
                logger.exception("a grammar cannot be compiled")
                outcome = GrammarFault(UNUSABLE, is_ours=True)
            compilation.end(outcome)
            self._on_done()

    def _compile(self, compilation: Compilation) -> Grammar | GrammarFault:
        text = compilation.text
        vocabulary = self._load_vocabulary()  # counts for nobody's limit
        compilation.started_s = time.monotonic()
        matcher = new_matcher(vocabulary, text)
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            return GrammarFault(explain(matcher.get_error(), text, vocabulary))
        return Grammar(matcher, vocabulary, mask)

    def _load_vocabulary(self) -> Vocabulary:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary.of(self._load_tokenizer(), self._vocab_size)
            return self._vocabulary


def new_matcher(vocabulary: Vocabulary, text: str) -> LLMatcher:
    limits = LLParserLimits(
        max_items_in_row=MAX_ITEMS_IN_ROW,
        max_grammar_size=MAX_SYMBOLS,
        initial_lexer_fuel=MAX_REGEX_WORK,
        verbose_errors=False,
    )
    return LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=limits)
