"""The engine against FFN-SkipLLM's algorithm (arXiv 2404.03865), written out on transformers' own
layers: one sequence, one token after the other, every decision an `if`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.types import SamplingParams, SkipParams
from tests.model.checkpoints import VOCAB_SIZE, make_oracle
from tests.runner.oracle import answer_stepwise
from tests.runner.tiny import engine_config, generate, skipped, text

NUM_LAYERS = 8
MAX_TOKENS = 24
PROMPTS = [torch.arange(7 * n, 7 * n + length) % VOCAB_SIZE for n, length in enumerate((5, 23, 1))]
SETTINGS = [  # most of the oracle's similarities lie between 0.7 and 0.97
    {"threshold": 0.93},
    {"threshold": 0.9, "warmup_tokens": 9},
    {"threshold": -1.0, "cold_start": 3},
    {"threshold": 0.8, "max_skips": 2, "cold_end": 6},
    {"threshold": 1.0},
]


def answer(
    oracle: LlamaForCausalLM, prompt: torch.Tensor, skip: SkipParams
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The greedy answer, and the layers whose FFN each of its tokens skipped."""

    def run_layers(h, rotary, cache, num_generated, position):
        is_warm = num_generated >= skip.warmup_tokens
        triggered, skips = False, []
        for number, layer in enumerate(oracle.model.layers):
            attended, _ = layer.self_attn(
                layer.input_layernorm(h), rotary, attention_mask=None, past_key_values=cache
            )
            h = h + attended
            is_skippable = is_warm and skip.cold_start <= number < skip.cold_end
            has_skips_left = skip.max_skips is None or len(skips) < skip.max_skips
            if is_skippable and triggered and has_skips_left:
                skips.append(number)
                continue
            after = h + layer.mlp(layer.post_attention_layernorm(h))
            if is_skippable and torch.cosine_similarity(h, after, dim=-1) >= skip.threshold:
                triggered = True
            h = after
        return h, tuple(skips)

    return answer_stepwise(oracle, prompt, MAX_TOKENS, run_layers)


@pytest.fixture(scope="module")
def oracle() -> LlamaForCausalLM:
    return make_oracle("llama3", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def model_dir(oracle: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("oracle")
    oracle.save_pretrained(directory)
    return directory


def test_every_setting_gives_the_algorithms_tokens_and_skips_in_one_batch(
    oracle: LlamaForCausalLM, model_dir: Path
) -> None:
    defaults = {"warmup_tokens": 0, "cold_start": 1, "cold_end": NUM_LAYERS - 1, "trace": True}
    wishes = [
        (prompt, SkipParams(policy="ffn_skip", **defaults | changes))
        for changes in SETTINGS
        for prompt in PROMPTS
    ]
    config = engine_config(model_dir, load_format="auto", max_num_seqs=len(wishes))
    outputs = generate(
        TorchModelRunner(config),
        config,
        [
            (prompt.tolist(), SamplingParams(max_tokens=MAX_TOKENS, temperature=0, skip=skip))
            for prompt, skip in wishes
        ],
    )
    trigger_layers = set()
    for (prompt, skip), given in zip(wishes, outputs, strict=True):
        expected_tokens, expected_skips = answer(oracle, prompt, skip)
        assert text(given) == expected_tokens
        assert skipped(given) == expected_skips
        trigger_layers |= {layers[0] - 1 if layers else None for layers in expected_skips}
    assert trigger_layers >= {1, 2, 3, 4, None}, "the settings do not reach the rule's cases"
