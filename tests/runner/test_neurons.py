"""The policy `neurons` in the engine, against transformers' own layers with the same rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from skipllm_core.config import Consensus
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.runner.neurons import feed_forward_neurons
from skipllm_core.types import SamplingParams, SeqOutput, SkipParams
from tests.model.checkpoints import VOCAB_SIZE, make_oracle
from tests.runner.oracle import answer_stepwise
from tests.runner.tiny import engine_config, generate, text

NUM_LAYERS = 6
MAX_TOKENS = 20
WARMUP = 3
PROMPTS = [torch.arange(7 * n, 7 * n + length) % VOCAB_SIZE for n, length in enumerate((5, 40, 1))]


@pytest.fixture(scope="module")
def oracle() -> LlamaForCausalLM:
    return make_oracle("llama3", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def model_dir(oracle: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("oracle")
    oracle.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def runner(model_dir: Path) -> TorchModelRunner:
    return TorchModelRunner(engine_config(model_dir, load_format="auto", max_num_seqs=16))


@pytest.fixture(scope="module")
def neurons(runner: TorchModelRunner) -> SkipParams:
    """About a third of the neurons out before up, and of the others a third before down."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(64, runner.model.config.hidden_size, generator=generator)
    up, down = [], []
    for block in runner.model.blocks:
        gate, raised = block.ffn.gate_up(block.norm2(h)).chunk(2, dim=-1)
        score = torch.nn.functional.silu(gate).abs() * block.ffn.down_norms
        up.append(float(score.quantile(0.33)))
        product = score * raised.abs()
        down.append(float(product[score >= up[-1]].quantile(0.33)))
    return SkipParams(
        policy="neurons",
        up_thresholds=tuple(up),
        down_thresholds=tuple(down),
        warmup_tokens=WARMUP,
        trace=True,
    )


def answers(
    runner: TorchModelRunner, model_dir: Path, *skips: SkipParams, **limits: Any
) -> list[list[SeqOutput]]:
    """Of each prompt under each of the settings, all at once."""
    config = engine_config(model_dir, load_format="auto", max_num_seqs=16, **limits)
    requests = [
        (prompt.tolist(), SamplingParams(max_tokens=MAX_TOKENS, temperature=0, skip=skip))
        for skip in skips
        for prompt in PROMPTS
    ]
    return generate(runner, config, requests)


def counts(outputs: list[SeqOutput]) -> list[object]:
    return [of_token for output in outputs for of_token in output.skipped_neurons]


