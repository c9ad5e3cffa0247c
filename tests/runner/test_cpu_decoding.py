"""The runner with the CPU's kernels: what torch alone and transformers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from skipllm_core.engine.runner import ScheduledSeq
from skipllm_core.runner.model_runner import KERNEL_PREFILL_TOKENS, TorchModelRunner
from skipllm_core.sequence import Sequence
from skipllm_core.skip.policy import NeverGate
from skipllm_core.types import SamplingParams, SkipParams
from tests.kernels.rows import needs_the_kernels
from tests.model.checkpoints import make_oracle
from tests.runner.tiny import engine_config, generate, skipped, text

PROMPTS = [[5, 9, 11, 40], [7] * 21, [3], list(range(10, 60)), [80, 2, 80], [33, 34]]
MAX_TOKENS = 24
SKIPPING = SkipParams(
    policy="ffn_skip", threshold=0.9, warmup_tokens=2, cold_start=1, cold_end=7, trace=True
)
SKIPS = [SkipParams(), SKIPPING, replace(SKIPPING, threshold=0.8, max_skips=2)]

pytestmark = needs_the_kernels


@pytest.fixture(scope="module")
def oracle() -> PreTrainedModel:
    return make_oracle("llama3", num_hidden_layers=8)


@pytest.fixture(scope="module")
def model_dir(oracle: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("oracle")
    oracle.save_pretrained(directory)
    return directory


def test_greedy_answers_are_transformers_own(oracle: PreTrainedModel, model_dir: Path) -> None:
    config = engine_config(model_dir, load_format="auto")
    runner = TorchModelRunner(config)
    assert runner.cpu_decoder is not None
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    outputs = generate(runner, config, [(prompt, params) for prompt in PROMPTS])
    for prompt, found in zip(PROMPTS, outputs, strict=True):
        expected = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
        )
        answer = expected[0, len(prompt) :].tolist()  # ends with its eos; ours goes on
        assert text(found)[: len(answer)] == answer


def test_torch_alone_says_and_skips_the_same(model_dir: Path) -> None:
    config = engine_config(model_dir, load_format="auto")
    eager_config = engine_config(model_dir, load_format="auto", enforce_eager=True)
    eager = TorchModelRunner(eager_config)
    assert eager.cpu_decoder is None
    requests = [
        (prompt, SamplingParams(max_tokens=MAX_TOKENS, temperature=0, skip=skip))
        for prompt in PROMPTS
        for skip in SKIPS
    ]
    found = generate(TorchModelRunner(config), config, requests)
    expected = generate(eager, eager_config, requests)
    assert list(map(text, found)) == list(map(text, expected))
    assert list(map(skipped, found)) == list(map(skipped, expected))
    assert len({layers for outputs in found for layers in skipped(outputs)}) > 3


def test_a_short_piece_of_a_prompt_is_computed_by_the_kernels_as_by_torch(model_dir: Path) -> None:
    prompt = [5 + n % 60 for n in range(50)]
    found = []
    for enforce_eager in (False, True):
        config = engine_config(model_dir, load_format="auto", enforce_eager=enforce_eager)
        runner = TorchModelRunner(config)
        first, second = (Sequence(n, prompt, SamplingParams(max_tokens=1)) for n in range(2))
        first.block_table, second.block_table = [3, 1, 0, 2], [7, 5, 4, 6]
        for seq, num_tokens in ((first, 40), (second, 45)):  # by torch in both
            runner.logits([ScheduledSeq(seq, num_tokens)], NeverGate(num_tokens))
            seq.num_computed_tokens = num_tokens
        part = runner.logits([ScheduledSeq(first, 4), ScheduledSeq(second, 5)], NeverGate(9))
        first.num_computed_tokens = 44
        rest = runner.logits([ScheduledSeq(first, 6)], NeverGate(6))
        assert part.shape == rest.shape == (1, runner.vocab_size)
        torch.testing.assert_close(part, rest, atol=1e-4, rtol=1e-4)  # the same prompt
        found.append(rest)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_long_piece_of_a_prompt_is_torchs_however_many_rows_are_served(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = TorchModelRunner(engine_config(model_dir, load_format="auto", max_num_seqs=64))
    assert runner.cpu_decoder is not None
    steps: list[int] = []
    begin = runner.cpu_decoder.begin

    def count(token_ids: list[int], *rest: list[int]) -> None:
        steps.append(len(token_ids))
        begin(token_ids, *rest)

    monkeypatch.setattr(runner.cpu_decoder, "begin", count)
    for num_tokens in (KERNEL_PREFILL_TOKENS + 1, KERNEL_PREFILL_TOKENS):
        seq = Sequence(0, [5] * num_tokens, SamplingParams(max_tokens=1))
        seq.block_table = [0, 1, 2]
        runner.logits([ScheduledSeq(seq, num_tokens)], NeverGate(num_tokens))
    assert steps == [KERNEL_PREFILL_TOKENS]


def test_a_step_of_more_rows_than_the_kernels_have_room_for_is_torchs(model_dir: Path) -> None:
    """Calibration may look at more rows side by side than are ever served."""
    config = engine_config(model_dir, load_format="auto", max_num_seqs=4)  # room for 64 blocks
    runner = TorchModelRunner(config)
    rows = []
    for n in range(KERNEL_PREFILL_TOKENS + 1):
        seq = Sequence(0, [5, 6, 7 + n % 9], SamplingParams(max_tokens=1))
        seq.block_table = [n]
        runner.logits([ScheduledSeq(seq, 2)], NeverGate(2))
        seq.num_computed_tokens = 2
        rows.append(ScheduledSeq(seq, 1))
    together = runner.logits(rows, NeverGate(len(rows)))
    for row, logits in zip(rows, together, strict=True):
        alone = runner.logits([row], NeverGate(1))[0]
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_the_kernels_are_for_float32(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = engine_config(model_dir, load_format="auto", dtype="bfloat16")
    assert TorchModelRunner(config).cpu_decoder is None
    assert not caplog.messages
