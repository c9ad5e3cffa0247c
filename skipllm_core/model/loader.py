"""Builds a model and fills its weights, from safetensors, a GGUF file or at random."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skipllm_core.config import DType, LoadFormat, Quantization
from skipllm_core.errors import ConfigError, UnsupportedModelError
from skipllm_core.model.checkpoint import INDEX, SINGLE, TensorInfo
from skipllm_core.model.config import ModelConfig, load_model_config
from skipllm_core.model.gguf.directory import is_directory_of_gguf
from skipllm_core.model.gguf.tensors import GGUFTensor, read_plain
from skipllm_core.model.layers import QUANTIZED, Linear, Place, quantize
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.weights import read_tensors

logger = logging.getLogger(__name__)

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_ROWS = 4096  # at a time

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class _Target(NamedTuple):
    """Where a checkpoint's tensor goes: a view of a weight, and the shape it must have. Of a
    quantized weight, the view of its scales too."""

    view: Tensor
    shape: tuple[int, ...]
    scale: Tensor | None = None

    def fill(self, tensor: Tensor) -> None:
        if self.scale is None:
            self.view.copy_(tensor)
            return
        rounded, scale = quantize(tensor.to(self.view.device), self.view.dtype)
        self.view.copy_(rounded)
        self.scale.copy_(scale)

    def rows(self, first: int, num: int) -> _Target:
        """A part of it."""
        part = slice(first, first + num)
        scale = None if self.scale is None else self.scale[part]
        return _Target(self.view[part], (num, *self.shape[1:]), scale)


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
    quantization: Quantization = "none",
    seed: int = 0,
) -> LlamaModel:
    """The model of a directory, in eval mode and without gradients.

    Tensors are copied (and quantized) one by one, so the peak is the model and one tensor. Raises
    UnsupportedModelError when the checkpoint is not one of ours or does not fit its config.
    """
    config = load_model_config(model_dir)
    if load_format == "dummy":
        model = _allocate(config, Place(dtype, device, quantization))
        _fill_at_random(model, seed)
        return _finished(model)
    _check_format(model_dir, load_format)
    tensors = read_tensors(model_dir)
    if (model_dir / SINGLE).is_file() and (model_dir / INDEX).is_file():
        logger.warning("%s: the weights are those of %s, not of %s", model_dir, SINGLE, INDEX)
    config = _settle_head(config, tensors)
    # Compared before anything is allocated: a config may promise more than the files hold.
    plan = _allocate(config, Place(dtype, torch.device("meta"), quantization))
    _check(model_dir, tensors, _targets(plan))
    model = _allocate(config, Place(dtype, device, quantization))
    _copy(tensors, _targets(model))
    return _finished(model)


@torch.no_grad()
def _finished(model: LlamaModel) -> LlamaModel:
    """With what is derived of the weights."""
    _tie_quantized_head(model)
    for block in model.blocks:
        block.ffn.measure_down()
    return model.eval()


def _check_format(model_dir: Path, load_format: LoadFormat) -> None:
    found = "gguf" if is_directory_of_gguf(model_dir) else "safetensors"
    if load_format not in ("auto", found):
        raise ConfigError(f"the load format is {load_format}, but the model's weights are {found}")


def _settle_head(config: ModelConfig, tensors: dict[str, TensorInfo]) -> ModelConfig:
    """Whether the head is the embedding, as the weights have it: what a tied checkpoint stores
    twice is taken from `tensors`, unless the two differ. Then they are two, as to transformers."""
    if not config.tie_word_embeddings or _HEAD not in tensors:
        return config
    if _EMBEDDING not in tensors:  # some writers keep the other name of a tensor that has two
        tensors[_EMBEDDING] = tensors.pop(_HEAD)
    elif _is_equal(tensors, _HEAD, _EMBEDDING):
        del tensors[_HEAD]
    else:
        logger.warning(
            "config.json ties the head to the embedding, but the checkpoint has a head of its own, "
            "which differs: that is used"
        )
        return replace(config, tie_word_embeddings=False)
    return config


def _is_equal(tensors: dict[str, TensorInfo], one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint hold the same numbers, compared part by part."""
    if not tensors[one].shape or tensors[one].shape != tensors[other].shape:
        return False
    try:
        with (
            safe_open(tensors[one].file, framework="pt") as ones,
            safe_open(tensors[other].file, framework="pt") as others,
        ):
            a, b = ones.get_slice(one), others.get_slice(other)
            rows = range(0, tensors[one].shape[0], _COMPARED_ROWS)
            return all(
                torch.equal(
                    a[row : row + _COMPARED_ROWS].double(), b[row : row + _COMPARED_ROWS].double()
                )
                for row in rows
            )
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(f"{tensors[one].file}: {error}") from error


def _allocate(config: ModelConfig, place: Place) -> LlamaModel:
    try:
        return LlamaModel(config, place=place)
    except torch.OutOfMemoryError:
        raise  # a device's: whoever loads knows what can be lowered
    except (MemoryError, RuntimeError) as error:  # torch's CPU allocator raises RuntimeError
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the model's weights do not fit into memory: {reason}") from error


