from typing import TypeAlias

# (weight, scale or 0, bias or 0, num_outputs, num_inputs): addresses and sizes, see decoder.h
_Linear: TypeAlias = tuple[int, int, int, int, int]

class Decoder:
    def __init__(
        self,
        *,
        hidden: int,
        inner: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        num_blocks: int,
        max_blocks: int,
        max_rows: int,
        num_layers: int,
        num_threads: int,
        eps: float,
        cos: int,
        sin: int,
        embedding: int,
        norm: int,
        head: _Linear,
    ) -> None: ...
    @property
    def instructions(self) -> str: ...
    def set_layer(
        self,
        *,
        layer: int,
        norm1: int,
        norm2: int,
        qk_norm: int,
        qkv: _Linear,
        o: _Linear,
        gate_up: _Linear,
        down: _Linear,
        down_norms: int,
        keys: int,
        values: int,
        window: int,
    ) -> None: ...
    def begin(
        self, token_ids: list[int], positions: list[int], block_tables: list[list[int]], /
    ) -> None: ...
    def attend(self, layer: int, /) -> None: ...
    def feed_forward(self, layer: int, rows: list[int] | None, /) -> None: ...
    def feed_forward_watched(self, layer: int, rows: list[int] | None, /) -> list[float]: ...
    def feed_forward_neurons(
        self,
        layer: int,
        rows: list[int] | None,
        thresholds: list[tuple[float, float]],
        is_joint: bool,
        is_watched: bool,
        /,
    ) -> tuple[list[int], list[int], int, int, list[float] | None]: ...
    def head(self, rows: list[int] | None, logits: int, /) -> None: ...
