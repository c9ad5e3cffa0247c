"""Weights of a GGUF file become a model part by part, and a file that breaks meanwhile is told."""

from __future__ import annotations

import tracemalloc
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from skipllm_core.bench.compare import TransformersModel
from skipllm_core.config import LoadFormat
from skipllm_core.errors import ConfigError, UnsupportedModelError
from skipllm_core.model.gguf import tensors
from skipllm_core.model.hub import resolve_model
from skipllm_core.model.loader import load_model
from tests.model.checkpoints import make_oracle
from tests.model.gguf.files import write_gguf

CPU = torch.device("cpu")


def test_beside_the_model_there_are_a_few_megabytes_never_a_whole_tensor(tmp_path: Path) -> None:
    vocab_size, hidden = 60_000, 256
    oracle = make_oracle(
        "llama3_tied", vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=1
    )
    file = write_gguf(tmp_path / "m.gguf", oracle, kind=GGMLQuantizationType.F16)
    model_dir = resolve_model(str(file))
    load_model(model_dir, device=CPU, dtype=torch.float32)  # what is imported is not counted
    tracemalloc.start()
    load_model(model_dir, device=CPU, dtype=torch.float32)  # torch's own memory is not traced
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = vocab_size * hidden * 4
    num_names = 60_000 * 100  # bytes: the header's vocabulary, while it is read
    assert peak < largest / 3 + num_names


@pytest.mark.parametrize("name", ["llama2", "llama_biases", "qwen3"])
def test_many_parts_make_the_same_model_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model_dir = resolve_model(str(write_gguf(tmp_path / "m.gguf", make_oracle(name))))
    whole = dict(load_model(model_dir, device=CPU, dtype=torch.float32).named_parameters())
    monkeypatch.setattr(tensors, "_CHUNK_NUMBERS", 600)  # a head's rows, of 576 numbers
    parts = dict(load_model(model_dir, device=CPU, dtype=torch.float32).named_parameters())
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_eight_bits_of_a_file_are_those_of_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = make_oracle("llama2")
    oracle.save_pretrained(tmp_path / "safetensors")
    expected = load_model(
        tmp_path / "safetensors", device=CPU, dtype=torch.float32, quantization="int8"
    )
    monkeypatch.setattr(tensors, "_CHUNK_NUMBERS", 600)
    model_dir = resolve_model(str(write_gguf(tmp_path / "m.gguf", oracle)))
    found = load_model(model_dir, device=CPU, dtype=torch.float32, quantization="int8")
    theirs = dict(expected.named_parameters())
    for name, weight in found.named_parameters():
        assert torch.equal(weight, theirs[name]), name


def test_a_file_that_is_cut_or_gone_when_it_is_loaded_is_one_line(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", make_oracle("llama2"))
    model_dir = resolve_model(str(file))
    data = file.read_bytes()
    file.write_bytes(data[:-4000])
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf: truncated: tensor"):
        load_model(model_dir, device=CPU, dtype=torch.float32)
    file.unlink()
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf: No such file"):
        load_model(model_dir, device=CPU, dtype=torch.float32)


def test_tensors_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", make_oracle("qwen2"))
    data = file.read_bytes()
    file.write_bytes(data.replace(b"blk.1.attn_norm.weight", b"blk.1.attn_what.weight"))
    with pytest.raises(UnsupportedModelError, match=r"missing: 'model\.layers\.1\.input_layernorm"):
        load_model(resolve_model(str(file)), device=CPU, dtype=torch.float32)
    file.write_bytes(data.replace(b"blk.2.ffn_down.weight", b"blk.1.ffn_down.biases"))
    with pytest.raises(UnsupportedModelError, match=r"missing: 'model\.layers\.2\.mlp\.down_proj"):
        load_model(resolve_model(str(file)), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(("load_format", "is_told"), [("gguf", False), ("safetensors", True)])
def test_a_load_format_is_what_is_loaded_or_told(
    tmp_path: Path, load_format: LoadFormat, is_told: bool
) -> None:
    model_dir = resolve_model(str(write_gguf(tmp_path / "m.gguf", make_oracle("llama2"))))
    message = "load format is safetensors, but the model's weights are gguf"
    with pytest.raises(ConfigError, match=message) if is_told else nullcontext():
        load_model(model_dir, device=CPU, dtype=torch.float32, load_format=load_format)
    oracle = make_oracle("llama2")
    oracle.save_pretrained(tmp_path / "other")
    message = "load format is gguf, but the model's weights are safetensors"
    with nullcontext() if is_told else pytest.raises(ConfigError, match=message):
        load_model(tmp_path / "other", device=CPU, dtype=torch.float32, load_format=load_format)


def test_transformers_is_compared_with_on_the_same_file(tmp_path: Path) -> None:
    oracle = make_oracle("llama2")
    model_dir = resolve_model(str(write_gguf(tmp_path / "m.gguf", oracle)))
    theirs = TransformersModel(model_dir, dtype=torch.float32, device=CPU)
    expected = oracle(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax()
    assert theirs.prefill([5, 6, 7])[1] == expected


def test_a_head_of_queries_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", make_oracle("llama2"))
    name = b"llama.attention.head_count\4\0\0\0"
    data = file.read_bytes()
    file.write_bytes(data.replace(name + b"\4", name + b"\7"))
    with pytest.raises(UnsupportedModelError, match="queries of 48 dimensions have no 7"):
        resolve_model(str(file))
