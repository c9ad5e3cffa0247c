"""The engine in a worker process: started, listened to, and replaced when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zmq.asyncio

from skipllm_core.client.base import EngineClient
from skipllm_core.client.worker_handle import WorkerHandle
from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError, EngineDeadError
from skipllm_core.messages import Command, Stepped
from skipllm_core.types import EngineHealth

logger = logging.getLogger(__name__)


class ProcessEngineClient(EngineClient):
    """Keeps one worker process running; calls `on_fatal` with the reason when it gives up.

    A worker that dies takes its streams with it and is replaced after a pause, as many times as
    there are `restart_delays_s`; one that had served for `steady_after_s` gives its successors
    all the tries again. A worker that says nothing (it sends steps, or heartbeats) is "stuck" after
    `stuck_after_s`, takes no requests then, and counts as dead after `hung_after_s`: a long
    prefill on a slow machine is the former.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_fatal: Callable[[str], None],
        builder: str = "skipllm_core.worker:build_engine",
        restart_delays_s: tuple[float, ...] = (0.5, 1.0, 2.0),
        steady_after_s: float = 60.0,
        stuck_after_s: float = 30.0,
        hung_after_s: float = 300.0,
    ) -> None:
        super().__init__(
            max_num_queued_reqs=config.max_num_queued_reqs,
            max_queued_tokens=config.max_queued_tokens,
        )
        self._config = config
        self._on_fatal = on_fatal
        self._builder = builder
        self._restart_delays_s = restart_delays_s
        self._steady_after_s = steady_after_s
        self._stuck_after_s = stuck_after_s
        self._hung_after_s = hung_after_s
        self._worker: WorkerHandle | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._resources = contextlib.ExitStack()

    async def start(self) -> None:
        # ipc sockets obey the directory's mode (0700) everywhere, the socket's own only on Linux.
        directory = tempfile.TemporaryDirectory(prefix="skipllm-")
        self._socket_dir = Path(self._resources.enter_context(directory))
        self._zmq = zmq.asyncio.Context()
        self._resources.callback(self._zmq.destroy, linger=0)
        try:
            worker = await self._launch()
        except BaseException as error:
            await self.close()
            if isinstance(error, EngineDeadError):
                raise ConfigError(f"the engine could not start: {error}") from None
            raise
        self._supervisor = asyncio.create_task(self._supervise(worker))

    async def close(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        if self._worker is not None:
            await self._worker.stop()
        self._health = EngineHealth("dead", "the engine was closed")  # no news: not logged
        self._fail_streams("the engine was closed")
        self._resources.close()

    def _post(self, command: Command) -> None:
        assert self._worker is not None
        self._worker.send(command)

    async def _launch(self) -> WorkerHandle:
        """A fresh worker, ready; raises ConfigError or EngineDeadError with the reason."""
        self._worker = await WorkerHandle.spawn(
            self._zmq, self._socket_dir, self._config, self._builder
        )
        try:
            self.info = await self._worker.ready()
        except BaseException:
            await self._worker.stop()
            raise
        self._set_health("ready")
        return self._worker

    async def _supervise(self, worker: WorkerHandle) -> None:
        """Serves from one worker after the other until the tries are used up."""
        num_restarts = 0
        replacement: WorkerHandle | None = worker
        while replacement is not None:
            ready_s = time.monotonic()
            reason = await self._serve_from(replacement)
            if time.monotonic() - ready_s >= self._steady_after_s:
                num_restarts = 0
            replacement = None
            while replacement is None and num_restarts < len(self._restart_delays_s):
                await asyncio.sleep(self._restart_delays_s[num_restarts])
                num_restarts += 1
                try:
                    replacement = await self._launch()
                except Exception as error:  # whatever it was, the try is used up
                    reason = str(error)
                    logger.error("restart %d failed: %s", num_restarts, reason)
        self._set_health("dead", reason)
        self._on_fatal(reason)

    async def _serve_from(self, worker: WorkerHandle) -> str:
        """Feeds the streams from the worker until it is gone; returns what happened to it."""
        try:
            await self._relay(worker)
        except EngineDeadError as error:
            reason = str(error)
        except Exception:
            logger.exception("the bridge to the worker failed")
            reason = "the bridge to the worker failed"
        self._set_health("restarting", reason)
        self._fail_streams(reason)
        await worker.stop()
        return reason

    async def _relay(self, worker: WorkerHandle) -> None:
        """Passes the worker's outputs on; raises EngineDeadError when it died or hangs."""
        heard_s = time.monotonic()
        while True:
            message = await worker.receive(timeout_s=self._stuck_after_s / 4)
            silent_s = time.monotonic() - heard_s
            if message is not None:
                heard_s = time.monotonic()
                self._set_health("ready")
            elif silent_s >= self._hung_after_s:
                raise EngineDeadError(f"the worker hung for {silent_s:.0f} s")
            elif silent_s >= self._stuck_after_s:
                self._set_health("stuck", f"no sign of life for {silent_s:.0f} s")
            if isinstance(message, Stepped):
                self._on_step_output(message.output)
