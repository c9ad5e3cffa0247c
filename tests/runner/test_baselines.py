"""The compared policies in the engine, against transformers' own layers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.skip.baselines import exit_at, random_layers
from skipllm_core.types import SamplingParams, SkipParams
from tests.model.checkpoints import VOCAB_SIZE, make_oracle
from tests.runner.oracle import answer_stepwise
from tests.runner.tiny import engine_config, generate, skipped, text

NUM_LAYERS = 8
MAX_TOKENS = 24
PROMPTS = [torch.arange(7 * n, 7 * n + length) % VOCAB_SIZE for n, length in enumerate((5, 40, 1))]
STATIC = SkipParams(policy="static", layers=(2, 3, 5), warmup_tokens=4, trace=True)
RANDOM = SkipParams(
    policy="random", probability=0.4, warmup_tokens=0, cold_start=1, cold_end=7, trace=True
)
DROP = SkipParams(policy="layer_drop", layers=(2, 5), warmup_tokens=0, trace=True)
EXIT = SkipParams(
    policy="early_exit", first_exit=8, cold_start=3, cold_end=8, budget_tokens=16,
    warmup_tokens=0, trace=True,
)  # fmt: skip
NEVER = SkipParams(trace=True)


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


def params(skip: SkipParams, seed: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=0, seed=seed, skip=skip)


def answers(
    runner: TorchModelRunner, model_dir: Path, skip: SkipParams, **limits: int
) -> list[tuple[list[int], list[tuple[int, ...]]]]:
    """Tokens and skipped layers of each prompt's answer."""
    requests = [(prompt.tolist(), params(skip)) for prompt in PROMPTS]
    config = engine_config(model_dir, **{"max_num_seqs": 16} | limits)
    return [(text(out), skipped(out)) for out in generate(runner, config, requests)]


def stepwise(
    oracle: LlamaForCausalLM, prompt: torch.Tensor, skip: SkipParams
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The greedy answer by transformers' layers, an `if` for everything that is left out."""

    def run_layers(h, rotary, cache, num_generated, position):
        is_warm = num_generated >= skip.warmup_tokens
        skips = ()
        if skip.policy == "static" and is_warm:
            skips = skip.layers
        elif skip.policy == "random" and is_warm:
            skips = tuple(random_layers(skip, 0, position))
        elif skip.policy == "early_exit":
            skips = tuple(range(exit_at(num_generated, skip.budget_tokens, 8, 3), NUM_LAYERS))
        for number, layer in enumerate(oracle.model.layers):
            attended, _ = layer.self_attn(
                layer.input_layernorm(h), rotary, attention_mask=None, past_key_values=cache
            )
            if number in skips and skip.policy == "early_exit":
                continue  # its K and V were written, of the residual at the exit
            h = h + attended
            if number not in skips:
                h = h + layer.mlp(layer.post_attention_layernorm(h))
        return h, skips

    return answer_stepwise(oracle, prompt, MAX_TOKENS, run_layers)


@pytest.mark.parametrize("skip", [STATIC, RANDOM, EXIT], ids=lambda skip: skip.policy)
def test_what_is_left_out_is_left_out_and_nothing_else(
    oracle: LlamaForCausalLM, runner: TorchModelRunner, model_dir: Path, skip: SkipParams
) -> None:
    given = answers(runner, model_dir, skip)
    assert given == [stepwise(oracle, prompt, skip) for prompt in PROMPTS]
    assert given != answers(runner, model_dir, NEVER)


def test_layer_drop_is_the_model_without_these_layers(
    oracle: LlamaForCausalLM, runner: TorchModelRunner, model_dir: Path
) -> None:
    smaller = deepcopy(oracle)
    kept = [layer for n, layer in enumerate(oracle.model.layers) if n not in DROP.layers]
    smaller.model.layers = torch.nn.ModuleList(kept)
    smaller.config.num_hidden_layers = len(kept)
    for at, layer in enumerate(deepcopy(kept)):
        layer.self_attn.layer_idx = at
        smaller.model.layers[at] = layer
    given = answers(runner, model_dir, DROP)
    for prompt, (tokens, layers) in zip(PROMPTS, given, strict=True):
        whole = smaller.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == whole[0, len(prompt) :].tolist()
        assert set(layers) == {DROP.layers}, "of the prompt's last token, too"


def test_rows_of_all_policies_share_a_step_and_keep_their_answers(
    runner: TorchModelRunner, model_dir: Path
) -> None:
    adaptive = SkipParams(
        policy="ffn_skip", threshold=0.9, cold_start=1, cold_end=7, warmup_tokens=0, trace=True
    )
    skips = [NEVER, adaptive, STATIC, RANDOM, DROP, EXIT]
    config = engine_config(model_dir, max_num_seqs=16)
    requests = [(PROMPTS[1].tolist(), params(skip)) for skip in skips]
    together = generate(runner, config, requests)
    for skip, outputs in zip(skips, together, strict=True):
        (alone,) = generate(runner, config, [(PROMPTS[1].tolist(), params(skip))])
        assert text(outputs) == text(alone)
        assert skipped(outputs) == skipped(alone)


@pytest.mark.parametrize("skip", [STATIC, RANDOM, DROP, EXIT], ids=lambda skip: skip.policy)
def test_an_answer_survives_preemption(
    runner: TorchModelRunner, model_dir: Path, skip: SkipParams
) -> None:
    few_blocks = replace_kv(model_dir, num_tokens=112)
    requests = [(PROMPTS[1].tolist(), params(skip))] * 3
    config = engine_config(model_dir, max_num_seqs=16)
    with_room = [text(out) for out in generate(runner, config, requests)]
    outputs = generate(TorchModelRunner(few_blocks), few_blocks, requests)
    assert sum(out[-1].num_preemptions for out in outputs) > 0
    assert [text(out) for out in outputs] == with_room


def replace_kv(model_dir: Path, num_tokens: int):
    """A cache for this many tokens."""
    config = engine_config(model_dir, load_format="auto", max_model_len=64)
    one = TorchModelRunner(config)
    block_bytes = one.kv_cache.block_bytes(
        one.model.config, block_size=one.block_size, dtype=torch.float32
    )
    return replace(config, kv_cache_memory_bytes=num_tokens // one.block_size * block_bytes)


def test_a_prompt_without_its_layers_is_shared_with_nobody(
    runner: TorchModelRunner, model_dir: Path
) -> None:
    config = engine_config(model_dir, max_num_seqs=1)
    prompt = PROMPTS[1].tolist()
    requests = [(prompt, params(skip)) for skip in (DROP, NEVER, DROP, NEVER, EXIT)]
    outputs = generate(runner, config, requests)
    assert [out[0].num_cached_tokens for out in outputs] == [0, 0, 0, 32, 32]
    for pair in ((0, 2), (1, 3)):
        first, second = (text(outputs[n]) for n in pair)
        assert first == second
