from collections.abc import Iterator

import pytest

from tests.e2e.serving import Served, serve


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded model, served as the README's first command serves it."""
    with serve(tmp_path_factory.mktemp("demo") / "log") as served:
        yield served
