"""The CPU's kernels on sizes that no vector fits, with every instruction set, and beside torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skipllm_core.config import Quantization
from skipllm_core.skip.policy import RowGate
from skipllm_core.types import SkipParams
from tests.kernels.rows import EagerRows, Rows, load, needs_the_kernels, prompts_of
from tests.model.checkpoints import CHECKPOINTS, make_oracle

TOLERANCE = 1e-4  # of the largest value
LENGTHS = (9, 14, 5, 9, 11, 2, 9, 13, 14, 7, 8, 10, 3)  # steps of 13 rows, and of fewer in the end
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "odd_sizes_in_groups_of_5": (
        "llama_biases",
        {
            "hidden_size": 45,
            "intermediate_size": 113,
            "vocab_size": 579,
            "head_dim": 6,
            "num_attention_heads": 15,
            "num_key_value_heads": 3,
        },
    ),
    "heads_of_12_in_groups_of_3": (
        "qwen3",
        {
            "hidden_size": 66,
            "intermediate_size": 95,
            "head_dim": 12,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
    ),
    "one_kv_head": (
        "qwen2",
        {
            "hidden_size": 72,
            "intermediate_size": 150,
            "num_attention_heads": 9,
            "num_key_value_heads": 1,
        },
    ),
    "as_many_kv_heads_as_queries": (
        "llama2",
        {
            "hidden_size": 35,
            "intermediate_size": 47,
            "vocab_size": 581,
            "head_dim": 10,
            "num_attention_heads": 7,
            "num_key_value_heads": 7,
        },
    ),
}
# name -> (what torch calls it, what the processor must have)
INSTRUCTIONS = {
    "base": ("default", set()),
    "avx2": ("avx2", {"avx2", "fma"}),
    "avx512": ("avx512", {"avx512bw", "avx512_vnni"}),
}

pytestmark = needs_the_kernels


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Those of the decoders that the test makes."""
    capability, needed = INSTRUCTIONS[request.param]
    cpuinfo = Path("/proc/cpuinfo")
    if not needed <= set(cpuinfo.read_text().split() if cpuinfo.exists() else ()):
        pytest.skip(f"the processor has no {request.param}")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    return str(request.param)


