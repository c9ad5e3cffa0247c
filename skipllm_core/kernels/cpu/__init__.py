"""The decode step's parts on the CPU, in C: weights are read once, at the memory's speed.

`CpuDecoder` does what `Block.attend`, `Block.feed_forward` and `LlamaModel.head` do, which are its
oracle, for float32 models, weights in int8 included. A row is one token: of a sequence that is
decoded, or of a short piece of a prompt, whose tokens are neighbouring rows. The results of a row
are the same bits whatever other rows its step has.

The C code is built when the package is installed and a C compiler is there; `is_available` tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.layers import Linear
from skipllm_core.model.llama import LlamaModel
from skipllm_core.skip.neurons import NeuronCounts

if TYPE_CHECKING:
    from skipllm_core.kernels.cpu import _decoder as _native
else:
    try:
        from skipllm_core.kernels.cpu import _decoder as _native
    except ImportError:  # no C compiler when the package was installed
        _native = None


def is_available() -> bool:
    """Whether the C code was built."""
    return _native is not None


class CpuDecoder:
    """The layers of a model on the CPU, over the rows of one step after the other.

        begin(...); for each layer: attend(layer), feed_forward(layer, ...); logits()

    Holds the residual h [num_rows, hidden] between the calls. Not thread-safe.
    """

    def __init__(
        self,
        model: LlamaModel,
        kv_cache: KVCache,
        *,
        max_num_rows: int,
        max_model_len: int,
        num_threads: int,
    ) -> None:
        assert is_available()
        config = model.config
        max_blocks = -(-max_model_len // kv_cache.block_size)
        cos, sin = model.rotary.cos_sin(torch.arange(max_blocks * kv_cache.block_size))
        half = config.head_dim // 2  # of cos_sin's halves, one says all: the sine's second is +sin
        self.num_layers = config.num_layers
        self.max_num_rows = max_num_rows
        self._num_rows = 0
        self._vocab_size = config.vocab_size
        self._kept_alive = (
            model,
            kv_cache,
            cos[:, 0, :half].contiguous(),
            sin[:, 0, half:].contiguous(),
        )
        self._decoder = _native.Decoder(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=kv_cache.block_size,
            num_blocks=kv_cache.num_blocks,
            max_blocks=max_blocks,
            max_rows=max_num_rows,
            num_layers=config.num_layers,
            num_threads=num_threads,
            eps=config.rms_norm_eps,
            cos=_address(self._kept_alive[2]),
            sin=_address(self._kept_alive[3]),
            embedding=_address(model.embedding),
            norm=_address(model.norm.weight),
            head=_linear(model.lm_head),
        )
        for layer, block in enumerate(model.blocks):
            attention = block.attention
            self._decoder.set_layer(
                layer=layer,
                norm1=_address(block.norm1.weight),
                norm2=_address(block.norm2.weight),
                qk_norm=_address(attention.qk_norm.weight) if attention.qk_norm else 0,
                qkv=_linear(attention.qkv),
                o=_linear(attention.o),
                gate_up=_linear(block.ffn.gate_up),
                down=_linear(block.ffn.down, by_inputs=True),
                down_norms=_address(block.ffn.down_norms),
                keys=_address(kv_cache.keys[layer]),
                values=_address(kv_cache.values[layer]),
                window=attention.window or 0,
            )

    @property
    def instructions(self) -> str:
        """The instruction set in use: avx512, avx2, or base for what every machine has."""
        return self._decoder.instructions

    def begin(
        self, token_ids: list[int], positions: list[int], block_tables: list[list[int]]
    ) -> None:
        """h = embed(token_ids); a row's token stands at its position, its blocks have room for it
        and hold K and V of those before that are not rows of this step."""
        assert token_ids, "a step has rows"
        self._decoder.begin(token_ids, positions, block_tables)
        self._num_rows = len(token_ids)  # after it: a step that is refused leaves the one before

    def attend(self, layer: int) -> None:
        """h += Attn(norm1(h)) for all rows; writes their K and V."""
        self._decoder.attend(layer)

    def feed_forward(self, layer: int, rows: list[int] | None) -> None:
        """h += FFN(norm2(h)) for `rows`, ascending; None: all."""
        self._decoder.feed_forward(layer, rows)

    def feed_forward_watched(self, layer: int, rows: list[int] | None) -> list[float]:
        """`feed_forward`, and for every row of the step the cosine of h before and after: 1 where
        it did not run."""
        return self._decoder.feed_forward_watched(layer, rows)

    def feed_forward_neurons(
        self,
        layer: int,
        rows: list[int] | None,
        thresholds: list[tuple[float, float]],
        *,
        is_joint: bool,
        is_watched: bool,
    ) -> tuple[NeuronCounts, list[float] | None]:
        """`feed_forward` without the neurons below a row's thresholds (those of all rows of the
        step, before up and before down), and what was left out; where it `is_watched`, what
        `feed_forward_watched` tells, too. Weights that no row wants are not read."""
        before_up, before_down, unread_up, unread_down, similarities = (
            self._decoder.feed_forward_neurons(layer, rows, thresholds, is_joint, is_watched)
        )
        return NeuronCounts(before_up, before_down, unread_up, unread_down), similarities

    def logits(self, rows: list[int] | None = None) -> Tensor:
        """head(h) of `rows` (None: all): [number of rows, vocab] float32."""
        num_rows = self._num_rows if rows is None else len(rows)
        logits = torch.empty(num_rows, self._vocab_size, dtype=torch.float32)
        if num_rows:
            self._decoder.head(rows, logits.data_ptr())
        return logits


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    assert tensor.dtype == torch.float32
    return tensor.data_ptr()


def _linear(linear: Linear, *, by_inputs: bool = False) -> tuple[int, int, int, int, int]:
    weight, scale, bias = linear.weight, linear.scale, linear.bias
    assert (weight.t() if by_inputs else weight).is_contiguous()
    assert weight.dtype == (torch.float32 if scale is None else torch.int8)
    num_outputs, num_inputs = weight.shape
    return (
        weight.data_ptr(),
        0 if scale is None else _address(scale),
        0 if bias is None else _address(bias),
        num_outputs,
        num_inputs,
    )
