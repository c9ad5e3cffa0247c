"""The bridge: what crosses it, and what its worker's death costs."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from skipllm_core.client import ProcessEngineClient
from skipllm_core.client.worker_handle import usable_cores, worker_environment
from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError, EngineDeadError, OverloadedError
from skipllm_core.messages import Add, Command
from skipllm_core.types import SamplingParams, SkipParams
from tests.test_client import read, tokens, until

BUILDER = "tests.fakes:build_worker_engine"
QUICK = (0.05, 0.05, 0.05)  # restart delays


def workers(parent: int | None = None) -> list[psutil.Process]:
    """The worker processes of a process, this one unless told."""
    children = psutil.Process(parent).children()
    return [child for child in children if "skipllm_core.worker" in child.cmdline()]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class Fatal:
    """Records the reason with which a client gave up."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)


@asynccontextmanager
async def started(model_dir: Path, **options: Any) -> AsyncIterator[ProcessEngineClient]:
    options = {"on_fatal": Fatal(), "builder": BUILDER, "restart_delays_s": QUICK} | options
    client = ProcessEngineClient(EngineConfig(model_dir=model_dir), **options)
    await client.start()
    try:
        yield client
    finally:
        await client.close()
        assert workers() == []


def params(max_tokens: int = 5) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


async def test_tokens_come_back_from_another_process(tmp_path: Path) -> None:
    skip = SkipParams(policy="ffn_skip", warmup_tokens=1, cold_start=1, cold_end=3, trace=True)
    async with started(tmp_path) as client:
        assert client.health().state == "ready"
        assert client.info.vocab_size == 320
        assert len(workers()) == 1
        outputs = await read(client.submit([40], SamplingParams(max_tokens=4, skip=skip)))
        assert tokens(outputs) == [41, 42, 43, 44]
        assert [layers for output in outputs for layers in output.skipped_layers][-1] == (2,)
        assert outputs[-1].skip_usage is not None
        assert outputs[-1].skip_usage.skipped_ffn_blocks == 3
    assert client.health().state == "dead"


def test_every_sampling_parameter_survives_the_bridge() -> None:
    sent = SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        logit_bias=((3, -1.5), (4, 100.0)),
        seed=2**63 - 1,
        logprobs=3,
        stop_token_ids=(1, 2),
        skip=SkipParams(policy="ffn_skip", threshold=0.97, max_skips=5, trace=True),
    )
    data = msgspec.msgpack.encode(Add(2**40, [1, 2, 3], sent, 1.5))
    received = msgspec.msgpack.decode(data, type=Command)
    assert received == Add(2**40, [1, 2, 3], sent, 1.5)


async def test_the_socket_is_private_and_goes_with_the_client(tmp_path: Path) -> None:
    async with started(tmp_path):
        (worker,) = workers()
        (address,) = [arg for arg in worker.cmdline() if arg.startswith("ipc://")]
        path = Path(address.removeprefix("ipc://"))
        assert mode(path) == 0o600
        assert mode(path.parent) == 0o700
    with pytest.raises(FileNotFoundError):
        mode(path.parent)


async def test_closing_a_stream_frees_its_blocks(tmp_path: Path) -> None:
    async with started(tmp_path) as client:
        last: list[Any] = []
        client.on_step.append(last.append)
        stream = client.submit([40], params(500))
        await anext(stream)
        stream.close()
        await read(client.submit([40], params(2)))
        assert last[-1].num_running == last[-1].num_kv_blocks_used == 0


async def test_a_killed_worker_fails_every_stream_and_is_replaced(tmp_path: Path) -> None:
    async with started(tmp_path, restart_delays_s=(0.5,)) as client:
        streams = client.submit_all([([40], params(400))] * 8)
        for stream in streams:
            await anext(stream)
        (worker,) = workers()
        killed_s = time.monotonic()
        worker.kill()
        for stream in streams:
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await read(stream)
        assert client.health().state == "restarting"
        assert time.monotonic() - killed_s < 2
        assert client.num_unfinished == 0
        with pytest.raises(OverloadedError):
            client.submit([40], params())
        await until(lambda: client.health().state == "ready")
        assert tokens(await read(client.submit([40], params()))) == [41, 42, 43, 44, 45]
        (replacement,) = workers()
        assert replacement.pid != worker.pid


async def test_signals_to_the_whole_group_leave_the_worker_to_its_parent(tmp_path: Path) -> None:
    async with started(tmp_path) as client:
        for ignored in (signal.SIGTERM, signal.SIGINT):
            workers()[0].send_signal(ignored)
        assert len(tokens(await read(client.submit([40], params(100))))) == 100


async def test_three_failed_restarts_are_fatal(tmp_path: Path) -> None:
    fatal = Fatal()
    async with started(tmp_path, on_fatal=fatal) as client:
        (tmp_path / "die").touch()
        workers()[0].kill()
        await until(lambda: bool(fatal.reasons), timeout_s=30)
        assert fatal.reasons == ["the worker exited with code 3"]
        assert client.health().state == "dead"
        with pytest.raises(EngineDeadError):
            client.submit([40], params())


