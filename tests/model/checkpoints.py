"""Tiny checkpoints of every family, made and saved by transformers, whose models are the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 576

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (family, what differs from SMALL)
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3_tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_yarn_mscale": (
        "Llama",
        {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}},
    ),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("Llama", {"head_dim": 20}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 11}),
    "mistral_head_dim": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": {**YARN, "beta_fast": 16.0}}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_window": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def make_oracle(name: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """transformers' own model, its weights large enough that every part of it matters."""
    family, differences = CHECKPOINTS[name]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **differences, **changes})
    config._attn_implementation = "eager"
    model: transformers.PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.normal_(1.0, 0.3, generator=generator)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def save_checkpoint(
    directory: Path, name: str = "llama3", *, max_shard_size: str = "1GB", seed: int = 0
) -> Path:
    make_oracle(name, seed).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
