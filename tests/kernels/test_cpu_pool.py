"""The CPU kernels' threads: they change no bit, and go when their decoder goes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipllm_core.model.llama import LlamaModel
from tests.kernels.rows import Rows, load, needs_the_kernels, prompts_of
from tests.model.checkpoints import make_oracle

NUM_STEPS = 300

pytestmark = needs_the_kernels


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaModel:
    """Its matrices are large enough for several threads: 8 to 50 items a loop."""
    model_dir = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2}
    make_oracle("llama3", **sizes, max_position_embeddings=NUM_STEPS).save_pretrained(model_dir)
    return load(model_dir)


def decode(model: LlamaModel, num_threads: int) -> list[Tensor]:
    return Rows(model, prompts_of(NUM_STEPS, 40, 30), num_threads=num_threads).all_logits()


@pytest.fixture(scope="module")
def by_one_thread(model: LlamaModel) -> list[Tensor]:
    return decode(model, 1)


@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_threads_change_no_bit(
    num_threads: int, model: LlamaModel, by_one_thread: list[Tensor]
) -> None:
    """Also more of them than there are cores."""
    assert all(map(torch.equal, decode(model, num_threads), by_one_thread))


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_a_decoder_that_is_dropped_takes_its_threads_along(model: LlamaModel) -> None:
    before = num_threads()
    rows = Rows(model, [[1, 2]], num_threads=4)
    assert num_threads() == before + 3
    rows.all_logits()
    del rows
    wait_for_threads(before)
    for _ in range(50):
        Rows(model, [[1, 2]], num_threads=4).step(0, [0])
    wait_for_threads(before)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def wait_for_threads(number: int) -> None:
    """A thread that was joined stands in /proc for a moment longer."""
    deadline = time.monotonic() + 10
    while num_threads() != number:
        assert time.monotonic() < deadline, f"{num_threads()} threads"
        time.sleep(0.001)


# Building ----------------------------------------------------------------------------------------


def test_the_source_distribution_has_every_file_of_c() -> None:
    repo = Path(__file__).parents[2]
    folder = "skipllm_core/kernels/cpu"
    assert f"include {folder}/*.h" in (repo / "MANIFEST.in").read_text().splitlines()
    project = (repo / "pyproject.toml").read_text()
    for file in (repo / folder).glob("*.[ch]"):
        assert f'"{folder}/{file.name}"' in project, "a change of it would not rebuild the module"
