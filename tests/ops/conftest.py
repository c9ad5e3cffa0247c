import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import Served, serve


@pytest.fixture(scope="session")
def promtool() -> str:
    """Prometheus' own checker (Debian's package prometheus). CI has it, or fails."""
    path = shutil.which("promtool")
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail("promtool is not installed; CI needs it")
        pytest.skip("promtool is not installed")
    return path


@pytest.fixture(scope="module")
def served(dummy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    with serve(log, str(dummy_model), "--load-format", "dummy", "--num-threads", "1") as served:
        yield served