async def test_workers_that_die_soon_use_the_tries_up(tmp_path: Path) -> None:
    fatal = Fatal()
    async with started(tmp_path, on_fatal=fatal, restart_delays_s=(0.0,)) as client:
        workers()[0].kill()
        await until(lambda: client.health().state == "restarting")
        await until(lambda: client.health().state == "ready")
        workers()[0].kill()
        await until(lambda: bool(fatal.reasons))


async def test_a_worker_that_served_long_gives_its_successors_all_tries(tmp_path: Path) -> None:
    fatal = Fatal()
    options: dict[str, Any] = {"restart_delays_s": (0.0,), "steady_after_s": 0.0}
    async with started(tmp_path, on_fatal=fatal, **options) as client:
        for _ in range(2):
            workers()[0].kill()
            await until(lambda: client.health().state == "restarting")
            await until(lambda: client.health().state == "ready")
        assert fatal.reasons == []


async def test_a_forward_that_keeps_raising_gets_a_fresh_worker(tmp_path: Path) -> None:
    async with started(tmp_path) as client:
        (tmp_path / "raise").touch()
        for _ in range(2):
            (output,) = await read(client.submit([40], params()))
            assert output.finish_reason == "error"
        with pytest.raises(EngineDeadError, match="code 1"):
            await read(client.submit([40], params()))
        (tmp_path / "raise").unlink()
        await until(lambda: client.health().state == "ready")
        assert len(tokens(await read(client.submit([40], params())))) == 5


async def test_a_slow_step_turns_health_red_until_it_is_over(tmp_path: Path) -> None:
    async with started(tmp_path, stuck_after_s=1.5) as client:
        (tmp_path / "hang").touch()
        stream = client.submit([40], params())
        await until(lambda: client.health().state == "stuck")
        with pytest.raises(OverloadedError):
            client.submit([40], params())
        (tmp_path / "hang").unlink()
        assert len(tokens(await read(stream))) == 5
        assert client.health().state == "ready"


async def test_a_worker_that_hangs_for_good_is_replaced(tmp_path: Path) -> None:
    async with started(tmp_path, stuck_after_s=0.4, hung_after_s=1.5) as client:
        (tmp_path / "hang").touch()
        stream = client.submit([40], params())
        with pytest.raises(EngineDeadError, match="hung"):
            await read(stream)
        (tmp_path / "hang").unlink()
        await until(lambda: client.health().state == "ready")
        assert len(tokens(await read(client.submit([40], params())))) == 5


async def test_an_idle_worker_is_not_stuck(tmp_path: Path) -> None:
    async with started(tmp_path, stuck_after_s=2.0) as client:
        with pytest.raises(TimeoutError):
            await until(lambda: client.health().state != "ready", timeout_s=3)


@pytest.mark.parametrize(
    ("fault", "reason"), [("refuse", "told to refuse"), ("die", "exited with code 3")]
)
async def test_a_first_start_that_fails_says_why(tmp_path: Path, fault: str, reason: str) -> None:
    (tmp_path / fault).touch()
    client = ProcessEngineClient(
        EngineConfig(model_dir=tmp_path), on_fatal=Fatal(), builder=BUILDER
    )
    with pytest.raises(ConfigError, match=reason):
        await client.start()
    assert client.health().state == "dead"
    assert workers() == []


async def test_a_start_that_is_cancelled_leaves_no_worker(tmp_path: Path) -> None:
    client = ProcessEngineClient(
        EngineConfig(model_dir=tmp_path), on_fatal=Fatal(), builder=BUILDER
    )
    start = asyncio.create_task(client.start())
    await until(lambda: bool(workers()))
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert workers() == []


def test_a_parent_that_is_killed_takes_its_worker_along(tmp_path: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from skipllm_core.client import ProcessEngineClient
from skipllm_core.config import EngineConfig

async def main():
    config = EngineConfig(model_dir=Path({str(tmp_path)!r}))
    client = ProcessEngineClient(config, on_fatal=print, builder={BUILDER!r})
    await client.start()
    print("ready", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=worker_environment(None)
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        (worker,) = workers(parent.pid)
        parent.kill()
        parent.wait()
        worker.wait(timeout=5)


def test_the_worker_gets_its_threads_before_torch_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment = worker_environment(num_threads=3)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert worker_environment(None)["OMP_NUM_THREADS"] == str(usable_cores())
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert worker_environment(None)["OMP_NUM_THREADS"] == "7"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert worker_environment(None)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_containers_quota_bounds_the_threads(tmp_path: Path) -> None:
    cpu_max = tmp_path / "cpu.max"
    all_cores = usable_cores(cpu_max)  # no such file: no quota
    assert all_cores == len(os.sched_getaffinity(0))
    for text, cores in (("max 100000", all_cores), ("50000 100000", 1), ("990000 1000", all_cores)):
        cpu_max.write_text(text)
        assert usable_cores(cpu_max) == cores
