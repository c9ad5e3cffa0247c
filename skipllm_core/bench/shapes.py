"""Models by shape alone: what is read and computed does not depend on what the weights say.

No torch here: the command line lists the names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from skipllm_core.demo import MODEL_DIR

DEFAULT_SHAPE = "163m"

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# What differs between them, as in the config.json of the hub.
_SHAPES: dict[str, dict[str, Any]] = {
    "163m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}
SHAPE_NAMES = tuple(_SHAPES)


def shape_config(name: str) -> dict[str, Any]:
    """The config.json of a shape. The special tokens are those of the embedded tokenizer."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **_SHAPES[name],
    }


def write_shape(name: str, directory: Path) -> None:
    """Makes `directory` a model without weights, to be loaded with the load format `dummy`: the
    shape's config.json, and the embedded model's tokenizer, filled up to as many ids."""
    directory.mkdir(parents=True, exist_ok=True)
    config = shape_config(name)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = json.loads((MODEL_DIR / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    # No text is ever encoded as these, but random weights choose them, and what has no text is not
    # streamed: a client would see neither the first token nor any other.
    for token_id in range(len(vocabulary), config["vocab_size"]):
        vocabulary[f"Ġt{token_id}"] = token_id
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(MODEL_DIR / file, directory / file)
