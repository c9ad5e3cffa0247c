"""The config.json and generation_config.json that the keys of a GGUF file stand for."""

from __future__ import annotations

import math
import struct
from typing import Any

from skipllm_core.errors import UnsupportedModelError
from skipllm_core.model.gguf.header import Header
from skipllm_core.model.gguf.tensors import ROPE_FACTORS

# Mistral's models are llama to llama.cpp.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Keys that change what is computed in a way that nobody here computes, unless they have this value.
_NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attention.temperature_scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "use_parallel_residual": False,
}
# What ends a turn in the chat formats of these families, for files that name only one id.
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")
_CONTROL = 3  # a token's type


def model_config(header: Header) -> dict[str, Any]:
    """config.json, with nothing in it that does not matter: a model's fingerprint is made of it."""
    architecture = header.values.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise header.refused(
            f"general.architecture is {architecture!r:.60}; supported: {', '.join(_ARCHITECTURES)}"
        )
    if header.values.get("split.count", 1) not in (0, 1):
        raise header.refused("one file of several; llama-gguf-split --merge makes one of them")
    keys = _Keys(header, architecture)
    for name, value in _NEUTRAL.items():
        if keys.get(name, value) != value:
            raise header.refused(f"{architecture}.{name} {keys.get(name)!r:.40} is not supported")
    num_layers, heads = keys.size("block_count"), keys.size("attention.head_count")
    if num_layers > len(header.tensors):
        raise header.refused(f"{num_layers} layers, but {len(header.tensors)} tensors")
    if architecture == "llama" and keys.get("attention.sliding_window"):
        architecture = "mistral"
    head_dim = _head_dim(header, keys, heads)
    names = header.tensors.keys()
    config = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": _rows(header, "token_embd.weight"),
        "hidden_size": keys.size("embedding_length"),
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header, keys, head_dim),
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": _dtype(header),
    }
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in names
    return config | _windows(header, keys, architecture, num_layers)


def generation_config(header: Header) -> dict[str, Any]:
    """generation_config.json: what ends an answer, and the sampling that its makers name."""
    values = header.values
    tokens = values.get("tokenizer.ggml.tokens")
    types = values.get("tokenizer.ggml.token_type")
    ids = [values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if isinstance(tokens, list) and isinstance(types, list):
        ids += [
            i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
            if kind == _CONTROL and token in _ENDS
        ]
    config: dict[str, Any] = {"eos_token_id": sorted({i for i in ids if type(i) is int})}
    sampling = {
        "temp": "temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "min_p": "min_p",
        "penalty_repeat": "repetition_penalty",
    }
    for theirs, ours in sampling.items():
        value = values.get(f"general.sampling.{theirs}")
        if isinstance(value, int | float) and math.isfinite(value):
            config[ours] = value
    return config


class _Keys:
    """Checked access to the keys of the architecture; every complaint names the file."""

    def __init__(self, header: Header, architecture: str) -> None:
        self._header = header
        self._prefix = architecture

    def raw(self, name: str, default: Any = None) -> Any:
        return self._header.values.get(f"{self._prefix}.{name}", default)

    def get(self, name: str, default: Any = None) -> Any:
        """Of one value for each layer, all of them equal: that value."""
        value = self.raw(name, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def refused(self, name: str, expected: str) -> UnsupportedModelError:
        value = self.get(name)
        what = "missing" if value is None else f"{value!r:.40}"
        return self._header.refused(f"{self._prefix}.{name} is {what}, not {expected}")

    def size(self, name: str, *, default: int | None = None, smallest: int = 1) -> int:
        value = self.get(name, default)
        if type(value) is not int or not smallest <= value < 2**31:
            raise self.refused(name, f"an integer of at least {smallest}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.refused(name, "a positive number")
        return float(value)


def _rows(header: Header, name: str) -> int:
    if name not in header.tensors:
        raise header.refused(f"tensor {name!r} is missing")
    return header.tensors[name].shape[0]


def _head_dim(header: Header, keys: _Keys, heads: int) -> int:
    """As the query's matrix has it; keys that tell it must agree."""
    rows = _rows(header, "blk.0.attn_q.weight")
    if rows % heads:
        raise header.refused(f"queries of {rows} dimensions have no {heads} equal heads")
    head_dim = rows // heads
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if keys.get(name, head_dim) != head_dim:
            raise keys.refused(name, f"the {head_dim} dimensions of a head, which is supported")
    return head_dim


def _rope(header: Header, keys: _Keys, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": keys.number("rope.freq_base", default=10_000.0),
    }
    kind = keys.get("rope.scaling.type", "none")
    if ROPE_FACTORS in header.tensors:
        if kind not in ("none", "llama3", "longrope"):
            raise header.refused(f"{ROPE_FACTORS} beside RoPE scaling {kind!r:.40}")
        factors = _plain_vector(header, ROPE_FACTORS, head_dim // 2)
        return rope | {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": keys.size("context_length"),
            "attention_factor": 1.0,
        }
    if kind == "none":
        scale = keys.number("rope.scale_linear", default=1.0)  # older files
        return rope if scale == 1.0 else rope | {"rope_type": "linear", "factor": scale}
    if kind not in ("linear", "yarn"):
        raise keys.refused("rope.scaling.type", "none, linear or yarn, which are supported")
    factor = keys.number("rope.scaling.factor")
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    stretch = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return rope | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.size(
            "rope.scaling.original_context_length", default=keys.size("context_length")
        ),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", default=32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", default=1.0),
        "attention_factor": stretch * keys.number("rope.scaling.attn_factor", default=1.0),
    }


def _plain_vector(header: Header, name: str, size: int) -> list[float]:
    stored = header.tensors[name]
    if stored.shape != (size,) or stored.kind.name != "F32":
        raise header.refused(f"tensor {name!r} is no vector of {size} numbers (F32)")
    with header.path.open("rb") as stream:
        stream.seek(stored.start)
        return list(struct.unpack(f"<{size}f", stream.read(4 * size)))


def _windows(header: Header, keys: _Keys, architecture: str, num_layers: int) -> dict[str, Any]:
    """What config.json has of windows; they are those of all layers where nothing else is said."""
    window = keys.size("attention.sliding_window", default=0, smallest=0)
    if not window:
        return {"sliding_window": None} if architecture == "mistral" else {}
    pattern = keys.raw("attention.sliding_window_pattern", True)
    if isinstance(pattern, bool):
        pattern = [pattern] * num_layers
    elif type(pattern) is int and pattern > 0:  # every so many layers, one without
        pattern = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    if not isinstance(pattern, list) or len(pattern) != num_layers:
        raise keys.refused("attention.sliding_window_pattern", "true or false for every layer")
    if architecture == "mistral":
        if not all(pattern):
            raise header.refused("windows in some of the layers only are not supported for llama")
        return {"sliding_window": window}
    kinds = ("full_attention", "sliding_attention")
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "layer_types": [kinds[bool(windowed)] for windowed in pattern],
    }


def _dtype(header: Header) -> str:
    """Of the matrices; float32 for what is quantized."""
    kinds = {tensor.kind.name for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"F16"}): "float16", frozenset({"BF16"}): "bfloat16"}.get(
        frozenset(kinds), "float32"
    )
