"""The engine in a thread of this process: for tests, notebooks and offline use."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from skipllm_core.client.base import EngineClient
from skipllm_core.engine.engine import Engine
from skipllm_core.errors import ConfigError
from skipllm_core.messages import Command, Message, Ready, Stepped
from skipllm_core.types import EngineHealth
from skipllm_core.worker import serve_engine

logger = logging.getLogger(__name__)


class InProcessEngineClient(EngineClient):
    """Runs `build_engine()` and then the engine in one daemon thread.

    The loop and the engine share the interpreter, and what takes the engine down for good cannot
    be repaired: the health turns dead and stays so.
    """

    def __init__(
        self,
        build_engine: Callable[[], Engine],
        *,
        max_num_queued_reqs: int = 256,
        max_queued_tokens: int = 1_000_000,
    ) -> None:
        super().__init__(
            max_num_queued_reqs=max_num_queued_reqs, max_queued_tokens=max_queued_tokens
        )
        self._build_engine = build_engine
        self._commands: SimpleQueue[Command | None] = SimpleQueue()  # None: stop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()
        try:
            await self._started
        except asyncio.CancelledError:
            await self.close()
            raise

    async def close(self) -> None:
        if self._thread.is_alive():
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join)
        self._health = EngineHealth("dead", "the engine was closed")  # no news: not logged
        self._on_stopped("the engine was closed")

    def _post(self, command: Command) -> None:
        self._commands.put(command)

    # In the thread.

    def _run(self) -> None:
        try:
            engine = self._build_engine()
        except Exception as error:
            self._in_loop(self._on_unbuildable, error)
            return
        self._send(Ready(engine.info))
        try:
            serve_engine(engine, self._receive, self._send)
        except Exception:
            logger.exception("the engine died")
            self._in_loop(self._on_stopped, "the engine died")

    def _receive(self, wait: bool) -> list[Command] | None:
        commands: list[Command] = []
        with contextlib.suppress(Empty):
            while (command := self._commands.get(block=wait and not commands)) is not None:
                commands.append(command)
            return None
        return commands

    def _send(self, message: Message) -> None:
        self._in_loop(self._on_message, message)

    def _in_loop(self, callback: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(callback, *args)

    # In the loop.

    def _on_message(self, message: Message) -> None:
        match message:
            case Ready(info):
                self.info = info
                self._set_health("ready")
                if not self._started.done():
                    self._started.set_result(None)
            case Stepped(output):
                self._on_step_output(output)

    def _on_unbuildable(self, error: Exception) -> None:
        if not isinstance(error, ConfigError):
            error = ConfigError(f"{type(error).__name__}: {error}")
        self._set_health("dead", str(error))
        if not self._started.done():
            self._started.set_exception(error)

    def _on_stopped(self, reason: str) -> None:
        self._set_health("dead", reason)
        self._fail_streams(reason)