def test_answers_are_those_of_transformers_layers_without_the_same_neurons(
    runner: TorchModelRunner, model_dir: Path, oracle: LlamaForCausalLM, neurons: SkipParams
) -> None:
    def layers(
        h: torch.Tensor, rotary: Any, cache: DynamicCache, generated: int, position: int
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        found = []
        for at, layer in enumerate(oracle.model.layers):
            attended, _ = layer.self_attn(
                layer.input_layernorm(h),
                position_embeddings=rotary,
                attention_mask=None,
                past_key_values=cache,
            )
            h = h + attended
            z, mlp = layer.post_attention_layernorm(h), layer.mlp
            norms = mlp.down_proj.weight.norm(dim=0)
            activation = mlp.act_fn(mlp.gate_proj(z))
            product = activation * mlp.up_proj(z)
            if generated >= WARMUP:
                no_up = activation.abs() * norms < neurons.up_thresholds[at]
                no_down = ~no_up & (product.abs() * norms < neurons.down_thresholds[at])
                product = product.masked_fill(no_up | no_down, 0.0)
                found.append((int(no_up.sum()), int(no_down.sum())))
            h = h + mlp.down_proj(product)
        seen.append(tuple(found))
        return h, ()

    for prompt, outputs in zip(PROMPTS, answers(runner, model_dir, neurons), strict=True):
        seen: list[tuple[tuple[int, int], ...]] = [()]  # the prompt's last token is run in full
        tokens, _ = answer_stepwise(oracle, prompt, MAX_TOKENS, layers)
        assert text(outputs) == tokens
        assert counts(outputs) == seen
        usage = outputs[-1].skip_usage
        assert usage is not None
        rows_left_out = sum(2 * up + down for of_token in seen for up, down in of_token)
        assert usage.skipped_ffn_rows == rows_left_out
        num_neurons = oracle.config.intermediate_size
        assert usage.total_ffn_rows == (MAX_TOKENS - 1) * NUM_LAYERS * 3 * num_neurons
        assert 0.2 < usage.skipped_ffn_share < 0.5
        assert usage.token_skip_ratio == 0, "no block is skipped whole"


def test_a_row_does_not_depend_on_its_batch_mates(
    runner: TorchModelRunner, model_dir: Path, neurons: SkipParams
) -> None:
    alone = answers(runner, model_dir, neurons)
    block_skip = SkipParams(
        policy="ffn_skip", threshold=-1.0, cold_start=1, cold_end=5, warmup_tokens=1
    )
    later = replace(neurons, warmup_tokens=9)
    mixed = answers(runner, model_dir, neurons, SkipParams(trace=True), block_skip, later)
    assert [text(one) for one in mixed[:3]] == [text(one) for one in alone]
    assert [counts(one) for one in mixed[:3]] == [counts(one) for one in alone]


def test_thresholds_of_zero_leave_nothing_out(
    runner: TorchModelRunner, model_dir: Path, neurons: SkipParams
) -> None:
    nothing = (0.0,) * NUM_LAYERS
    none_out = replace(neurons, up_thresholds=nothing, down_thresholds=nothing)
    found = answers(runner, model_dir, none_out)
    full = answers(runner, model_dir, SkipParams(trace=True))
    assert [text(one) for one in found] == [text(one) for one in full]
    assert all(one[-1].skip_usage.skipped_ffn_share == 0 for one in found if one[-1].skip_usage)


def test_a_preempted_row_leaves_out_what_it_left_out(
    runner: TorchModelRunner, model_dir: Path, neurons: SkipParams
) -> None:
    alone = answers(runner, model_dir, neurons)
    scarce = engine_config(
        model_dir,
        load_format="auto",
        max_num_seqs=16,
        kv_cache_memory_bytes=5
        * runner.kv_cache.block_bytes(runner.model.config, block_size=16, dtype=torch.float32),
        max_model_len=64,
    )
    small = TorchModelRunner(scarce)
    requests = [
        (prompt.tolist(), SamplingParams(max_tokens=MAX_TOKENS, temperature=0, skip=neurons))
        for prompt in PROMPTS
    ]
    found = generate(small, scarce, requests)
    assert sum(one[-1].num_preemptions for one in found) > 0
    assert [text(one) for one in found] == [text(one) for one in alone]
    assert [counts(one) for one in found] == [counts(one) for one in alone]


def test_the_step_tells_what_no_row_wanted(runner: TorchModelRunner, neurons: SkipParams) -> None:
    block = runner.model.blocks[2]
    h = torch.randn(4, runner.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    pair = (neurons.up_thresholds[2], neurons.down_thresholds[2])
    _, alone = feed_forward_neurons(block, h[:1], [pair])
    assert alone.unread_up == alone.before_up[0]
    assert alone.unread_down == alone.before_up[0] + alone.before_down[0]
    _, beside = feed_forward_neurons(block, h, [pair, pair, (0.0, 0.0), pair])
    assert (beside.before_up[2], beside.before_down[2]) == (0, 0)
    assert (beside.unread_up, beside.unread_down) == (0, 0), "one row wants everything"


def test_a_consensus_leaves_out_as_many_as_its_rows_would_and_reads_none_of_them(
    runner: TorchModelRunner, neurons: SkipParams
) -> None:
    block = runner.model.blocks[2]
    h = torch.randn(4, runner.model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    pair = (neurons.up_thresholds[2], neurons.down_thresholds[2])
    _, own = feed_forward_neurons(block, h, [pair] * 4)
    _, joint = feed_forward_neurons(block, h, [pair] * 4, is_joint=True)
    assert list(joint.before_up) == [sum(own.before_up) // 4] * 4
    assert joint.unread_up == joint.before_up[0]
    assert joint.unread_down == joint.before_up[0] + joint.before_down[0]
    assert own.unread_up < joint.unread_up, "alone, rows agree about few"
    after, one = feed_forward_neurons(block, h[:1], [pair], is_joint=True)
    exact, same = feed_forward_neurons(block, h[:1], [pair])
    assert one == same
    assert torch.equal(after, exact), "a batch of one is its own consensus"


def test_what_is_no_number_is_kept(runner: TorchModelRunner, neurons: SkipParams) -> None:
    block = runner.model.blocks[2]
    h = torch.full((2, runner.model.config.hidden_size), torch.nan)
    pair = (neurons.up_thresholds[2], neurons.down_thresholds[2])
    for is_joint in (False, True):
        after, found = feed_forward_neurons(block, h, [pair, pair], is_joint=is_joint)
        assert list(found.before_up) == [0, 0]
        assert after.isnan().all()


def test_a_consensus_in_the_engine_saves_reads(model_dir: Path, neurons: SkipParams) -> None:
    config = engine_config(model_dir, load_format="auto", consensus=Consensus())
    joint = TorchModelRunner(config)
    found = answers(joint, model_dir, neurons, consensus=Consensus())
    of_step = [counts(one) for one in found]
    assert of_step[0] == of_step[1] == of_step[2], "the rows go together"
