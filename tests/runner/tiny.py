"""A model small enough for every test: a config.json, and weights at random from its seed."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from skipllm_core.config import EngineConfig
from skipllm_core.engine.engine import Engine
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.tokenizer import ByteTokenizer
from skipllm_core.types import LayerNeurons, SamplingParams, SeqOutput

NUM_LAYERS = 6
VOCAB = 96
BLOCK_BYTES = 16 * NUM_LAYERS * 2 * 2 * 12 * 4  # tokens, layers, K and V, heads, head_dim, float32


def write_config(model_dir: Path, **changes: Any) -> Path:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    (model_dir / "config.json").write_text(json.dumps(config | changes))
    return model_dir


class TinyTokenizer(ByteTokenizer):
    """Letters, for grammars: fewer than the logits are wide."""

    EOS = 2
    eos_token_ids = (EOS,)
    PIECES = ("", "", "</s>", *'{}[]":,.-+ ', *string.digits, *string.ascii_lowercase, "ab", '": ')

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.PIECES.index(char) for char in text]

    def token_bytes(self, token_id: int) -> bytes:
        return self.PIECES[token_id].encode() if token_id < len(self.PIECES) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id == self.EOS


def engine_config(model_dir: Path, **changes: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "model_dir": model_dir,
        "device": "cpu",
        "load_format": "dummy",
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 2**24,
    }
    return EngineConfig(**settings | changes)


def tiny_engine(runner: TorchModelRunner, config: EngineConfig) -> Engine:
    """An engine that can compile grammars for the tiny model."""
    return Engine(runner, config, runner.max_model_len, load_tokenizer=TinyTokenizer)


def generate(
    runner: TorchModelRunner, config: EngineConfig, requests: list[tuple[list[int], SamplingParams]]
) -> list[list[SeqOutput]]:
    """All requests through one engine; the outputs of each."""
    engine = Engine(runner, config, runner.max_model_len)
    for seq_id, (prompt_ids, params) in enumerate(requests):
        engine.add(seq_id, prompt_ids, params)
    outputs: list[list[SeqOutput]] = [[] for _ in requests]
    while engine.has_work:
        step = engine.step()
        assert step is not None
        for output in step.outputs:
            outputs[output.seq_id].append(output)
    return outputs


def text(outputs: list[SeqOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def skipped(outputs: list[SeqOutput]) -> list[tuple[int, ...]]:
    return [layers for output in outputs for layers in output.skipped_layers]


def left_out(outputs: list[SeqOutput]) -> list[LayerNeurons]:
    return [of_token for output in outputs for of_token in output.skipped_neurons]
