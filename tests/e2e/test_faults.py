"""A killed worker, a stopping server, a hopeless start: ordinary events."""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.serving import Served, serve

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
    "stream": True,
    "ignore_eos": True,
    "max_tokens": 400,
}


class Stream(threading.Thread):
    """One streaming request; `events` are its `data:` lines in the order they came."""

    def __init__(self, served: Served, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._served, self._body = served, body
        self.events: list[str] = []
        self.started = threading.Event()
        self.start()

    def run(self) -> None:
        url = f"{self._served.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=self._body, timeout=60) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                    if len(self.events) == 5:
                        self.started.set()


def test_a_killed_worker_fails_its_streams_and_is_replaced(tmp_path: Path) -> None:
    with serve(tmp_path / "log") as served:
        streams = [Stream(served, LONG) for _ in range(8)]
        for stream in streams:
            assert stream.started.wait(30)
        killed = served.worker()
        killed.kill()
        killed_at = time.monotonic()
        while served.status("/health") == 200:
            assert time.monotonic() - killed_at < 2, "/health stays green"
        assert served.status("/live") == 200
        for stream in streams:
            stream.join(10)
            assert not stream.is_alive()
            assert json.loads(stream.events[-1])["error"]["type"] == "server_error"
            assert "[DONE]" not in stream.events
        served.wait_until_ready()
        assert served.worker().pid != killed.pid
        again = Stream(served, LONG | {"max_tokens": 20})
        again.join(30)
        assert again.events[-1] == "[DONE]"
        assert served.metric("skipllm_requests_running") == 0


def test_sigterm_lets_running_streams_finish_and_refuses_new_requests(tmp_path: Path) -> None:
    with serve(tmp_path / "log") as served:
        stream = Stream(served, LONG)
        assert stream.started.wait(30)
        worker = served.worker()
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        assert served.status("/ready") == 503
        refused = httpx.post(f"{served.url}/v1/chat/completions", json=LONG, timeout=5)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert served.process.wait(35) == 0
        stream.join(5)
        assert stream.events[-1] == "[DONE]"
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_the_worker_does_not_outlive_a_killed_server(tmp_path: Path) -> None:
    with serve(tmp_path / "log") as served:
        worker = served.worker()
        served.process.kill()
        worker.wait(5)


def test_sigterm_while_loading_ends_at_once(tmp_path: Path) -> None:
    with serve(tmp_path / "log", wait=False) as served:
        time.sleep(1.0)
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(3)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["/nowhere/at/all"], "/nowhere/at/all"),
        (["--skip-ratio", "1.5"], "skip-ratio"),
        (["--skip-profile", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_a_hopeless_start_ends_with_one_clear_line(
    tmp_path: Path, args: list[str], reason: str
) -> None:
    with serve(tmp_path / "log", *args, wait=False) as served:
        assert served.process.wait(20) != 0
        assert reason in served.log
        assert "Traceback" not in served.log
