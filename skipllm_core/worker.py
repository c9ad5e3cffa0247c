"""The process that holds the model: one engine, one thread, one socket to its parent.

Started by `ProcessEngineClient` as `python -m skipllm_core.worker ADDRESS CONFIG BUILDER`: the
socket to connect to, the EngineConfig as JSON, and `module:function` of what builds the engine
from it (tests put one without torch there). Standard input is the parent's lifeline: it closes
when the parent dies.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import msgspec
import zmq

from skipllm_core.config import EngineConfig
from skipllm_core.engine.engine import Engine
from skipllm_core.errors import ConfigError
from skipllm_core.messages import Abort, Add, Command, Failed, Heartbeat, Message, Ready, Stepped

HEARTBEAT_MS = 1000

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

logger = logging.getLogger(__name__)


def build_engine(config: EngineConfig) -> Engine:
    """The engine of a real model; raises ConfigError for a model that cannot be served."""
    # Here, and not above: the client imports this module and must stay free of torch.
    from skipllm_core.runner.model_runner import TorchModelRunner, resolve_device

    is_cuda = resolve_device(config.device).type == "cuda"
    kernels = gpu_kernels(config) if is_cuda and not config.enforce_eager else None
    if kernels is None:
        runner = TorchModelRunner(config)
    else:
        from skipllm_core.runner.gpu_runner import GpuModelRunner

        is_joint = config.consensus is not None
        runner = GpuModelRunner(config, partial(kernels.GpuDecoder, consensus=is_joint))
    return Engine(runner, config, runner.max_model_len)


def gpu_kernels(config: EngineConfig) -> ModuleType | None:
    """The module of the decode step's kernels; None, and a warning, where Triton cannot run: it
    may be missing, or the C compiler that it builds its driver with when first used."""
    try:
        kernels = importlib.import_module("skipllm_core.kernels.gpu.decoder")
        driver = importlib.import_module("triton.runtime.driver").driver
        if config.quantization == "fp8" and driver.active.get_current_target().arch < 89:
            raise ConfigError("they read fp8 on compute capability 8.9 and later")
        driver.active.get_current_device()
    except Exception as error:
        logger.warning("decoding with torch alone, slower: no GPU kernels (%s)", error)
        return None
    return kernels


def serve_engine(
    engine: Engine,
    receive: Callable[[bool], list[Command] | None],
    send: Callable[[Message], None],
) -> None:
    """Steps the engine until `receive` returns None. What the engine raises passes through.

    `receive(wait)` returns the commands that have come, possibly none. Told to wait, it may take
    up to a heartbeat's time for that.
    """
    while (commands := receive(not engine.has_work)) is not None:
        for command in commands:
            match command:
                case Add(seq_id, prompt_ids, params, arrival_s):
                    engine.add(seq_id, prompt_ids, params, arrival_s)
                case Abort(seq_id):
                    engine.abort(seq_id)
        output = engine.step()
        send(Heartbeat() if output is None else Stepped(output))


def main() -> None:
    address, config_json, builder = sys.argv[1:]
    lifeline = _die_with_parent()
    # Ctrl-C and a supervisor's SIGTERM reach the whole process group; the parent drains, and ends
    # this process when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="worker: %(message)s")  # to stderr

    socket = zmq.Context().socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(Command)

    def receive(wait: bool) -> list[Command]:
        commands: list[Command] = []
        while socket.poll(HEARTBEAT_MS if wait and not commands else 0):
            commands.append(decoder.decode(socket.recv()))
        return commands

    def send(message: Message) -> None:
        socket.send(encoder.encode(message))

    try:
        engine = _build(builder, config_json)
    except Exception as error:
        reason = str(error)
        if not isinstance(error, ConfigError):
            logger.exception("the engine cannot be built")
            reason = f"{type(error).__name__}: {error}"
        send(Failed(reason))
        lifeline.join()  # the parent ends this process when it has read the reason
        return
    send(Ready(engine.info))
    serve_engine(engine, receive, send)


def _build(builder: str, config_json: str) -> Engine:
    config = msgspec.json.decode(
        config_json, type=EngineConfig, dec_hook=lambda _type, value: Path(value)
    )
    module, _, function = builder.partition(":")
    build: Callable[[EngineConfig], Engine] = getattr(importlib.import_module(module), function)
    return build(config)


def _die_with_parent() -> threading.Thread:
    """Ends this process as soon as its parent is gone; returns the thread that watches."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    if sys.platform == "linux":  # works on a process that is stopped or holds the GIL for good
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


if __name__ == "__main__":
    main()
