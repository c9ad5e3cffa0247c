"""The runner on a tiny random model: skipping against the plain model, rows on their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skipllm_core.engine.runner import Batch, ScheduledSeq
from skipllm_core.errors import ConfigError
from skipllm_core.model.attention import ContextRow
from skipllm_core.runner import memory
from skipllm_core.runner.decode import decode_step
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence
from skipllm_core.skip.policy import ForcedGate, NeverGate, RowGate
from skipllm_core.types import SamplingParams, SkipParams
from tests.runner.tiny import (
    BLOCK_BYTES,
    NUM_LAYERS,
    VOCAB,
    engine_config,
    generate,
    skipped,
    text,
    write_config,
)

PROMPTS = [[5, 9, 11, 40], [7] * 21, [3], list(range(10, 60)), [80, 2, 80], [33, 34]]
PLAIN = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runner(model_dir: Path) -> TorchModelRunner:
    return TorchModelRunner(engine_config(model_dir))


@pytest.fixture(scope="module")
def skipping(runner: TorchModelRunner) -> SkipParams:
    """Settings under which this model's tokens trigger at several layers, and some at none."""
    return SkipParams(
        policy="ffn_skip",
        threshold=median_similarity(runner),
        warmup_tokens=2,
        cold_start=1,
        cold_end=NUM_LAYERS - 1,
        trace=True,
    )


def median_similarity(runner: TorchModelRunner) -> float:
    seen = []

    class Recorder(NeverGate):
        def watches(self, layer: int) -> bool:
            return 1 <= layer < NUM_LAYERS - 1

        def observe(self, layer: int, similarities: list[float]) -> None:
            seen.extend(similarities)

    prefill(runner, PROMPTS[3], gate=Recorder(len(PROMPTS[3])))
    return float(torch.tensor(seen).quantile(0.6))


def prefill(runner: TorchModelRunner, prompt_ids: list[int], first_block: int = 0, gate=None):
    seq = Sequence(0, prompt_ids, PLAIN)
    seq.block_table = list(range(first_block, first_block + 6))
    logits = runner.logits([ScheduledSeq(seq, seq.num_tokens)], gate or NeverGate(seq.num_tokens))
    seq.num_computed_tokens = seq.num_tokens
    seq.token_ids.append(int(logits.argmax()))
    return seq


@torch.inference_mode()
def decode(runner: TorchModelRunner, seqs: list[Sequence], gate) -> torch.Tensor:
    ctx = runner.model.context(
        [ContextRow(seq.num_tokens - 1, 1, seq.block_table) for seq in seqs], runner.kv_cache
    )
    token_ids = torch.tensor([seq.token_ids[-1] for seq in seqs])
    return decode_step(runner.model, token_ids, ctx, gate)


# The spine: never equals the plain model ---------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 6])
def test_never_equals_the_plain_model_bit_for_bit(runner: TorchModelRunner, num_rows: int) -> None:
    seqs = [prefill(runner, prompt, 6 * n) for n, prompt in enumerate(PROMPTS[:num_rows])]
    token_ids = torch.tensor([seq.token_ids[-1] for seq in seqs])
    with torch.inference_mode():
        rows = [ContextRow(seq.num_tokens - 1, 1, seq.block_table) for seq in seqs]
        ctx = runner.model.context(rows, runner.kv_cache)
        plain = runner.model.head(runner.model(token_ids, ctx))
    assert torch.equal(decode(runner, seqs, NeverGate(num_rows)), plain)
    nothing_to_skip = RowGate([None] * num_rows)
    assert torch.equal(decode(runner, seqs, nothing_to_skip), plain)
    out_of_reach = SkipParams(policy="ffn_skip", threshold=2.0, cold_end=NUM_LAYERS)
    assert torch.equal(decode(runner, seqs, RowGate([out_of_reach] * num_rows)), plain)
    assert torch.equal(decode(runner, seqs, ForcedGate([[False] * NUM_LAYERS] * num_rows)), plain)


