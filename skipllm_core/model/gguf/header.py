"""The header of a GGUF file (version 2 or 3), read as if its author meant harm. No torch here.

Layout, little-endian; a string is its length (u64) and its bytes:

    "GGUF", version u32, number of tensors u64, number of keys u64
    per key:     name, type u32, value; an array's value is type u32, length u64, items
    per tensor:  name, dimensions u32, size of each u64 (the fastest first), kind u32, offset u64
    padding to a multiple of `general.alignment`; from here offsets count: the tensors' bytes
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipllm_core.errors import UnsupportedModelError

_MAX_HEADER_BYTES = 2**26  # the largest vocabularies take 2**24
_MAX_ITEMS = 2**21  # of all arrays together: a vocabulary, its scores, types and merges
_MAX_ENTRIES = 2**16  # keys, and tensors
_MAX_DIMS = 4
_MAX_SIZE = 2**48  # of one dimension
_DEFAULT_ALIGNMENT = 32

# Types of values. Strings and arrays have no fixed size.
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True)
class Kind:
    """How numbers are stored: in blocks of `block_size` numbers and `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    30: Kind("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the file has it; its bytes are `start .. end - 1` of the file."""

    shape: tuple[int, ...]  # rows first, as everywhere but in GGUF
    kind: Kind
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    path: Path
    values: dict[str, Any]  # int, float, bool, str, or a list of one of them
    tensors: dict[str, StoredTensor]

    def refused(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path}: {reason}")


def read_header(path: Path) -> Header:
    """Keys and tensors of a file. What they promise is checked against the file's size before it is
    believed, so that neither time nor memory is more than the file's own bytes are worth.

    Raises UnsupportedModelError for what is no GGUF file, or a broken or unsupported one.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UnsupportedModelError(f"{path}: not a GGUF file")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnsupportedModelError(f"{path}: {reason}") from error


class _Reader:
    """Goes through a header once, from its start to its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._end = min(self._size, _MAX_HEADER_BYTES)
        self._at = 4
        self._num_items = 0

    def read(self) -> Header:
        version = self._scalar(_U32)
        if version not in (2, 3):
            is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            what = "big-endian" if is_swapped else f"of version {version}"
            raise self._refused(f"the file is {what}; supported: versions 2 and 3, little-endian")
        num_tensors, num_keys = self._scalar(_U64), self._scalar(_U64)
        for count, of in ((num_tensors, "tensors"), (num_keys, "keys")):
            if count > _MAX_ENTRIES:
                raise self._refused(f"announces {count} {of}, at most {_MAX_ENTRIES} are read")
        values: dict[str, Any] = {}
        for _ in range(num_keys):
            name = self._string()
            if name in values:
                raise self._refused(f"key {name!r:.100} appears twice")
            values[name] = self._value(name)
        alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._refused(f"general.alignment is {alignment!r:.40}, not a power of two")
        return Header(self._path, values, self._tensors(num_tensors, alignment))

    def _tensors(self, count: int, alignment: int) -> dict[str, StoredTensor]:
        entries = [self._tensor_entry() for _ in range(count)]
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._refused(f"tensor {name!r:.100} appears twice")
            if offset % alignment:
                raise self._refused(f"tensor {name!r:.100} starts at no multiple of {alignment}")
            size = math.prod(shape) // kind.block_size * kind.block_bytes
            start = data_start + offset
            if start + size > self._size:
                raise self._refused(
                    f"truncated: tensor {name!r:.100} ends at byte {start + size}, the file has "
                    f"{self._size}"
                )
            tensors[name] = StoredTensor(shape, kind, start, start + size)
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise self._refused(f"tensor {name!r:.100} overlaps another")
            end = tensor.end
        return tensors

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], Kind, int]:
        name = self._string()
        num_dims = self._scalar(_U32)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._refused(f"tensor {name!r:.100} has {num_dims} dimensions")
        shape = tuple(self._scalar(_U64) for _ in range(num_dims))[::-1]
        if not all(0 < size < _MAX_SIZE for size in shape):
            raise self._refused(f"tensor {name!r:.100} has shape {list(shape)}")
        number, offset = self._scalar(_U32), self._scalar(_U64)
        kind = KINDS.get(number)
        if kind is None:
            raise self._refused(
                f"tensor {name!r:.100} is of kind {_name_of_kind(number)}; supported: "
                f"{', '.join(kind.name for kind in KINDS.values())}"
            )
        if shape[-1] % kind.block_size:
            raise self._refused(
                f"tensor {name!r:.100} has rows of {shape[-1]}, no multiple of {kind.name}'s "
                f"blocks of {kind.block_size}"
            )
        return name, shape, kind, offset

    def _value(self, name: str) -> Any:
        number = self._scalar(_U32)
        if number == _STRING:
            return self._string()
        if number == _ARRAY:
            return self._array(name)
        if number == _BOOL:
            return self._bools(name, 1)[0]
        scalar = _SCALARS.get(number)
        if scalar is None:
            raise self._refused(f"key {name!r:.100} has a value of unknown type {number}")
        return self._scalar(scalar)

    def _array(self, name: str) -> list[Any]:
        number, count = self._scalar(_U32), self._scalar(_U64)
        self._num_items += count
        if self._num_items > _MAX_ITEMS:
            raise self._refused(
                f"key {name!r:.100} announces {count} items; at most {_MAX_ITEMS} of all arrays "
                "are read"
            )
        if number == _STRING:
            return self._strings(count)
        if number == _BOOL:
            return self._bools(name, count)
        scalar = _SCALARS.get(number)
        if scalar is None:
            raise self._refused(f"key {name!r:.100} is an array of type {number}, which is unknown")
        data = self._bytes(count * scalar.size)
        return list(struct.unpack(f"<{count}{scalar.format[1:]}", data))

    def _bools(self, name: str, count: int) -> list[bool]:
        data = self._bytes(count)
        if data.translate(None, b"\0\1"):
            raise self._refused(f"key {name!r:.100} is neither true nor false")
        return [byte == 1 for byte in data]

    def _strings(self, count: int) -> list[str]:
        """As `_string`, so many times: a loop of its own, for there are hundreds of thousands."""
        data, at, end = self._data, self._at, self._end
        unpack = _U64.unpack_from
        found = []
        for _ in range(count):
            start = at + 8
            if start > end or (at := start + unpack(data, at)[0]) > end:
                raise self._truncated()
            found.append(data[start:at])
        self._at = at
        return [self._decoded(text) for text in found]

    def _string(self) -> str:
        return self._decoded(self._bytes(self._scalar(_U64)))

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._refused(f"{text[:40]!r} is not UTF-8") from None

    def _scalar(self, scalar: struct.Struct) -> Any:
        return scalar.unpack(self._bytes(scalar.size))[0]

    def _bytes(self, count: int) -> bytes:
        start = self._at
        if count > self._end - start:
            raise self._truncated()
        self._at = start + count
        return self._data[start : self._at]

    def _truncated(self) -> UnsupportedModelError:
        if self._end < self._size:
            return self._refused(f"its header is larger than {_MAX_HEADER_BYTES} bytes")
        return self._refused("truncated: its header goes on beyond the end of the file")

    def _refused(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._path}: {reason}")


def _name_of_kind(number: int) -> str:
    from gguf.constants import GGMLQuantizationType  # takes a moment to import, and few need it

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return str(number)
