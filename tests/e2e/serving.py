"""Starts the real server as a user does, in a process of its own, and talks to it over loopback."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from openai import OpenAI

REPO = Path(__file__).resolve().parents[2]


class Served:
    """A running server: its address, its processes, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def status(self, path: str) -> int:
        return httpx.get(self.url + path, timeout=5).status_code

    def worker(self) -> psutil.Process:
        """The process that holds the model: the child that has torch."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        (worker,) = [child for child in children if "skipllm_core.worker" in child.cmdline()]
        return worker

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series whose labels contain `labels`."""
        total = 0.0
        for line in httpx.get(self.url + "/metrics", timeout=5).text.splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match and all(f'{k}="{v}"' in (match[1] or "") for k, v in labels.items()):
                total += float(match[2])
        return total

    def wait_until_ready(self, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server has exited:\n{self.log}"
            try:
                if self.status("/ready") == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve(log: Path, *args: str, wait: bool = True) -> Iterator[Served]:
    """`skipllm serve` with `args`, stopped at the end whatever happens."""
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", *args, "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=REPO,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    served = Served(process, port, log)
    try:
        if wait:
            served.wait_until_ready()
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
