"""Builds a model and fills its weights, from safetensors or at random."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skipllm_core.config import DType, LoadFormat
from skipllm_core.errors import ConfigError, UnsupportedModelError
from skipllm_core.model.checkpoint import TensorInfo, read_tensors
from skipllm_core.model.config import ModelConfig, load_model_config
from skipllm_core.model.layers import Place
from skipllm_core.model.llama import LlamaModel

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class _Target(NamedTuple):
    """Where a checkpoint's tensor goes: a view of a weight, and the shape it must have."""

    view: Tensor
    shape: tuple[int, ...]


def resolve_dtype(config: ModelConfig, device: torch.device, dtype: DType) -> torch.dtype:
    """The dtype to compute in. Under `auto`: float32 on the CPU (16-bit is slower there); on CUDA
    the checkpoint's own, float32 checkpoints as bfloat16."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    if config.dtype == "float16" or not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def load_model(
    model_dir: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: LoadFormat = "auto",
    seed: int = 0,
) -> LlamaModel:
    """The model of a directory, in eval mode and without gradients.

    Tensors are copied one by one, so the peak is the model itself and one tensor. Raises
    UnsupportedModelError when the checkpoint is not one of ours or does not fit its config.
    """
    config = load_model_config(model_dir)
    if load_format == "dummy":
        model = _allocate(config, Place(dtype, device))
        _fill_at_random(model, seed)
        return model.eval()
    tensors = read_tensors(model_dir)
    # Compared before anything is allocated: a config may promise more than the files hold.
    plan = _allocate(config, Place(dtype, torch.device("meta")))
    _check(model_dir, tensors, _targets(plan), is_tied=config.tie_word_embeddings)
    model = _allocate(config, Place(dtype, device))
    _copy(tensors, _targets(model))
    return model.eval()


def _allocate(config: ModelConfig, place: Place) -> LlamaModel:
    try:
        return LlamaModel(config, place=place)
    except (MemoryError, RuntimeError) as error:  # torch's CPU allocator raises RuntimeError
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the model's weights do not fit into memory: {reason}") from error


def _targets(model: LlamaModel) -> dict[str, _Target]:
    """Every tensor that a checkpoint of this model must have, by its name there."""
    views: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm.weight,
    }
    if not model.config.tie_word_embeddings:
        views["lm_head.weight"] = model.head_weight
    head_norms = {}
    for layer, block in enumerate(model.blocks):
        at, attention, ffn = f"model.layers.{layer}", block.attention, block.ffn
        views[f"{at}.input_layernorm.weight"] = block.norm1.weight
        views[f"{at}.post_attention_layernorm.weight"] = block.norm2.weight
        q_heads, kv_heads = attention.num_heads, attention.num_kv_heads
        head_counts = {"q_proj": q_heads, "k_proj": kv_heads, "v_proj": kv_heads}
        for parameter, fused in attention.qkv.named_parameters():
            sizes = [count * attention.head_dim for count in head_counts.values()]
            for name, view in zip(head_counts, torch.split(fused, sizes), strict=True):
                views[f"{at}.self_attn.{name}.{parameter}"] = view
        for parameter, fused in ffn.gate_up.named_parameters():
            for name, view in zip(("gate_proj", "up_proj"), fused.chunk(2), strict=True):
                views[f"{at}.mlp.{name}.{parameter}"] = view
        for parameter, tensor in attention.o.named_parameters():
            views[f"{at}.self_attn.o_proj.{parameter}"] = tensor
        for parameter, tensor in ffn.down.named_parameters():
            views[f"{at}.mlp.down_proj.{parameter}"] = tensor
        if attention.qk_norm is not None:
            head_norms[f"{at}.self_attn.q_norm.weight"] = attention.qk_norm.weight[:q_heads]
            head_norms[f"{at}.self_attn.k_norm.weight"] = attention.qk_norm.weight[q_heads:]
    targets = {name: _Target(view, tuple(view.shape)) for name, view in views.items()}
    # One norm weight of the checkpoint serves every head of the fused one.
    targets |= {name: _Target(view, tuple(view.shape[1:])) for name, view in head_norms.items()}
    return targets


def _check(
    model_dir: Path,
    tensors: dict[str, TensorInfo],
    targets: dict[str, _Target],
    *,
    is_tied: bool,
) -> None:
    missing = targets.keys() - tensors.keys()
    if missing:
        raise UnsupportedModelError(f"{model_dir}: tensors missing: {_some(missing)}")
    unexpected = {
        name
        for name in tensors.keys() - targets.keys()
        # Older exports store the rotary frequencies, and a tied head although it is tied.
        if not name.endswith(".rotary_emb.inv_freq") and not (is_tied and name == "lm_head.weight")
    }
    if unexpected:
        raise UnsupportedModelError(f"{model_dir}: unexpected tensors: {_some(unexpected)}")
    for name, target in targets.items():
        if tensors[name].shape != target.shape:
            raise UnsupportedModelError(
                f"{model_dir}: tensor {name} has shape {list(tensors[name].shape)}, "
                f"config.json asks for {list(target.shape)}"
            )


def _some(names: set[str]) -> str:
    shown = ", ".join(repr(name)[:200] for name in sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


@torch.no_grad()
def _copy(tensors: dict[str, TensorInfo], targets: dict[str, _Target]) -> None:
    names_by_file: dict[Path, list[str]] = defaultdict(list)
    for name in targets:
        names_by_file[tensors[name].file].append(name)
    for file, names in names_by_file.items():
        try:
            with safe_open(file, framework="pt") as weights:
                for name in names:
                    targets[name].view.copy_(weights.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise UnsupportedModelError(f"{file}: {error}") from error


@torch.no_grad()
def _fill_at_random(model: LlamaModel, seed: int) -> None:
    """Norms of one, matrices N(0, 1 / inputs), so that activations and logits stay of order one."""
    generator = torch.Generator(model.embedding.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            std = parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, std, generator=generator)