def _targets(model: LlamaModel) -> dict[str, _Target]:
    """Every tensor that a checkpoint of this model must have, by its name there."""
    targets = {
        _EMBEDDING: _target(model.embedding),
        "model.norm.weight": _target(model.norm.weight),
    }
    if not model.config.tie_word_embeddings:
        targets |= _linear_targets({"lm_head": model.config.vocab_size}, model.lm_head)
    for layer, block in enumerate(model.blocks):
        at, attention, ffn = f"model.layers.{layer}", block.attention, block.ffn
        targets[f"{at}.input_layernorm.weight"] = _target(block.norm1.weight)
        targets[f"{at}.post_attention_layernorm.weight"] = _target(block.norm2.weight)
        q_heads, kv_heads = attention.num_heads, attention.num_kv_heads
        head_counts = {"q_proj": q_heads, "k_proj": kv_heads, "v_proj": kv_heads}
        qkv = {
            f"{at}.self_attn.{name}": count * attention.head_dim
            for name, count in head_counts.items()
        }
        inner, hidden = model.config.intermediate_size, model.config.hidden_size
        targets |= _linear_targets(qkv, attention.qkv)
        targets |= _linear_targets({f"{at}.self_attn.o_proj": hidden}, attention.o)
        gate_up = {f"{at}.mlp.{name}": inner for name in ("gate_proj", "up_proj")}
        targets |= _linear_targets(gate_up, ffn.gate_up)
        targets |= _linear_targets({f"{at}.mlp.down_proj": hidden}, ffn.down)
        if attention.qk_norm is not None:
            # One norm weight of the checkpoint serves every head of the fused one.
            shape = (attention.head_dim,)
            norms = attention.qk_norm.weight
            targets[f"{at}.self_attn.q_norm.weight"] = _Target(norms[:q_heads], shape)
            targets[f"{at}.self_attn.k_norm.weight"] = _Target(norms[q_heads:], shape)
    return targets


def _target(view: Tensor, scale: Tensor | None = None) -> _Target:
    return _Target(view, tuple(view.shape), scale)


def _linear_targets(num_outputs: dict[str, int], linear: Linear) -> dict[str, _Target]:
    """The checkpoint's linears, named with their numbers of outputs, that are one of ours."""
    targets = {}
    first = 0
    for name, size in num_outputs.items():
        rows = slice(first, first + size)
        scale = None if linear.scale is None else linear.scale[rows]
        targets[f"{name}.weight"] = _target(linear.weight[rows], scale)
        if linear.bias is not None:
            targets[f"{name}.bias"] = _target(linear.bias[rows])
        first += size
    return targets


def _check(model_dir: Path, tensors: dict[str, TensorInfo], targets: dict[str, _Target]) -> None:
    missing = targets.keys() - tensors.keys()
    if missing:
        raise UnsupportedModelError(f"{model_dir}: tensors missing: {_some(missing)}")
    unexpected = {
        name
        for name in tensors.keys() - targets.keys()
        if not name.endswith(".rotary_emb.inv_freq")  # which older exports store
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
    for name, target in targets.items():
        info = tensors[name]
        if isinstance(info, GGUFTensor):
            _fill_from_gguf(target, info)
        else:
            names_by_file[info.file].append(name)
    for file, names in names_by_file.items():
        try:
            with safe_open(file, framework="pt") as weights:
                for name in names:
                    targets[name].fill(weights.get_tensor(tensors[name].name))
        except (OSError, SafetensorError) as error:
            raise UnsupportedModelError(f"{file}: {error}") from error


def _fill_from_gguf(target: _Target, info: GGUFTensor) -> None:
    try:
        for first, plain in read_plain(info):
            tensor = torch.from_numpy(plain)
            is_whole = tensor.shape == target.shape
            (target if is_whole else target.rows(first, len(tensor))).fill(tensor)
    except OSError as error:
        raise UnsupportedModelError(f"{info.file}: {error.strerror or error}") from error


@torch.no_grad()
def _fill_at_random(model: LlamaModel, seed: int) -> None:
    """Norms of one, matrices N(0, 1 / inputs), so that activations and logits stay of order one."""
    generator = torch.Generator(model.embedding.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        elif not name.endswith("scale"):
            scale = (
                model.get_parameter(f"{name.removesuffix('weight')}scale")
                if parameter.dtype in QUANTIZED.values()
                else None
            )
            target = _target(parameter, scale)
            like = torch.empty(  # contiguous: the numbers do not depend on the layout
                parameter.shape,
                dtype=parameter.dtype if scale is None else torch.float32,
                device=parameter.device,
            )
            target.fill(like.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator))


@torch.no_grad()
def _tie_quantized_head(model: LlamaModel) -> None:
    """A tied head in 8 bits is a copy: the embedding is looked up as it is."""
    if model.config.tie_word_embeddings and model.lm_head.scale is not None:
        _target(model.lm_head.weight, model.lm_head.scale).fill(model.embedding)
