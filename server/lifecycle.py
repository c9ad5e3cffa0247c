"""Draining: new requests are refused, running ones get their time, the rest are told."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Interruptible(Protocol):
    def interrupt(self) -> None:
        """Ends early and says so to its client. Never waits."""
        ...


class Lifecycle:
    """Knows what is running. `app.state.lifecycle`; belongs to one event loop."""

    def __init__(self) -> None:
        self.is_draining = False
        self._running: set[Interruptible] = set()
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def begin_drain(self) -> None:
        """Refuses new requests from now on, and turns /ready red. May be called twice."""
        self.is_draining = True

    async def wait_drained(self, timeout_s: float, *, farewell_s: float = 1.0) -> bool:
        """Whether all running requests ended by themselves. Those that have not after `timeout_s`
        get an error, and `farewell_s` to send it."""
        if await self._ended_within(timeout_s):
            return True
        for generation in tuple(self._running):
            generation.interrupt()
        await self._ended_within(farewell_s)
        return False

    def begin(self, generation: Interruptible) -> None:
        self._running.add(generation)
        self._all_ended.clear()

    def end(self, generation: Interruptible) -> None:
        self._running.discard(generation)
        if not self._running:
            self._all_ended.set()

    async def _ended_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_ended.wait()
        except TimeoutError:
            return False
        return True
