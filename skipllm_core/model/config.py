"""What a checkpoint's config.json says, checked and in one dialect. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from skipllm_core.errors import UnsupportedModelError
from skipllm_core.model.checkpoint import read_json_object

RopeType = Literal["default", "linear", "llama3", "yarn", "longrope"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SUPPORTED = (
    f"supported: {', '.join(_ARCHITECTURES.values())}, unquantised, with RoPE of type "
    f"{', '.join(get_args(RopeType))}"
)
_MAX_SIZE = 2**24  # of any dimension: no real model comes near, a hostile config must stop here


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. Fields beyond `theta` are read by the types named beside them."""

    theta: float
    type: RopeType
    factor: float = 1.0  # linear, llama3, yarn
    original_max_position_embeddings: int = 1  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn, longrope: scales cos and sin
    divisors: tuple[float, ...] = ()  # longrope: of the frequencies, one each


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One supported model, whatever its family: what the decoder needs to build itself."""

    model_type: str
    vocab_size: int  # width of the logits
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int  # what YaRN adds included
    rope: RopeConfig
    windows: tuple[int | None, ...]  # per layer: tokens a query sees, its own included; None: all
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str | None  # of the weights, as the checkpoint itself says: "bfloat16", ...


def load_model_config(model_dir: Path) -> ModelConfig:
    """Reads config.json (of the hub's dialect or transformers 5's) and the end-of-sequence ids of
    generation_config.json. Raises UnsupportedModelError with the reason and what is supported."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{model_dir}: not a model directory (no config.json)")
    fields = _Fields(path, read_json_object(path))
    model_type = _check_family(fields)
    num_layers = fields.size("num_hidden_layers", max_size=4096)
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", default=num_heads)
    hidden_size = fields.size("hidden_size")
    if num_heads % num_kv_heads:
        raise fields.refused(f"{num_heads} heads cannot share {num_kv_heads} key/value heads")
    if fields.values.get("head_dim") is None and hidden_size % num_heads:
        raise fields.refused(f"hidden_size {hidden_size} is no multiple of {num_heads} heads")
    head_dim = fields.size(
        "head_dim", default=128 if model_type == "qwen3" else hidden_size // num_heads
    )
    if head_dim % 2:
        raise fields.refused(f"head_dim {head_dim} is odd")
    max_positions = fields.size("max_position_embeddings")
    rope = _rope(fields, max_positions, head_dim)
    if rope.type == "yarn":  # written with the stretched length by some, the original by others
        stretched = int(rope.original_max_position_embeddings * rope.factor)
        max_positions = min(max(max_positions, stretched), _MAX_SIZE)
    has_attention_bias = model_type in ("llama", "qwen3") and fields.flag("attention_bias")
    vocab_size = fields.size("vocab_size")
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        max_position_embeddings=max_positions,
        rope=rope,
        windows=_windows(fields, model_type, num_layers),
        qkv_bias=has_attention_bias or model_type == "qwen2",
        o_bias=has_attention_bias,
        mlp_bias=model_type == "llama" and fields.flag("mlp_bias"),
        qk_norm=model_type == "qwen3",
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=_eos_token_ids(fields, model_dir, vocab_size),
        dtype=_dtype(fields),
    )


