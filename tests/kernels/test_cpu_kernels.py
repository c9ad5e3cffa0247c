"""The CPU's decode kernels: equal to transformers' models, and every row on its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from skipllm_core.config import Quantization
from skipllm_core.kernels import cpu
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.skip.policy import ForcedGate, RowGate
from skipllm_core.types import SkipParams
from tests.kernels.rows import BLOCK_SIZE, CPU, Rows, load, needs_the_kernels, prompts_of
from tests.model.checkpoints import CHECKPOINTS, VOCAB_SIZE, make_oracle, save_checkpoint

TOLERANCE = 2e-4

pytestmark = needs_the_kernels


# transformers is the oracle ----------------------------------------------------------------------


@torch.inference_mode()
def check_against_transformers(name: str, tmp_path: Path, lengths: tuple[int, ...]) -> None:
    oracle = make_oracle(name, max_position_embeddings=1024)
    oracle.save_pretrained(tmp_path)
    rows = Rows(load(tmp_path), prompts_of(*lengths))
    for prompt, logits in zip(rows.prompts, rows.all_logits(), strict=True):
        expected = oracle(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_decodes_as_transformers_does(name: str, tmp_path: Path) -> None:
    check_against_transformers(name, tmp_path, (1, 23, 7, 30, 12))


@pytest.mark.parametrize("name", ["llama3", "mistral_window"])
def test_long_contexts_are_attended_to_in_chunks(name: str, tmp_path: Path) -> None:
    """Attention takes 256 positions at a time; a window may begin within any of them."""
    check_against_transformers(name, tmp_path, (255, 520, 257))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 9, 13])
def test_any_number_of_rows_is_computed(num_rows: int, tmp_path: Path) -> None:
    check_against_transformers("llama_biases", tmp_path, tuple(range(3, 3 + num_rows)))


# Rows on their own -------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, "llama3")


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_rows_logits_are_the_same_bits_whatever_its_batch_mates(
    quantization: Quantization, model_dir: Path
) -> None:
    model = load(model_dir, quantization)
    prompts = prompts_of(9, 14, 5, 9, 11, 2, 9, 13, 14)
    together = Rows(model, prompts).all_logits()
    for row, prompt in enumerate(prompts):
        (alone,) = Rows(model, [prompt]).all_logits()
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_row_that_is_not_a_number_spoils_no_other(
    quantization: Quantization, model_dir: Path
) -> None:
    model = load(model_dir, quantization)
    sane = Rows(model, prompts_of(6)).all_logits()[0]
    poisoned = VOCAB_SIZE - 1
    model.embedding[poisoned] = torch.nan
    prompt = prompts_of(6)[0]
    assert poisoned not in prompt
    ill, well = Rows(model, [[poisoned] * 6, prompt]).all_logits()
    assert ill.isnan().all()
    assert torch.equal(well, sane)


# Skipping ----------------------------------------------------------------------------------------


def test_no_row_running_leaves_the_residual_and_still_writes_keys(model_dir: Path) -> None:
    """All FFN blocks off is attention alone: a model whose FFN gives nothing says the same."""
    model = load(model_dir)
    prompts = prompts_of(4, 4, 4)
    skipped = Rows(model, prompts)
    mask = [[True] * skipped.num_layers] * 3
    found = [skipped.step(position, [0, 1, 2], ForcedGate(mask)) for position in range(4)]
    for block in model.blocks:
        block.ffn.down.weight.zero_()
    expected = Rows(model, prompts)
    assert all(torch.equal(found[n], expected.step(n, [0, 1, 2])) for n in range(4))


def test_rows_that_skip_differently_are_what_they_are_alone(model_dir: Path) -> None:
    model = load(model_dir)
    prompts = prompts_of(5, 5, 5, 5)
    masks = [[False, bool(n & 1), bool(n & 2)] for n in range(4)]
    together = Rows(model, prompts)
    found = [together.step(n, [0, 1, 2, 3], ForcedGate(masks)) for n in range(5)]
    for row in range(4):
        alone = Rows(model, [prompts[row]])
        for position in range(5):
            expected = alone.step(position, [0], ForcedGate([masks[row]]))
            assert torch.equal(found[position][row], expected[0])


def test_similarities_are_cosines_and_one_for_rows_that_did_not_run(model_dir: Path) -> None:
    model = load(model_dir)
    rows = Rows(model, [[5], [6], [7]])
    rows.decoder.begin([5, 6, 7], [0, 0, 0], rows.block_tables)
    rows.decoder.attend(0)
    similarities = rows.decoder.feed_forward_watched(0, [0, 2])
    with torch.inference_mode():
        eager = KVCache(
            model.config, num_blocks=99, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
        )
        from skipllm_core.model.attention import ContextRow

        ctx = model.context([ContextRow(0, 1, table) for table in rows.block_tables], eager)
        h = model.blocks[0].attend(model.embed(torch.tensor([5, 6, 7])), ctx)
        after = model.blocks[0].feed_forward(h)
        expected = torch.cosine_similarity(h, after, dim=-1).tolist()
    assert similarities[1] == 1.0
    assert similarities[0] == pytest.approx(expected[0], abs=1e-6)
    assert similarities[2] == pytest.approx(expected[2], abs=1e-6)


def test_the_adaptive_gate_decides_by_the_kernels_similarities(model_dir: Path) -> None:
    rows = Rows(load(model_dir), [[5], [6]])
    skip = SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=0, cold_end=3)
    gate = RowGate([skip, None])
    rows.step(0, [0, 1], gate)
    assert [list(layers) for layers in gate.skipped_layers] == [[1, 2], []]


# Bad arguments do not crash ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_ids", "positions", "tables"),
    [
        ([1, 1], [0, 0], [[0], [1]]),  # more rows than there is room for
        ([1], [BLOCK_SIZE], [[0]]),  # a block table that is too short
        ([1], [0, 0], [[0]]),
        ([1], [-1], [[0]]),
        ([10**6], [0], [[0]]),
        ([-1], [0], [[0]]),
        ([1], [0], [[10**6]]),
        (["1"], [0], [[0]]),
        ([1], [0], [None]),
    ],
)
def test_a_step_that_cannot_be_is_refused(
    token_ids: list[int], positions: list[int], tables: list[list[int]], model_dir: Path
) -> None:
    decoder = Rows(load(model_dir), [[1] * 4]).decoder
    with pytest.raises((TypeError, ValueError)):
        decoder.begin(token_ids, positions, tables)


def test_layers_and_rows_that_are_not_there_are_refused(model_dir: Path) -> None:
    rows = Rows(load(model_dir), [[1]])
    rows.decoder.begin([1], [0], rows.block_tables)
    with pytest.raises(IndexError):
        rows.decoder.attend(3)
    with pytest.raises(IndexError):
        rows.decoder.feed_forward(0, [1])
    with pytest.raises(IndexError):
        rows.decoder.feed_forward(-1, None)
    with pytest.raises(TypeError):
        rows.decoder.feed_forward(0, [0, 0])


def test_a_refused_step_leaves_room_for_the_logits_of_the_one_before(model_dir: Path) -> None:
    rows = Rows(load(model_dir), prompts_of(2, 2, 2))
    expected = rows.step(0, [0, 1, 2])
    with pytest.raises(ValueError, match="vocabulary"):
        rows.decoder.begin([VOCAB_SIZE], [1], rows.block_tables[:1])
    assert torch.equal(rows.decoder.logits(), expected)
    with pytest.raises(AssertionError):
        rows.decoder.begin([], [], [])


def test_the_last_block_is_usable_to_its_end(tmp_path: Path) -> None:
    """A context of 5 tokens has two blocks of 4; positions 5 to 7 stand in the second."""
    oracle = make_oracle("llama3")
    oracle.save_pretrained(tmp_path)
    rows = Rows(load(tmp_path), prompts_of(5))
    rows.prompts = prompts_of(8)
    expected = oracle(torch.tensor(rows.prompts)).logits[0]
    torch.testing.assert_close(rows.all_logits()[0], expected, atol=TOLERANCE, rtol=TOLERANCE)


# Building ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("CI"), reason="a compiler is not everybody's")
def test_ci_has_the_kernels() -> None:
    assert cpu.is_available()
