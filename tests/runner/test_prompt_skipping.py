"""A prompt computed under the skip policy in one pass: as decoding it token by token does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipllm_core.config import Consensus
from skipllm_core.engine.runner import Batch, ScheduledSeq
from skipllm_core.runner.gpu_runner import GpuModelRunner
from skipllm_core.runner.graphs import direct
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence
from skipllm_core.skip.policy import gate_for, skip_at
from skipllm_core.types import SamplingParams, SeqOutput, SkipParams
from tests.kernels.rows import needs_the_kernels
from tests.model.checkpoints import VOCAB_SIZE, make_oracle
from tests.runner.reference_decoder import ReferenceDecoder
from tests.runner.tiny import engine_config, generate, skipped, text

NUM_LAYERS = 8
PROMPT = [(11 * i * i + 5 * i + 3) % VOCAB_SIZE for i in range(75)]
POLICIES = [
    SkipParams(),
    SkipParams(policy="ffn_skip", threshold=0.9, warmup_tokens=5, cold_start=1, cold_end=7),
    SkipParams(
        policy="ffn_skip", threshold=0.8, warmup_tokens=0, cold_start=1, cold_end=7, max_skips=2
    ),
    SkipParams(policy="static", layers=(2, 3, 5), warmup_tokens=9),
    SkipParams(policy="random", probability=0.4, warmup_tokens=0, cold_start=1, cold_end=7),
    SkipParams(policy="layer_drop", layers=(2, 5), warmup_tokens=0),
    SkipParams(policy="early_exit", first_exit=8, cold_start=3, cold_end=8, warmup_tokens=0),
]  # fmt: skip
SKIPS = [replace(skip, trace=True) for skip in POLICIES]
ADAPTIVE = SKIPS[1]


def name(skip: SkipParams) -> str:
    return f"{skip.policy}{'_capped' if skip.max_skips else ''}"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("oracle")
    make_oracle("llama3", num_hidden_layers=NUM_LAYERS).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["eager", pytest.param("kernels", marks=needs_the_kernels)])
def runner(model_dir: Path, request: pytest.FixtureRequest) -> TorchModelRunner:
    is_eager = request.param == "eager"
    return TorchModelRunner(
        engine_config(model_dir, load_format="auto", enforce_eager=is_eager, max_num_seqs=16)
    )


def new_sequence(num_prompt_tokens: int, skip: SkipParams, first_block: int) -> Sequence:
    """Of PROMPT's tokens, the first `num_prompt_tokens` as the prompt and the rest generated."""
    num_generated = len(PROMPT) - num_prompt_tokens
    params = SamplingParams(max_tokens=num_generated + 1, seed=3, skip=skip)
    seq = Sequence(0, PROMPT[:num_prompt_tokens], params)
    seq.token_ids = list(PROMPT)
    seq.block_table = list(range(first_block, first_block + 8))
    return seq


