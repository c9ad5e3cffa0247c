"""Headers that lie are found out: one line, at once, and nothing is allocated on their word."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipllm_core.errors import UnsupportedModelError
from skipllm_core.model.gguf.header import KINDS, read_header
from skipllm_core.model.hub import resolve_model
from tests.model.checkpoints import make_oracle
from tests.model.gguf.files import write_gguf

HUGE = 2**60
U32, STRING, ARRAY, BOOL = 4, 8, 9, 7


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: bytes, length: int | None = None) -> bytes:
    return u64(len(text) if length is None else length) + text


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = b"".join(map(u64, shape))
    return string(name) + u32(len(shape)) + dims + u32(kind) + u64(offset)


def file_of(
    *entries: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None
) -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(entries))
    head = b"GGUF" + u32(3) + u64(num_tensors) + u64(num_keys) + b"".join((*entries, *tensors))
    return head + bytes(-len(head) % 32) + bytes(256)


ALIGNED = b"general.alignment"
HOSTILE = {
    "empty": (b"", "not a GGUF file"),
    "another format": (b"\x93NUMPY" + bytes(100), "not a GGUF file"),
    "only the magic": (b"GGUF", "truncated"),
    "version 1": (b"GGUF" + u32(1) + bytes(50), "of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(50), "is big-endian"),
    "2^60 tensors": (file_of(counts=(HUGE, 0)), "announces 1152921504606846976 tensors"),
    "2^60 keys": (file_of(counts=(0, HUGE)), "announces 1152921504606846976 keys"),
    "more keys than there are": (file_of(counts=(0, 9)), "type 0|truncated|appears twice"),
    "a name of 2^60 bytes": (file_of(string(b"a", HUGE) + bytes(9)), "truncated"),
    "a name of 2^64 - 1 bytes": (file_of(string(b"a", 2**64 - 1) + bytes(9)), "truncated"),
    "a string of 2^60 bytes": (file_of(key(b"a", STRING, string(b"", HUGE))), "truncated"),
    "an array of 2^60 numbers": (file_of(key(b"a", ARRAY, u32(U32) + u64(HUGE))), "announces"),
    "an array of 2^60 strings": (file_of(key(b"a", ARRAY, u32(STRING) + u64(HUGE))), "announces"),
    "an array that is cut": (file_of(key(b"a", ARRAY, u32(U32) + u64(2**20))), "truncated"),
    "strings that are cut": (file_of(key(b"a", ARRAY, u32(STRING) + u64(2**20))), "truncated"),
    "an array of arrays": (
        file_of(key(b"a", ARRAY, u32(ARRAY) + u64(1) + u32(ARRAY) + u64(1))),
        "an array of type 9",
    ),
    "an unknown type": (file_of(key(b"a", 13, bytes(8))), "unknown type 13"),
    "an array of an unknown type": (file_of(key(b"a", ARRAY, u32(99) + u64(1))), "type 99"),
    "a bool that is neither": (file_of(key(b"a", BOOL, b"\x02")), "neither true nor false"),
    "a name that is no text": (file_of(key(b"\xff\xfe", U32, u32(1))), "is not UTF-8"),
    "a key twice": (
        file_of(key(b"a", U32, u32(1)), key(b"a", U32, u32(2))),
        "key 'a' appears twice",
    ),
    "alignment 0": (file_of(key(ALIGNED, U32, u32(0))), "alignment is 0, not a power of two"),
    "alignment 24": (file_of(key(ALIGNED, U32, u32(24))), "alignment is 24"),
    "alignment as text": (file_of(key(ALIGNED, STRING, string(b"32"))), "alignment is '32'"),
    "a tensor twice": (
        file_of(tensors=(tensor(b"a", (2,)), tensor(b"a", (2,), offset=32))),
        "tensor 'a' appears twice",
    ),
    "tensors that overlap": (
        file_of(tensors=(tensor(b"a", (16,)), tensor(b"b", (2,), offset=32))),
        "tensor 'b' overlaps another",
    ),
    "an offset beyond the end": (
        file_of(tensors=(tensor(b"a", (2,), offset=HUGE),)),
        "truncated: tensor 'a' ends at byte",
    ),
    "an offset that is not aligned": (
        file_of(tensors=(tensor(b"a", (2,), offset=8),)),
        "starts at no multiple of 32",
    ),
    "more numbers than bytes": (file_of(tensors=(tensor(b"a", (2**20,)),)), "truncated: tensor"),
    "sizes that overflow": (
        file_of(tensors=(tensor(b"a", (2**32, 2**32, 2**32)),)),
        "truncated: tensor",
    ),
    "a size of 2^63": (file_of(tensors=(tensor(b"a", (2**63,)),)), "has shape"),
    "a size of 0": (file_of(tensors=(tensor(b"a", (0, 4)),)), r"has shape \[4, 0\]"),
    "no dimensions": (file_of(tensors=(tensor(b"a", ()),)), "has 0 dimensions"),
    "2^32 - 1 dimensions": (
        file_of(string(b"a") + u32(2**32 - 1), counts=(1, 0)),
        "has 4294967295 dimensions",
    ),
    "a kind that is not supported": (
        file_of(tensors=(tensor(b"a", (256,), kind=10),)),
        "tensor 'a' is of kind Q2_K; supported: F32, F16, Q4_0, .*, Q6_K, BF16",
    ),
    "a kind that nobody knows": (
        file_of(tensors=(tensor(b"a", (256,), kind=4000),)),
        "is of kind 4000; supported: F32",
    ),
    "rows that are no whole blocks": (
        file_of(tensors=(tensor(b"a", (33,), kind=2),)),
        "rows of 33, no multiple of Q4_0's blocks of 32",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_one_line_in_no_time_and_no_memory(tmp_path: Path, what: str) -> None:
    content, message = HOSTILE[what]
    file = tmp_path / "hostile.gguf"
    file.write_bytes(content)
    _ = KINDS, gguf.GGMLQuantizationType  # imported before the clock runs
    tracemalloc.start()
    started_s = time.process_time()
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        resolve_model(str(file))
    took_s = time.process_time() - started_s
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took_s < 1
    assert peak < 2**20
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"x\.gguf: No such file"):
        read_header(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModelError, match="Is a directory"):
        read_header(tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("good") / "model.gguf"
    return write_gguf(file, make_oracle("llama2", num_hidden_layers=1)).read_bytes()


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path, good: bytes) -> None:
    file = tmp_path / "cut.gguf"
    for end in [*range(200), *range(200, len(good), 997), len(good) - 33]:
        file.write_bytes(good[:end])
        with pytest.raises(UnsupportedModelError):
            read_header(file)


def check_line(read: Callable[[Any], object], file: Path) -> None:
    """It reads the file, or raises what the commands tell in one line."""
    told = ""
    try:
        read(str(file) if read is resolve_model else file)
    except UnsupportedModelError as error:
        told = str(error)
    assert "\n" not in told


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_anywhere_is_a_line_or_a_model(
    tmp_path: Path, good: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(good)
    header = good.rindex(b"output_norm.weight")  # up to there, keys and the list of tensors
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header))
        new = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=12),
                st.sampled_from([u64(HUGE), u64(2**64 - 1), u32(0), u64(2**31), u32(9), u64(1)]),
            )
        )
        damaged[at : at + len(new)] = new
    file = tmp_path / "damaged.gguf"
    file.write_bytes(damaged)
    check_line(resolve_model, file)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=300), head=st.sampled_from([b"", b"GGUF" + u32(3)]))
def test_anything_at_all_is_a_line(content: bytes, head: bytes, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path_factory.getbasetemp() / "anything.gguf"
    file.write_bytes(head + content)
    check_line(read_header, file)


def test_the_largest_header_that_is_read_takes_less_than_a_second(tmp_path: Path) -> None:
    """As many strings as are read at all, each of them empty."""
    file = tmp_path / "strings.gguf"
    many = key(b"a", ARRAY, u32(STRING) + u64(2**21) + bytes(8 * 2**21))
    file.write_bytes(file_of(many, tensors=(tensor(b"t", (2**20,)),)))
    started_s = time.process_time()
    with pytest.raises(UnsupportedModelError, match="truncated: tensor"):
        read_header(file)
    assert time.process_time() - started_s < 1


def test_a_header_larger_than_any_real_one_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "large.gguf"
    size = 2**27
    head = b"GGUF" + u32(3) + u64(0) + u64(1) + string(b"a") + u32(STRING) + u64(size)
    file.write_bytes(head)
    os.truncate(file, len(head) + size)  # a hole: no disk is used
    with pytest.raises(UnsupportedModelError, match="larger than 67108864 bytes"):
        read_header(file)


def test_values_of_every_type_are_those_that_were_written(tmp_path: Path) -> None:
    file = tmp_path / "values.gguf"
    written = {
        "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 2**32 - 1,
        "int32": -(2**31), "uint64": 2**63, "int64": -(2**63), "float32": 0.5, "float64": 0.1,
        "bool": True, "string": "naïve 😀", "array": [1, -2, 3],
    }  # fmt: skip
    writer = GGUFWriter(file, "llama")
    for name, value in written.items():
        getattr(writer, f"add_{name}")(f"test.{name}", value)
    writer.add_array("test.flags", [True, False])
    writer.add_array("test.texts", ["", "a", "é"])
    writer.add_key_value("test.floats", [0.25, 2.0], GGUFValueType.ARRAY)
    writer.add_custom_alignment(64)
    writer.add_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(file)
    for name, value in written.items():
        assert header.values[f"test.{name}"] == value
    assert header.values["test.flags"] == [True, False]
    assert header.values["test.texts"] == ["", "a", "é"]
    assert header.values["test.floats"] == [0.25, 2.0]
    theirs = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert header.tensors.keys() == theirs.keys()
    for name, stored in header.tensors.items():
        assert stored.start == theirs[name].data_offset
        assert stored.end - stored.start == theirs[name].n_bytes
        assert list(stored.shape) == theirs[name].shape.tolist()[::-1]
        assert stored.kind.name == theirs[name].tensor_type.name


def test_the_sizes_of_blocks_are_those_of_the_gguf_package() -> None:
    for number, kind in KINDS.items():
        assert GGMLQuantizationType(number).name == kind.name
        sizes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        assert sizes == (kind.block_size, kind.block_bytes)
