"""When requests are sent: at drawn times whatever the server does, or as soon as one has ended.

`send` is given an item and the time it was to be sent at (of `clock`); it records, never raises.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

Send = Callable[[T, float], Coroutine[Any, Any, None]]

clock = time.monotonic  # finer than the event loop's own, which uvloop rounds to milliseconds


def poisson_arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Times in seconds, the first at 0, whose gaps are exponential with mean 1 / `rate`."""
    rng = random.Random(seed)  # noqa: S311  # a benchmark's, to be drawn again
    arrivals_s, now_s = [], 0.0
    for _ in range(num_requests):
        arrivals_s.append(now_s)
        now_s += rng.expovariate(rate)
    return arrivals_s


async def open_loop(items: Sequence[T], arrivals_s: Sequence[float], send: Send[T]) -> None:
    """Sends every item at its time from now, however many are still under way."""
    start_s = clock()
    async with asyncio.TaskGroup() as requests:
        for item, arrival_s in zip(items, arrivals_s, strict=True):
            intended_s = start_s + arrival_s
            # Again and again, as timers may ring a fraction of a millisecond early.
            while (wait_s := intended_s - clock()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(wait_s)
            requests.create_task(send(item, intended_s))
            await asyncio.sleep(0)  # lets it start, even if the next one is late as well


async def closed_loop(items: Iterable[T], max_concurrency: int, send: Send[T]) -> None:
    """Keeps `max_concurrency` items under way; the next one is due when one ends."""
    rest = iter(items)

    async def slot() -> None:
        for item in rest:
            await send(item, clock())

    async with asyncio.TaskGroup() as slots:
        for _ in range(max_concurrency):
            slots.create_task(slot())
