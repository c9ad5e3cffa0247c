"""The weights of a GGUF file: under the names that checkpoints have, and as plain numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skipllm_core.errors import UnsupportedModelError
from skipllm_core.model.checkpoint import TensorInfo
from skipllm_core.model.gguf.header import KINDS, Header, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Plain = NDArray[np.float32]

ROPE_FACTORS = "rope_freqs.weight"  # part of the config
_CHUNK_NUMBERS = 2**20  # that are made plain at a time

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_NAMES_IN_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_rot_embd": "self_attn.rotary_emb.inv_freq",  # which older files store, to no use
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NUMBERS = {kind.name: number for number, kind in KINDS.items()}


@dataclass(frozen=True, slots=True)
class GGUFTensor(TensorInfo):
    """A tensor of a GGUF file. `dtype` is its kind."""

    num_paired_heads: int = 0  # whose rows alternate between the halves of the head; 0: none do


def read_gguf_tensors(path: Path) -> dict[str, TensorInfo]:
    """The weights of a file by the names that checkpoints have; others keep their own.

    Raises UnsupportedModelError as `read_header`.
    """
    header = read_header(path)
    tensors: dict[str, TensorInfo] = {}
    for stored_name, stored in header.tensors.items():
        if stored_name == ROPE_FACTORS:
            continue
        tensors[name_in_checkpoints(stored_name)] = GGUFTensor(
            file=path,
            name=stored_name,
            dtype=stored.kind.name,
            shape=stored.shape,
            start=stored.start,
            end=stored.end,
            num_paired_heads=_num_paired_heads(header, stored_name),
        )
    return tensors


def name_in_checkpoints(name: str) -> str:
    """`blk.7.attn_q.weight` as `model.layers.7.self_attn.q_proj.weight`."""
    if in_block := re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", name):
        layer, part, what = in_block.groups()
        if part == "attn_rot_embd":
            return f"model.layers.{layer}.{_NAMES_IN_BLOCKS[part]}"
        if part in _NAMES_IN_BLOCKS:
            return f"model.layers.{layer}.{_NAMES_IN_BLOCKS[part]}.{what}"
    part, _, what = name.rpartition(".")
    return f"{_NAMES[part]}.{what}" if part in _NAMES else name


def _num_paired_heads(header: Header, name: str) -> int:
    """Llama's rotary embedding turns each dimension of a head with the one half a head further on;
    llama.cpp has the two side by side, so its files have Llama's queries and keys reordered."""
    architecture = header.values.get("general.architecture")
    found = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", name)
    if architecture not in ("llama", "mistral") or found is None:
        return 0
    heads = header.values.get(f"{architecture}.attention.head_count")
    if found[1] == "k":
        heads = header.values.get(f"{architecture}.attention.head_count_kv", heads)
    if isinstance(heads, list):  # of each layer, and equal: config.json was made of it
        heads = heads[0] if heads else 0
    rows = header.tensors[name].shape[0]
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise header.refused(f"tensor {name!r:.100} has {rows} rows for {heads!r:.40} heads")
    return heads


def read_plain(info: GGUFTensor) -> Iterator[tuple[int, Plain]]:
    """The numbers of a tensor, some rows at a time, each part with the number of its first row.

    In memory are a few parts at a time, of `_CHUNK_NUMBERS` each, never a whole matrix. Raises
    UnsupportedModelError where the file ends before the tensor does.
    """
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(_NUMBERS[info.dtype])
    is_vector = len(info.shape) == 1
    num_rows = 1 if is_vector else info.shape[0]
    row_numbers = math.prod(info.shape) // num_rows
    row_bytes = (info.end - info.start) // num_rows
    head_rows = info.shape[0] // info.num_paired_heads if info.num_paired_heads else 1
    together = 1 if is_vector else head_rows
    step = max(_CHUNK_NUMBERS // (row_numbers * together), 1) * together
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        for first in range(0, num_rows, step):
            rows = min(step, num_rows - first)
            data = bytearray(rows * row_bytes)
            if stream.readinto(data) < len(data):
                raise UnsupportedModelError(f"{info.file}: truncated in tensor {info.name!r:.100}")
            plain = dequantize(np.frombuffer(data, np.uint8).reshape(rows, row_bytes), kind)
            plain = plain.reshape(info.shape if is_vector else (rows, *info.shape[1:]))
            if info.num_paired_heads:  # [heads, half, 2, ...] -> [heads, 2, half, ...]
                pairs = plain.reshape(-1, head_rows // 2, 2, *info.shape[1:])
                plain = pairs.swapaxes(1, 2).reshape(plain.shape)
            yield first, plain
