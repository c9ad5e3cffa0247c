"""Starting and stopping, as an operator or a supervisor does it."""

import json
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from server.cli import launch
from server.cli.launch import find_profile, listen
from server.cli.models import find_model
from server.settings import Settings
from skipllm_core.demo import MODEL_DIR
from skipllm_core.errors import ConfigError, ProfileError
from skipllm_core.model.fingerprint import model_fingerprint
from skipllm_core.skip.profile import SkipProfile
from tests.e2e.serving import Served, serve
from tests.test_settings import profile

STREAM: dict[str, Any] = {"prompt": "a", "stream": True, "ignore_eos": True, "max_tokens": 4000}
DUMMY = ("--load-format", "dummy", "--num-threads", "1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": np.arange(4.0)}, folder / "model.safetensors")
    return folder


def test_a_model_brings_its_own_profile(checkpoint: Path) -> None:
    assert find_profile(None, checkpoint) is None
    own = profile(fingerprint=model_fingerprint(checkpoint))
    own.save(checkpoint / "skip.yaml")
    assert find_profile(None, checkpoint) == own


def test_a_profile_that_comes_with_the_package_is_found_by_the_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "PROFILES_DIR", tmp_path)
    fingerprint = model_fingerprint(checkpoint)
    (tmp_path / "another.0123456789ab.yaml").write_text("not even a profile, and not read")
    assert find_profile(None, checkpoint) is None
    ours = profile(fingerprint=fingerprint)
    ours.save(tmp_path / f"tiny-instruct.{fingerprint[:12]}.yaml")
    assert find_profile(None, checkpoint) == ours
    own = profile(fingerprint=fingerprint, warmup_tokens=9)
    own.save(checkpoint / "skip.yaml")
    assert find_profile(None, checkpoint) == own


def test_a_name_that_promises_another_models_profile_is_not_believed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "PROFILES_DIR", tmp_path)
    fingerprint = model_fingerprint(checkpoint)
    other = profile(fingerprint=fingerprint[:12] + "0" * 52)
    other.save(tmp_path / f"tiny.{fingerprint[:12]}.yaml")
    with pytest.raises(ProfileError, match="another model"):
        find_profile(None, checkpoint)


def test_every_profile_of_the_package_can_be_read_and_bears_its_fingerprint() -> None:
    for file in launch.PROFILES_DIR.glob("*.yaml"):
        found = SkipProfile.load(file)
        assert file.name.endswith(f".{found.fingerprint[:12]}.yaml"), file.name
    settings = tomllib.loads((launch.PROFILES_DIR.parents[1] / "pyproject.toml").read_text())
    setuptools = settings["tool"]["setuptools"]
    assert "configs*" in setuptools["packages"]["find"]["include"]
    assert setuptools["package-data"]["configs"] == ["skip/*.yaml"]


@pytest.mark.parametrize("name", [None, "skipllm-demo"])
def test_the_embedded_model_has_a_name(name: str | None) -> None:
    settings = Settings(model=name)
    assert find_model(settings) == MODEL_DIR
    assert settings.model_name == "skipllm-demo"


def test_a_profile_that_was_named_wins(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "skip.yaml").write_text("not even a profile")
    named = profile(fingerprint=model_fingerprint(checkpoint))
    named.save(tmp_path / "named.yaml")
    assert find_profile(tmp_path / "named.yaml", checkpoint) == named


def test_a_profile_of_another_model_is_refused(checkpoint: Path) -> None:
    profile(fingerprint="0" * 64).save(checkpoint / "skip.yaml")
    with pytest.raises(ProfileError, match="another model"):
        find_profile(None, checkpoint)


def test_a_profile_beside_several_gguf_files_is_that_of_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "is_directory_of_gguf", lambda directory: directory == checkpoint)
    profile(fingerprint="0" * 64).save(checkpoint / "skip.yaml")
    assert find_profile(None, checkpoint) is None
    assert "of another model" in caplog.text
    own = profile(fingerprint=model_fingerprint(checkpoint))
    own.save(checkpoint / "skip.yaml")
    assert find_profile(None, checkpoint) == own


def test_a_profile_that_was_named_must_exist(checkpoint: Path) -> None:
    with pytest.raises(ProfileError, match=r"cannot read .*nowhere\.yaml"):
        find_profile(Path("nowhere.yaml"), checkpoint)


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"cannot listen on 127.0.0.1:{port}: Address already in use"
        with pytest.raises(ConfigError, match=message), listen("127.0.0.1", port):
            pass


def test_sigterm_while_a_model_is_fetched_ends_at_once() -> None:
    program = """
import time
from server.cli import launch
from server.settings import Settings
launch.find_model = lambda *_: (print("fetching", flush=True), time.sleep(60))
launch.run_server(Settings(model="some/model", port=0))
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"fetching\n"
        process.terminate()
        # Not -SIGTERM: the default action does not exist for a container's first process.
        assert process.wait(5) == 128 + signal.SIGTERM


def events(served: Served) -> Iterator[str]:
    """The `data:` of a stream that lasts for seconds."""
    url = f"{served.url}/v1/completions"
    with httpx.stream("POST", url, json=STREAM, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: "):
                yield line.removeprefix("data: ")


@pytest.mark.slow
def test_what_outlasts_the_drain_is_told_so(dummy_model: Path, tmp_path: Path) -> None:
    args = (str(dummy_model), *DUMMY, "--shutdown-timeout", "0.5")
    with serve(tmp_path / "log", *args) as served:
        stream = events(served)
        next(stream)
        served.process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert json.loads(last)["error"]["code"] == "overloaded"
        assert served.process.wait(10) == 0
        assert "stopping: 1 running, 0.5 s to end" in served.log


@pytest.mark.slow
def test_a_second_signal_ends_at_once(dummy_model: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "log", str(dummy_model), *DUMMY) as served:
        worker = served.worker()
        stream = events(served)
        next(stream)
        served.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert served.status("/ready") == 503
        assert served.process.poll() is None
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(10) == 0
        worker.wait(10)
        *_, last = stream
        assert json.loads(last)["error"]["code"] == "overloaded"
        assert "Traceback" not in served.log


@pytest.mark.slow
def test_a_client_that_does_not_read_does_not_hold_up_the_end(
    dummy_model: Path, tmp_path: Path
) -> None:
    args = (str(dummy_model), *DUMMY, "--shutdown-timeout", "0.2")
    with serve(tmp_path / "log", *args) as served:
        port = int(served.url.rsplit(":", 1)[1])
        body = json.dumps(STREAM | {"logprobs": 5, "n": 8}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", port))
            deaf.sendall(head.encode() + body)
            time.sleep(4)
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(10) == 0
        assert "Traceback" not in served.log


@pytest.mark.slow
def test_the_process_ends_with_an_error_when_no_worker_can_be_started_any_more(
    dummy_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in dummy_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    with serve(tmp_path / "log", str(model), *DUMMY) as served:
        (model / "config.json").unlink()
        served.worker().kill()
        assert served.process.wait(60) == 1
        assert "the engine is gone for good" in served.log
