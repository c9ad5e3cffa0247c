"""Threads that make the next masks while the step that needs them is computed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from skipllm_core.grammar.state import GrammarState

MAX_THREADS = 4

logger = logging.getLogger(__name__)


class MaskMaker:
    """Fills the masks of sequences that moved on. `on_done` is called, in a thread, after each job.

    Grammars that have been slow have a thread for themselves. llguidance gives the interpreter
    free while it works, as the decode step's kernels do.
    """

    def __init__(self, on_done: Callable[[], None] = lambda: None) -> None:
        self._on_done = on_done
        self._num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 4))
        self._jobs: SimpleQueue[Sequence[GrammarState]] = SimpleQueue()
        self._slow_jobs: SimpleQueue[Sequence[GrammarState]] = SimpleQueue()
        self._has_threads = False

    def request(self, states: Sequence[GrammarState]) -> None:
        """Begins to fill the masks of all; never waits."""
        self._start_threads()
        fast = [state for state in states if not state.is_slow]
        for share in range(self._num_threads):
            if states_of_one := fast[share :: self._num_threads]:
                self._jobs.put(states_of_one)
        for state in states:
            if state.is_slow:
                self._slow_jobs.put([state])

    def _start_threads(self) -> None:
        if self._has_threads:
            return
        self._has_threads = True
        for jobs in [self._jobs] * self._num_threads + [self._slow_jobs]:
            threading.Thread(target=self._run, args=(jobs,), name="masks", daemon=True).start()

    def _run(self, jobs: SimpleQueue[Sequence[GrammarState]]) -> None:
        while True:
            for state in jobs.get():
                state.fill()
            self._on_done()