def test_a_row_that_runs_is_computed_right_beside_rows_that_skip(runner: TorchModelRunner) -> None:
    seqs = [prefill(runner, prompt, 6 * n) for n, prompt in enumerate(PROMPTS)]
    plain = decode(runner, seqs, NeverGate(6))
    mask = [
        [(row + layer) % 2 == 0 and row != 2 for layer in range(NUM_LAYERS)] for row in range(6)
    ]
    mixed = decode(runner, seqs, ForcedGate(mask))
    torch.testing.assert_close(mixed[2], plain[2], atol=1e-5, rtol=1e-5)
    assert all((mixed[row] - plain[row]).abs().max() > 1e-3 for row in range(6) if row != 2)


def test_the_rule_and_its_mask_agree_bit_for_bit(
    runner: TorchModelRunner, skipping: SkipParams
) -> None:
    seqs = [prefill(runner, prompt, 6 * n) for n, prompt in enumerate(PROMPTS)]
    gate = RowGate([skipping] * 6)
    adaptive = decode(runner, seqs, gate)
    assert any(gate.skipped_layers)
    mask = [[layer in layers for layer in range(NUM_LAYERS)] for layers in gate.skipped_layers]
    assert torch.equal(decode(runner, seqs, ForcedGate(mask)), adaptive)


# Through the engine ------------------------------------------------------------------------------


def requests(skipping: SkipParams) -> list[tuple[list[int], SamplingParams]]:
    kinds = [
        PLAIN,
        replace(PLAIN, skip=skipping),
        replace(PLAIN, temperature=1.0, seed=5, top_p=0.9, skip=replace(skipping, max_skips=1)),
        replace(PLAIN, presence_penalty=1.0, skip=replace(skipping, warmup_tokens=0)),
        replace(PLAIN, temperature=0.8, seed=9, top_k=20, logit_bias=((4, 3.0),)),
        replace(PLAIN, skip=replace(skipping, threshold=-1.0)),
    ]
    return list(zip(PROMPTS, kinds, strict=True))


def test_a_request_gets_the_same_tokens_and_skips_in_every_batch(
    runner: TorchModelRunner, model_dir: Path, skipping: SkipParams
) -> None:
    config = engine_config(model_dir)
    alone = [generate(runner, config, [request])[0] for request in requests(skipping)]
    for limits in ({}, {"max_num_seqs": 3}, {"max_num_batched_tokens": 9}):
        together = generate(runner, engine_config(model_dir, **limits), requests(skipping))
        assert [text(outputs) for outputs in together] == [text(outputs) for outputs in alone]
        assert [skipped(outputs) for outputs in together] == [skipped(outputs) for outputs in alone]


def test_a_preempted_request_gets_the_tokens_it_would_have_got(
    runner: TorchModelRunner, model_dir: Path, skipping: SkipParams
) -> None:
    """Recomputed output tokens are decoded under the rule again, so their K and V are the same."""
    wishes = [(prompt, replace(p, max_tokens=40)) for prompt, p in requests(skipping)]
    expected = generate(runner, engine_config(model_dir), wishes)
    tight_config = engine_config(model_dir, max_num_batched_tokens=16)
    tight = TorchModelRunner(
        replace(tight_config, kv_cache_memory_bytes=8 * BLOCK_BYTES, max_model_len=8 * 16)
    )
    assert tight.num_kv_blocks == 8
    outputs = generate(tight, tight_config, wishes)
    assert sum(row[-1].num_preemptions for row in outputs) >= 3
    assert [text(row) for row in outputs] == [text(row) for row in expected]
    assert [skipped(row) for row in outputs] == [skipped(row) for row in expected]


def test_warm_up_tokens_run_in_full_through_the_engine(
    runner: TorchModelRunner, model_dir: Path, skipping: SkipParams
) -> None:
    always = replace(skipping, threshold=-1.0, warmup_tokens=4)
    outputs = generate(
        runner, engine_config(model_dir), [(PROMPTS[0], replace(PLAIN, skip=always))]
    )
    most = tuple(range(2, NUM_LAYERS - 1))
    assert skipped(outputs[0]) == [()] * 4 + [most] * 8