class _Fields:
    """Checked access to a JSON object; every complaint names the file."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def refused(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path}: {reason}; {_SUPPORTED}")

    def size(self, name: str, *, default: int | None = None, max_size: int = _MAX_SIZE) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= max_size:
            raise self.refused(f"{name} is {value!r:.40}, not an integer of 1 to {max_size}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.refused(f"{name} is {value!r:.40}, not a positive number")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refused(f"{name} is {value!r:.40}, not true or false")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of ids or nothing. Ids that no logit stands for (-1 in some files) can
        never be generated and are left out."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int for token_id in ids):
            raise self.refused(f"{name} is {value!r:.40}, not a token id or a list of them")
        return tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)


def _check_family(fields: _Fields) -> str:
    values = fields.values
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise fields.refused(f"model_type {model_type!r:.60} is not supported")
    architectures = values.get("architectures")
    if architectures is not None and architectures != [_ARCHITECTURES[model_type]]:
        raise fields.refused(f"architectures {architectures!r:.100} is not supported")
    if values.get("auto_map"):
        raise fields.refused("auto_map asks for the checkpoint's own code, which is never run")
    for name in ("quantization_config", "compression_config"):
        if values.get(name):
            raise fields.refused(f"{name}: quantised weights are not supported")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.refused(f"hidden_act {values['hidden_act']!r:.40} is not supported")
    return model_type


def _windows(fields: _Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: one window for all layers. Qwen: for the layers that `layer_types` names, or else
    from `max_window_layers` on, if `use_sliding_window` at all. Llama: none."""
    values = fields.values
    layer_types = values.get("layer_types")
    if layer_types and model_type in ("llama", "mistral"):
        raise fields.refused(f"layer_types is not supported for model_type {model_type!r}")
    has_window = values.get("sliding_window", 4096) is not None and (
        model_type == "mistral"
        or (model_type in ("qwen2", "qwen3") and fields.flag("use_sliding_window"))
    )
    if not has_window:
        return (None,) * num_layers
    window = fields.size("sliding_window", default=4096)
    if model_type == "mistral":
        return (window,) * num_layers
    if layer_types is None:
        first = 28 if values.get("max_window_layers") is None else values["max_window_layers"]
        if type(first) is not int or first < 0:
            raise fields.refused(f"max_window_layers is {first!r:.40}, not a number of layers")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    kinds = {"full_attention": None, "sliding_attention": window}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or not all(isinstance(kind, str) and kind in kinds for kind in layer_types)
    ):
        raise fields.refused(f"layer_types is not {num_layers} of {', '.join(kinds)}")
    return tuple(kinds[kind] for kind in layer_types)


def _rope(fields: _Fields, max_positions: int, head_dim: int) -> RopeConfig:
    """Both dialects: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    values = fields.values
    params = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(params, dict) or any(isinstance(value, dict) for value in params.values()):
        raise fields.refused("RoPE parameters that differ by layer type are not supported")
    outside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    params = {
        **{name: values.get(name) for name in outside},
        **{name: value for name, value in params.items() if value is not None},
    }
    rope = _Fields(fields.path, params)
    rope_type = params.get("rope_type", params.get("type", "default"))
    if rope_type not in get_args(RopeType):
        raise fields.refused(f"RoPE type {rope_type!r:.40} is not supported")
    if rope.number("partial_rotary_factor", default=1.0) != 1.0:
        raise fields.refused("partial_rotary_factor other than 1 is not supported")
    theta = rope.number("rope_theta", default=10_000.0)
    if theta <= 1:
        raise fields.refused(f"rope_theta {theta} is not above 1")
    if rope_type == "default":
        return RopeConfig(theta=theta, type="default")
    if rope_type == "longrope":
        return RopeConfig(
            theta=theta,
            type="longrope",
            divisors=_divisors(rope, head_dim),
            attention_factor=rope.number("attention_factor"),
        )
    factor = rope.number("factor")
    if rope_type == "linear":
        return RopeConfig(theta=theta, type="linear", factor=factor)
    original = rope.size("original_max_position_embeddings", default=max_positions)
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise fields.refused(f"low_freq_factor {low} is not below high_freq_factor {high}")
        return RopeConfig(
            theta=theta,
            type="llama3",
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeConfig(
        theta=theta,
        type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        truncate=rope.flag("truncate", default=True),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _divisors(rope: _Fields, head_dim: int) -> tuple[float, ...]:
    """Of models that have the same ones for short texts and for long: as GGUF files have them."""
    values = rope.values.get("short_factor")
    if values != rope.values.get("long_factor"):
        raise rope.refused("RoPE whose short_factor and long_factor differ is not supported")
    if (
        not isinstance(values, list)
        or len(values) != head_dim // 2
        or not all(type(value) in (int, float) and 0 < value < 1e30 for value in values)
    ):
        raise rope.refused(f"short_factor is not {head_dim // 2} positive numbers")
    return tuple(map(float, values))


def _yarn_attention_factor(rope: _Fields, factor: float) -> float:
    """YaRN (arXiv 2309.00071, section 3.4): 0.1 ln(s) + 1, unless the checkpoint says otherwise."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.values.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        return mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return mscale(1.0)


def _eos_token_ids(fields: _Fields, model_dir: Path, vocab_size: int) -> tuple[int, ...]:
    path = model_dir / "generation_config.json"
    if path.is_file():
        generation = _Fields(path, read_json_object(path))
        if generation.values.get("eos_token_id") is not None:
            return generation.token_ids("eos_token_id", vocab_size)
    return fields.token_ids("eos_token_id", vocab_size)


def _dtype(fields: _Fields) -> str | None:
    dtype = fields.values.get("dtype") or fields.values.get("torch_dtype")
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else None
