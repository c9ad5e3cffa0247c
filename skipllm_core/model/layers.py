"""Small parts of the decoder: weights, RMSNorm, the gated feed-forward, rotary embedding."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from skipllm_core.config import Quantization
from skipllm_core.model.config import ModelConfig, RopeConfig

INT8_MAX = 127
FP8_MAX = 448.0  # of e4m3
# Inputs of int8 weights have 12 bits: exact enough to cost nothing beside the weights' rounding,
# and a sum of 8,192 products stays within 32 bits.
INPUT_MAX = 2047
MEASURED_ROWS = 512  # at a time
QUANTIZED: dict[Quantization, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Place(NamedTuple):
    """Where and how wide the weights are. `quantization` is that of the linears' weights."""

    dtype: torch.dtype
    device: torch.device
    quantization: Quantization = "none"


def weight(*shape: int, place: Place) -> nn.Parameter:
    """An uninitialised parameter; inference only, so without gradient."""
    return nn.Parameter(
        torch.empty(shape, dtype=place.dtype, device=place.device), requires_grad=False
    )


class Linear(nn.Module):
    """x [..., in] -> x W^T + b [..., out].

    `by_inputs`: W [out, in] lies in memory input by input, as the transpose of [in, out]. For a
    linear of which some inputs are left out: what an input needs is one run of memory.

    With quantized weights W = scale * weight, one scale per output. With int8 on the CPU every row
    of x is rounded to 12 bits: x = max |x| / INPUT_MAX * integer. So kernels may multiply in
    integers, exactly. Elsewhere x stays as it is.
    """

    def __init__(
        self, in_size: int, out_size: int, *, bias: bool, place: Place, by_inputs: bool = False
    ) -> None:
        super().__init__()
        is_quantized = place.quantization in QUANTIZED
        dtype = QUANTIZED.get(place.quantization, place.dtype)
        shape = (in_size, out_size) if by_inputs else (out_size, in_size)
        stored = weight(*shape, place=place._replace(dtype=dtype))
        self.weight = nn.Parameter(stored.t(), requires_grad=False) if by_inputs else stored
        scale_place = place._replace(dtype=torch.float32)
        self.scale = weight(out_size, place=scale_place) if is_quantized else None
        self.bias = weight(out_size, place=place) if bias else None
        self.rounds_inputs = place.quantization == "int8" and place.device.type == "cpu"

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        # 8 bits are exact in x's dtype; the product is rounded once, without a copy in float32.
        dequantized = torch.empty_like(self.weight, dtype=x.dtype)
        torch.mul(self.weight.to(x.dtype), self.scale[:, None], out=dequantized)
        return F.linear(_rounded_rows(x) if self.rounds_inputs else x, dequantized, self.bias)


def quantize(weight: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """weight [out, in] in `dtype` (int8 or float8_e4m3fn) [out, in] and float32 scales [out],
    symmetric, one per output."""
    largest = INT8_MAX if dtype == torch.int8 else FP8_MAX
    scale = (weight.abs().amax(dim=-1) / largest).float()
    scaled = weight.float() / scale.clamp_min(torch.finfo(scale.dtype).tiny)[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def _rounded_rows(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True) / INPUT_MAX
    return (x / scale.clamp_min(torch.finfo(x.dtype).tiny)).round() * scale


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, then times the weight.

    The quotient is taken in fp32 and rounded to x's dtype before the weight is applied, as the
    families' reference code does. A weight of several rows gives each head its own.
    """

    def __init__(self, *shape: int, eps: float, place: Place) -> None:
        super().__init__()
        self.weight = weight(*shape, place=place)
        self._size = (shape[-1],)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self._size, eps=self.eps)
        return normed.to(x.dtype).mul_(self.weight)


class FeedForward(nn.Module):
    """SwiGLU: x [num_rows, hidden] -> W_down(silu(W_gate x) * W_up x).

    Gate and up are one linear. What a neuron has of the three matrices are three runs of memory:
    its rows of gate and up, and its column of down. `down_norms` [inner] float32: the length of
    that column, which is what a neuron can add to the residual. Whoever fills the weights fills it
    (`measure_down`).
    """

    def __init__(self, config: ModelConfig, *, place: Place) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(hidden, 2 * inner, bias=bias, place=place)
        self.down = Linear(inner, hidden, bias=bias, place=place, by_inputs=True)
        self.down_norms = torch.empty(inner, dtype=torch.float32, device=place.device)

    def measure_down(self) -> None:
        """Sets `down_norms`, a part of the matrix at a time."""
        weight, scale = self.down.weight, self.down.scale
        squares = torch.zeros_like(self.down_norms)
        for first in range(0, weight.shape[0], MEASURED_ROWS):
            part = weight[first : first + MEASURED_ROWS].float()
            if scale is not None:
                part = part * scale[first : first + MEASURED_ROWS, None]
            squares += part.square().sum(dim=0)
        self.down_norms.copy_(squares.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return cast(Tensor, self.down(F.silu(gate).mul_(up)))


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2] float32 on the CPU.

    Sources: RoFormer (arXiv 2104.09864); linear: position interpolation (2306.15595); yarn:
    2309.00071, section 3.2; llama3: the Llama 3.1 release, smooth between two wavelengths;
    longrope: 2402.13753, section 3.2.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    slow = plain / rope.factor
    context = rope.original_max_position_embeddings
    if rope.type == "default":
        return plain
    if rope.type == "linear":
        return slow
    if rope.type == "longrope":
        return plain / torch.tensor(rope.divisors, dtype=torch.float32)
    if rope.type == "llama3":
        # Turns within the original context; few turns: interpolate, many: leave as they are.
        turns = context * plain / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return slow * (1 - keep) + plain * keep

    def dimension_of(turns: float) -> float:  # the pair of dimensions that makes so many turns
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    keep = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return slow * (1 - keep) + plain * keep


class Rotary:
    """Rotates queries and keys by their position."""

    def __init__(self, config: ModelConfig, *, place: Place) -> None:
        self._frequencies = rope_frequencies(config.rope, config.head_dim).to(place.device)
        self._scale = config.rope.attention_factor
        self._dtype = place.dtype

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """For positions [num_tokens]: cos and signed sin, each [num_tokens, 1, head_dim].

        The sine of the first half is negated, so that rotating is x * cos + swap_halves(x) * sin.
        """
        angles = positions[:, None, None].float() * self._frequencies
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        return (
            torch.cat((cos, cos), dim=-1).to(self._dtype),
            torch.cat((-sin, sin), dim=-1).to(self._dtype),
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [num_tokens, num_heads, head_dim] rotated by `Rotary.cos_sin` of its positions."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