def compute(
    runner: TorchModelRunner, seq: Sequence, pieces: list[int]
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The logits [tokens, vocab] of every token, and what each skipped, piece by piece."""
    logits, layers = [], []
    for num_tokens in pieces:
        positions = range(seq.num_computed_tokens, seq.num_computed_tokens + num_tokens)
        gate = gate_for([skip_at(seq, position) for position in positions])
        head = runner.forward([ScheduledSeq(seq, num_tokens)], gate)
        logits.append(head(range(num_tokens)))
        layers += [tuple(row) for row in gate.skipped_layers]
        seq.num_computed_tokens += num_tokens
    return torch.cat(logits), layers


@pytest.mark.parametrize("skip", SKIPS, ids=name)
@pytest.mark.parametrize("pieces", [[75], [1, 74], [20, 30, 25], [16] * 4 + [11]], ids=str)
@torch.inference_mode()
def test_one_pass_is_decoding_token_by_token(
    runner: TorchModelRunner, skip: SkipParams, pieces: list[int]
) -> None:
    decoded = compute(runner, new_sequence(1, skip, 0), [1] * len(PROMPT))
    seq = new_sequence(len(PROMPT), replace(skip, prompt=True), 8)
    seq.params = replace(seq.params, max_tokens=1)
    logits, layers = compute(runner, seq, pieces)
    assert layers == decoded[1]
    torch.testing.assert_close(logits, decoded[0], atol=2e-4, rtol=1e-4)
    if skip.policy != "never":
        in_full = compute(runner, new_sequence(len(PROMPT), SkipParams(), 8), [len(PROMPT)])
        assert (logits - in_full[0]).abs().max() > 0.01
        assert len(set(layers)) >= 2 or skip.policy == "layer_drop"


def ask(
    runner: TorchModelRunner, model_dir: Path, skips: list[SkipParams], **limits: int
) -> list[list[SeqOutput]]:
    params = SamplingParams(max_tokens=10, temperature=0, prompt_logprobs=1, seed=3)
    requests = [(PROMPT, replace(params, skip=skip)) for skip in skips]
    config = engine_config(model_dir, **{"max_num_seqs": 16, **limits})
    return generate(runner, config, requests)


def scores(outputs: list[SeqOutput]) -> list[float]:
    return [found.logprob for output in outputs for found in output.prompt_logprobs]


@pytest.mark.parametrize("budget", [2048, 24])
def test_rows_of_all_policies_share_steps_and_answers_go_on_from_their_prompts(
    runner: TorchModelRunner, model_dir: Path, budget: int
) -> None:
    skips = [replace(skip, prompt=True) for skip in SKIPS]
    together = ask(runner, model_dir, skips, max_num_batched_tokens=budget)
    for skip, outputs in zip(skips, together, strict=True):
        (alone,) = ask(runner, model_dir, [skip])
        assert text(outputs) == text(alone)
        assert skipped(outputs) == skipped(alone)
        assert scores(outputs) == pytest.approx(scores(alone), abs=1e-4)
        usage, usage_alone = outputs[-1].skip_usage, alone[-1].skip_usage
        assert usage == usage_alone
        assert usage is not None
        assert usage.total_ffn_blocks == (len(PROMPT) - 1 + 9) * NUM_LAYERS
        assert (usage.skipped_ffn_blocks > 0) == (skip.policy != "never")
        # Its first token comes of the prompt's last, which is computed under the policy, too.
        if skip.policy in ("static", "layer_drop"):
            assert set(skipped(outputs)) == {skip.layers}


def test_what_a_prompt_skipped_is_counted_token_by_token(
    runner: TorchModelRunner, model_dir: Path
) -> None:
    _, layers = compute(runner, new_sequence(1, ADAPTIVE, 0), [1] * len(PROMPT))
    (outputs,) = ask(runner, model_dir, [replace(ADAPTIVE, prompt=True)], max_num_batched_tokens=16)
    usage = outputs[-1].skip_usage
    assert usage is not None
    answer = skipped(outputs)[1:]
    assert usage.skipped_ffn_blocks == sum(map(len, layers)) + sum(map(len, answer))
    assert usage.warmup_tokens == ADAPTIVE.warmup_tokens


def test_without_the_wish_a_prompt_is_computed_in_full(
    runner: TorchModelRunner, model_dir: Path
) -> None:
    full, plain, wished = ask(
        runner, model_dir, [SkipParams(), ADAPTIVE, replace(ADAPTIVE, prompt=True)]
    )
    assert scores(plain) == pytest.approx(scores(full), abs=1e-4)
    assert scores(wished) != pytest.approx(scores(full), abs=1e-2)


def test_a_prefill_under_consensus_decides_row_by_row(model_dir: Path) -> None:
    config = engine_config(model_dir, load_format="auto", consensus=Consensus(share=0.0, slack=1.0))
    joint = TorchModelRunner(config)
    seqs = [new_sequence(len(PROMPT), replace(ADAPTIVE, prompt=True), 8 * n) for n in range(2)]
    rows = tuple(ScheduledSeq(seq, len(PROMPT)) for seq in seqs)
    found = joint.run(Batch("prefill", rows))
    _, layers = compute(joint, new_sequence(1, ADAPTIVE, 0), [1] * len(PROMPT))
    for row in found.rows:
        assert row.prompt_skips is not None
        assert row.prompt_skips.num_tokens == len(PROMPT) - 1
        counts = [sum(layer in skips for skips in layers) for layer in range(NUM_LAYERS)]
        assert list(row.prompt_skips.num_skipping) == counts


def test_a_devices_runner_goes_on_from_such_a_prompt(model_dir: Path) -> None:
    config = engine_config(model_dir, load_format="auto", enforce_eager=True)
    gpu = GpuModelRunner(config, ReferenceDecoder, lambda: direct)
    eager = TorchModelRunner(config)
    late_warmup = replace(ADAPTIVE, warmup_tokens=len(PROMPT) + 4)  # ends amid the answer
    skips = [
        replace(skip, prompt=True)
        for skip in (*SKIPS, late_warmup)
        if skip.policy in gpu.skip_policies
    ]
    for left, right in zip(ask(gpu, model_dir, skips), ask(eager, model_dir, skips), strict=True):
        assert text(left) == text(right)
        assert skipped(left) == skipped(right)
        assert left[-1].skip_usage == right[-1].skip_usage