def test_both_ratios_are_counted(
    runner: TorchModelRunner, model_dir: Path, skipping: SkipParams
) -> None:
    always = replace(PLAIN, skip=replace(skipping, threshold=-1.0, warmup_tokens=0))
    alone = generate(runner, engine_config(model_dir), [(PROMPTS[0], always)])[0][-1].skip_usage
    assert alone.token_skip_ratio == 3 / NUM_LAYERS
    assert alone.total_ffn_blocks == 11 * NUM_LAYERS
    seqs = [prefill(runner, prompt, 6 * n) for n, prompt in enumerate(PROMPTS[:2])]
    for seq, params in zip(seqs, (always, PLAIN), strict=True):
        seq.params, seq.skip = params, params.skip
    rows = tuple(ScheduledSeq(seq, 1) for seq in seqs)
    result = runner.run(Batch("decode", rows[:1]))
    assert (result.ffn_weight_reads, result.ffn_weight_reads_avoided) == (NUM_LAYERS - 3, 3)
    result = runner.run(Batch("decode", rows))
    assert (result.ffn_weight_reads, result.ffn_weight_reads_avoided) == (NUM_LAYERS, 0)
    assert [len(row.skipped_layers) for row in result.rows] == [3, 0]


def test_a_row_with_broken_values_fails_alone(model_dir: Path) -> None:
    broken_id = 77
    runner = TorchModelRunner(engine_config(model_dir))
    expected = generate(runner, engine_config(model_dir), [(PROMPTS[0], PLAIN)])
    with torch.inference_mode():
        runner.model.embedding[broken_id] = torch.nan
    outputs = generate(
        runner,
        engine_config(model_dir),
        [(PROMPTS[0], PLAIN), ([4, broken_id, 4], PLAIN), ([6, 6, broken_id], PLAIN)],
    )
    assert text(outputs[0]) == text(expected[0])
    assert [row[-1].finish_reason for row in outputs] == ["length", "error", "error"]
    again = generate(runner, engine_config(model_dir), [(PROMPTS[0], PLAIN)])
    assert text(again[0]) == text(expected[0])  # blocks that held NaNs do no harm


# Sizes -------------------------------------------------------------------------------------------


def test_the_cache_holds_what_the_sequences_can_use_and_no_more(model_dir: Path) -> None:
    runner = TorchModelRunner(engine_config(model_dir, kv_cache_memory_bytes=None, max_num_seqs=3))
    assert runner.max_model_len == 256
    assert runner.num_kv_blocks == 3 * 256 // 16
    assert runner.vocab_size == VOCAB
    assert (runner.device, runner.dtype) == ("cpu", "float32")


def test_a_default_context_is_cut_to_what_the_cache_holds(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = TorchModelRunner(engine_config(model_dir, kv_cache_memory_bytes=5 * BLOCK_BYTES + 1))
    assert runner.num_kv_blocks == 5
    assert runner.max_model_len == 80
    assert "cut from 256 to 80" in caplog.text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_model_len": 100, "kv_cache_memory_bytes": BLOCK_BYTES * 6}, "--kv-cache-memory"),
        ({"kv_cache_memory_bytes": 100}, "--kv-cache-memory"),
        ({"max_model_len": 257}, "--max-model-len 257 is beyond the 256"),
        ({"device": "cuda"}, "--device cuda"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, says: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=says):
        TorchModelRunner(engine_config(model_dir, **changes))


def test_a_containers_limit_counts_as_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:  500 kB\n")
    assert memory.available_memory_bytes(tmp_path, tmp_path) == 500 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory_bytes(tmp_path, tmp_path) == 500 * 1024
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.current").write_text("30000\n")
    (tmp_path / "memory.stat").write_text("anon 10000\ninactive_file 8000\n")
    assert memory.available_memory_bytes(tmp_path, tmp_path) == 78_000  # file cache gives way
