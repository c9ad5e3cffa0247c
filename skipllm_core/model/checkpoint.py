"""The files of a checkpoint, read as if their author meant harm. No torch here.

Safetensors layout: 8 bytes little-endian N, N bytes of JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from skipllm_core.errors import UnsupportedModelError

_MAX_JSON_BYTES = 32 * 2**20
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file; its bytes are `start .. end - 1` of the file."""

    file: Path
    name: str  # there
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UnsupportedModelError when it is none, or unreasonably large."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise UnsupportedModelError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
        return parse_json_object(path.read_bytes(), path)
    except OSError as error:
        raise UnsupportedModelError(f"{path}: {error.strerror or error}") from error


def parse_json_object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path}: not a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that hold the weights: the single one, or else those of the index, as
    transformers has it.

    Raises UnsupportedModelError when there are none (pickles do not count: unpickling runs code)
    or when the index points out of the directory.
    """
    index = model_dir / INDEX
    single = model_dir / SINGLE
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UnsupportedModelError(f"{index}: no weight_map")
        return [
            model_dir / name
            for name in sorted({_plain_name(n, index) for n in weight_map.values()})
        ]
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt*")):
        raise UnsupportedModelError(
            f"{model_dir}: only pickled weights (.bin, .pt), which run code when loaded; "
            "convert them to safetensors"
        )
    raise UnsupportedModelError(f"{model_dir}: no weights: neither {SINGLE} nor {INDEX}")


def _plain_name(name: object, index: Path) -> str:
    if (
        not isinstance(name, str)
        or name != Path(name).name
        or "\\" in name
        or not name.endswith(".safetensors")
    ):
        raise UnsupportedModelError(
            f"{index}: weight_map names {name!r:.100}, which is not a .safetensors file beside it"
        )
    return name


def read_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint by name, from the files' headers, which are checked against
    the files' sizes."""
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(model_dir):
        for name, info in _read_header(file).items():
            if name in tensors:
                raise UnsupportedModelError(
                    f"{file}: tensor {name!r:.200} is also in {tensors[name].file.name}"
                )
            tensors[name] = info
    return tensors


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_size > min(size - 8, _MAX_JSON_BYTES):
                raise UnsupportedModelError(f"{file}: truncated, or not a safetensors file")
            header = parse_json_object(stream.read(header_size), file)
    except OSError as error:
        raise UnsupportedModelError(f"{file}: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    data_start = 8 + header_size
    tensors = {name: _tensor_info(file, name, entry, data_start) for name, entry in header.items()}
    end = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != end:
            raise UnsupportedModelError(f"{file}: malformed header (gaps or overlapping tensors)")
        end = info.end
    if end != size:
        raise UnsupportedModelError(
            f"{file}: truncated or padded: its header describes {end} bytes, the file has {size}"
        )
    return tensors


def _tensor_info(file: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    malformed = UnsupportedModelError(f"{file}: malformed header entry for tensor {name!r:.200}")
    if not isinstance(entry, dict):
        raise malformed
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise malformed
    if dtype not in _DTYPE_BYTES:
        raise UnsupportedModelError(
            f"{file}: tensor {name!r:.200} has dtype {dtype!r:.20}; supported: "
            f"{', '.join(_DTYPE_BYTES)} (quantised checkpoints are not)"
        )
    start, end = offsets
    if end - start != math.prod(shape) * _DTYPE_BYTES[dtype]:
        raise malformed
    return TensorInfo(file, name, dtype, tuple(shape), data_start + start, data_start + end)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)