def save(tmp_path: Path, name: str, **changes: Any) -> Path:
    make_oracle(name, **changes).save_pretrained(tmp_path)
    return tmp_path


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """To a share of the largest; where nothing was written in one, nothing was in the other."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert (
        found - expected
    ).nan_to_num().abs().max() <= tolerance * expected.nan_to_num().abs().max()


def check_beside_torch(by_kernels: Rows, by_torch: Rows, tolerance: float) -> None:
    """The logits of all tokens, and all that stands in the KV cache."""
    for found, expected in zip(by_kernels.all_logits(), by_torch.all_logits(), strict=True):
        assert_near(found, expected, tolerance)
    for layer in range(by_kernels.num_layers):
        cache, expected_cache = by_kernels.kv_cache, by_torch.kv_cache
        assert_near(cache.keys[layer], expected_cache.keys[layer], tolerance)
        assert_near(cache.values[layer], expected_cache.values[layer], tolerance)


# Sizes and instruction sets ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_any_size_decodes_as_transformers_does(
    shape: str, instructions: str, tmp_path: Path
) -> None:
    name, changes = SHAPES[shape]
    oracle = make_oracle(name, **changes)
    oracle.save_pretrained(tmp_path)
    rows = Rows(load(tmp_path), prompts_of(*LENGTHS))
    assert rows.decoder.instructions == instructions
    for prompt, logits in zip(rows.prompts, rows.all_logits(), strict=True):
        assert_near(logits, oracle(torch.tensor([prompt])).logits[0], TOLERANCE)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_alone_gives_the_same_bits_with_any_size(
    shape: str, quantization: Quantization, instructions: str, tmp_path: Path
) -> None:
    """Rows are computed in fours, threes, twos and ones, each compiled on its own: none may round
    differently."""
    name, changes = SHAPES[shape]
    model = load(save(tmp_path, name, **changes), quantization)
    together = Rows(model, prompts_of(*LENGTHS))
    assert together.decoder.instructions == instructions
    for prompt, logits in zip(together.prompts, together.all_logits(), strict=True):
        (alone,) = Rows(model, [prompt], num_threads=1).all_logits()
        assert torch.equal(logits, alone)


# Beside torch's own step -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_cache_are_those_of_torchs_step(name: str, tmp_path: Path) -> None:
    model = load(save(tmp_path, name))
    prompts = prompts_of(1, 23, 7, 30, 12)
    check_beside_torch(Rows(model, prompts), EagerRows(model, prompts), TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weights_give_what_torch_makes_of_them(
    shape: str, instructions: str, tmp_path: Path
) -> None:
    """Not as near as above: an input close to the middle of two integers may go to either, and
    every layer after it sees the difference, a 4000th of the largest input."""
    name, changes = SHAPES[shape]
    model = load(save(tmp_path, name, **changes), "int8")
    prompts = prompts_of(*LENGTHS)
    by_kernels = Rows(model, prompts)
    assert by_kernels.decoder.instructions == instructions
    check_beside_torch(by_kernels, EagerRows(model, prompts), 1e-2)


@pytest.mark.parametrize("window", [255, 256, 300])
@torch.inference_mode()
def test_windows_may_cross_chunks(window: int, tmp_path: Path) -> None:
    oracle = make_oracle("mistral_window", sliding_window=window, max_position_embeddings=1024)
    oracle.save_pretrained(tmp_path)
    rows = Rows(load(tmp_path), prompts_of(600, 257))
    for prompt, logits in zip(rows.prompts, rows.all_logits(), strict=True):
        assert_near(logits, oracle(torch.tensor([prompt])).logits[0], TOLERANCE)


# The gate's eyes ---------------------------------------------------------------------------------


class SeeingGate(RowGate):
    """Keeps what it is shown."""

    def __init__(self, rows: Sequence[SkipParams | None]) -> None:
        super().__init__(rows)
        self.seen: list[float] = []

    def observe(self, layer: int, similarities: Sequence[float]) -> None:
        self.seen += similarities
        super().observe(layer, similarities)


@pytest.mark.parametrize("threshold", [0.8, 0.88, 0.93])
@torch.inference_mode()
def test_the_gate_sees_and_decides_what_it_does_in_torchs_step(
    threshold: float, tmp_path: Path
) -> None:
    model = load(save(tmp_path, "llama3", num_hidden_layers=8))
    prompts = prompts_of(20, 20, 20, 20, 20)
    by_kernels, by_torch = Rows(model, prompts), EagerRows(model, prompts)
    skip = SkipParams(policy="ffn_skip", threshold=threshold, cold_start=1, cold_end=7)
    num_skipped = set()
    for position in range(20):
        gates = [SeeingGate([skip, skip, None, skip, skip]) for _ in range(2)]
        found = by_kernels.step(position, [0, 1, 2, 3, 4], gates[0])
        assert_near(found, by_torch.step(position, [0, 1, 2, 3, 4], gates[1]), TOLERANCE)
        assert gates[0].skipped_layers == gates[1].skipped_layers
        assert gates[0].seen == pytest.approx(gates[1].seen, abs=1e-6)
        assert min(abs(seen - threshold) for seen in gates[1].seen) > 1e-5, "too close to call"
        num_skipped |= set(map(len, gates[0].skipped_layers))
    assert len(num_skipped) > 2, "the gate has hardly anything to decide"


def test_a_row_that_is_not_a_number_never_triggers_and_hides_no_other(tmp_path: Path) -> None:
    model = load(save(tmp_path, "llama3"))
    model.embedding[9] = torch.nan
    rows = Rows(model, [[9], [5], [9]])
    gate = RowGate([SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=0, cold_end=3)] * 3)
    rows.step(0, [0, 1, 2], gate)
    assert gate.skipped_layers == [[], [1, 2], []]


def test_int8_sums_of_many_inputs_do_not_overflow(tmp_path: Path) -> None:
    """16,448 products of the largest integers are beyond 32 bits."""
    make_oracle("llama2", intermediate_size=16448).save_pretrained(tmp_path)
    model = load(tmp_path, "int8")
    for block in model.blocks:
        for linear in (block.ffn.gate_up, block.ffn.down):
            linear.weight.fill_(127)
            linear.scale.fill_(1e-4)
    prompts = prompts_of(3)
    (found,), (expected,) = (
        Rows(model, prompts).all_logits(),
        EagerRows(model, prompts).all_logits(),
    )
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
