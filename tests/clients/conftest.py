from collections.abc import Iterator

import pytest

from tests.clients.scripted import save_scripted_model
from tests.e2e.serving import Served, serve


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded model, whose world is small, as a user serves it."""
    with serve(tmp_path_factory.mktemp("embedded") / "log") as served:
        yield served


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model that calls tools and ends its strings: its answers are those of `scripted.py`."""
    directory = save_scripted_model(tmp_path_factory.mktemp("scripted"))
    with serve(directory / "log", str(directory), "--served-model-name", "scripted") as served:
        yield served
