"""One worker process and the socket to it: made, used and thrown away together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError, EngineDeadError
from skipllm_core.messages import Command, Failed, Message, Ready
from skipllm_core.types import EngineInfo


class WorkerHandle:
    """The parent's end of the bridge. A replacement gets a handle of its own."""

    def __init__(self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket) -> None:
        self._process = process
        self._socket = socket
        self._exited = asyncio.ensure_future(process.wait())
        self._receiving: asyncio.Future[bytes] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

    @classmethod
    async def spawn(
        cls, context: zmq.asyncio.Context, socket_dir: Path, config: EngineConfig, builder: str
    ) -> WorkerHandle:
        """Starts a process; raises ConfigError if the socket cannot be made."""
        # A name of its own: zeromq removes the last one's file when it gets to it.
        path = socket_dir / f"{uuid.uuid4().hex[:8]}.sock"
        socket = context.socket(zmq.PAIR)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)  # what may queue up is bounded at submit
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.bind(f"ipc://{path}")
            path.chmod(0o600)
            # -P: the working directory is not a place to import from.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "skipllm_core.worker"),
                *(f"ipc://{path}", msgspec.json.encode(config, enc_hook=str).decode(), builder),
                stdin=asyncio.subprocess.PIPE,
                env=worker_environment(config.num_threads),
            )
        except zmq.ZMQError as error:
            socket.close()
            raise ConfigError(f"cannot open the socket {path} (see TMPDIR): {error}") from None
        except BaseException:
            socket.close()
            raise
        return cls(process, socket)

    async def ready(self) -> EngineInfo:
        """Waits for the model to be loaded; raises ConfigError if it cannot be, EngineDeadError if
        the process dies."""
        match await self.receive():
            case Ready(info):
                return info
            case Failed(reason):
                raise ConfigError(reason)
            case message:
                raise AssertionError(f"the worker began with {message}")

    def send(self, command: Command) -> None:
        self._socket.send(self._encoder.encode(command))

    async def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, None if none came in time; EngineDeadError when the process is gone
        and everything it said was received."""
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._socket.recv())
        either: set[asyncio.Future[Any]] = {self._receiving, self._exited}
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._receiving.done():
            data = self._receiving.result()
            self._receiving = None
            return self._decoder.decode(data)
        if self._exited.done():
            raise EngineDeadError(_obituary(self._exited.result()))
        return None

    async def stop(self) -> None:
        """Ends the process, whatever it is doing: it has nothing to save. May be repeated."""
        if not self._exited.done():
            self._process.kill()
            await asyncio.wait({self._exited})
        self._socket.close()


def worker_environment(num_threads: int | None) -> dict[str, str]:
    """This process's environment, its import path, and the settings of OpenMP."""
    return {
        **os.environ,
        **openmp_environment(num_threads),
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
    }


def openmp_environment(num_threads: int | None) -> dict[str, str]:
    """What has to stand in the environment before torch is loaded; what stands there already wins,
    but for a given number of threads.

    Spinning threads collapse as soon as anything else needs a core, so they sleep, but only after
    some 10 us: enough to be awake when the next operator comes.
    """
    defaults = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "5000",
        "OMP_NUM_THREADS": str(usable_cores()),
    }
    settings = {name: os.environ.get(name, default) for name, default in defaults.items()}
    if num_threads is not None:
        settings |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(num_threads))
    return settings


def usable_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those it may run on, and no more than a container's quota.
    More threads than that would wait for each other's time slices at every layer."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota_us, period_us = map(int, cpu_max.read_text().split())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cores
    return max(1, min(cores, -(-quota_us // period_us)))


def _obituary(return_code: int) -> str:
    if return_code < 0:
        return f"the worker was killed by {signal.Signals(-return_code).name}"
    return f"the worker exited with code {return_code}"
