"""Checkpoints load whole or not at all, and one clear line says why not."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from skipllm_core.errors import UnsupportedModelError
from skipllm_core.model.config import load_model_config
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.loader import load_model, resolve_dtype
from tests.model.checkpoints import CHECKPOINTS, save_checkpoint

CPU = torch.device("cpu")
WHOLE = "model-00002-of-00002.safetensors"
SHARD = "model-00001-of-00002.safetensors"


def load(model_dir: Path, **options: Any) -> LlamaModel:
    return load_model(model_dir, **{"device": CPU, "dtype": torch.float32, **options})


def weights_of(model: LlamaModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model")


def test_a_sharded_checkpoint_is_the_single_one(model_dir: Path, tmp_path: Path) -> None:
    sharded = save_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    single = weights_of(load(model_dir))
    for name, weight in weights_of(load(sharded)).items():
        assert torch.equal(weight, single[name])


def test_a_loaded_model_is_for_inference_only(model_dir: Path) -> None:
    model = load(model_dir)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_16_bit_checkpoint_is_widened_exactly(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halves, file)
    model = load(model_dir)
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight, halves["model.norm.weight"].float())


def test_a_tied_head_is_one_tensor_and_may_be_stored_twice(tmp_path: Path) -> None:
    model_dir = save_checkpoint(tmp_path / "model", "llama3_tied")
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, file)
    model = load(model_dir)
    assert model.lm_head.weight is model.embedding


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_differs_from_the_embedding_is_used_though_the_config_ties_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scale: float, dtype: torch.dtype
) -> None:
    model_dir = save_checkpoint(tmp_path / "model", "llama3_tied")
    file = model_dir / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1] *= scale  # the last row of many
    save_file({**tensors, "lm_head.weight": head}, file, metadata={"format": "pt"})
    model = load(model_dir)
    is_tied = scale == 1.0
    assert (model.lm_head.weight is model.embedding) == is_tied
    assert model.config.tie_word_embeddings == is_tied
    assert torch.equal(model.lm_head.weight, head.float())
    assert len(caplog.messages) == (not is_tied)
    reference = transformers.LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    assert torch.equal(reference.lm_head.weight, model.lm_head.weight)
    assert torch.equal(reference.model.embed_tokens.weight, model.embedding)


def test_a_tied_head_may_be_stored_under_its_other_name(tmp_path: Path) -> None:
    model_dir = save_checkpoint(tmp_path / "model", "llama3_tied")
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, file, metadata={"format": "pt"})
    model = load(model_dir)
    assert model.lm_head.weight is model.embedding
    assert torch.equal(model.embedding, embedding)


def test_a_head_of_another_shape_is_refused_though_it_is_tied(tmp_path: Path) -> None:
    model_dir = save_checkpoint(tmp_path / "model", "llama3_tied")
    file = model_dir / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.ones(9, 48)}, file)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight has shape \[9, 48\]"):
        load(model_dir)


def test_a_differing_head_is_quantized_from_its_own_weights(tmp_path: Path) -> None:
    model_dir = save_checkpoint(tmp_path / "model", "llama3_tied")
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    head = 3 * tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head}, file)
    found = load(model_dir, quantization="int8").lm_head
    assert found.scale is not None
    torch.testing.assert_close(found.weight * found.scale[:, None], head, atol=0.05, rtol=0)


def test_one_file_beside_an_index_is_the_checkpoint_as_to_transformers(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stale = save_checkpoint(tmp_path / "stale", seed=1, max_shard_size="100KB")
    for file in stale.glob("model*"):
        (model_dir / file.name).write_bytes(file.read_bytes())
    model = load(model_dir)
    reference = transformers.LlamaForCausalLM.from_pretrained(model_dir)
    assert torch.equal(model.embedding, reference.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)
    (told,) = caplog.messages
    assert told.endswith("those of model.safetensors, not of model.safetensors.index.json")


# -- refusals: what is broken, and the words that tell


def edit_tensors(
    model_dir: Path, edit: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors"
) -> None:
    tensors = load_file(model_dir / file)
    edit(tensors)
    save_file(tensors, model_dir / file)


def edit_header(model_dir: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the JSON at the head of the file and leaves the data as they are."""
    file = model_dir / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def drop_a_tensor(model_dir: Path) -> None:
    edit_tensors(model_dir, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def add_a_tensor(model_dir: Path) -> None:
    edit_tensors(model_dir, lambda t: t.update({"model.layers.1.adapter.weight": torch.ones(3)}))


def reshape_a_tensor(model_dir: Path) -> None:
    edit_tensors(model_dir, lambda t: t.update({"model.norm.weight": torch.ones(49)}))


def quantise_a_tensor(model_dir: Path) -> None:
    edit_tensors(
        model_dir, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)})
    )


def truncate(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def truncate_in_the_header(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def empty_the_file(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes(b"")


def announce_a_huge_header(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")


def nest_the_header_deeply(model_dir: Path) -> None:
    text = b'{"a":' * 200_000
    (model_dir / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def overlap_two_tensors(model_dir: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        norm = header["model.layers.0.input_layernorm.weight"]
        header["model.layers.1.input_layernorm.weight"]["data_offsets"] = norm["data_offsets"]

    edit_header(model_dir, edit)


def negative_offsets(model_dir: Path) -> None:
    edit_header(model_dir, lambda h: h["model.norm.weight"].update(data_offsets=[-192, 0]))


def negative_shape(model_dir: Path) -> None:
    edit_header(model_dir, lambda h: h["model.norm.weight"].update(shape=[-6, -8]))


def leave_only_pickles(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")


def leave_no_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()


def index_with(weight_map: object) -> Callable[[Path], None]:
    def write(model_dir: Path) -> None:
        index = model_dir / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        (model_dir / "model.safetensors").rename(model_dir / WHOLE)

    return write


def index_that_names_an_absent_file(model_dir: Path) -> None:
    index_with({"model.norm.weight": SHARD})(model_dir)


def repeat_a_tensor_in_a_second_file(model_dir: Path) -> None:
    save_file({"model.norm.weight": torch.ones(48)}, model_dir / SHARD)
    index_with({"a": WHOLE, "b": SHARD})(model_dir)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_a_tensor, r"tensors missing: 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (add_a_tensor, r"unexpected tensors: 'model\.layers\.1\.adapter\.weight'"),
        (reshape_a_tensor, r"model\.norm\.weight has shape \[49\], config\.json asks for \[48\]"),
        (quantise_a_tensor, r"model\.norm\.weight' has dtype 'I8'; supported"),
        (truncate, "truncated or padded"),
        (truncate_in_the_header, "truncated, or not a safetensors file"),
        (empty_the_file, "truncated, or not a safetensors file"),
        (announce_a_huge_header, "truncated, or not a safetensors file"),
        (nest_the_header_deeply, "not valid JSON"),
        (overlap_two_tensors, "gaps or overlapping tensors"),
        (negative_offsets, r"malformed header entry for tensor 'model\.norm\.weight'"),
        (negative_shape, r"malformed header entry for tensor 'model\.norm\.weight'"),
        (leave_only_pickles, "only pickled weights"),
        (leave_no_weights, "no weights"),
        (index_with({}), "no weight_map"),
        (index_with(["model.safetensors"]), "no weight_map"),
        (index_with({"a": "../../x.safetensors"}), r"weight_map names '\.\./\.\./x"),
        (index_with({"a": "/etc/x.safetensors"}), "weight_map names '/etc/x"),
        (index_with({"a": "..\\x.safetensors"}), "weight_map names"),
        (index_with({"a": "pytorch_model.bin"}), r"weight_map names 'pytorch_model\.bin'"),
        (index_with({"a": 3}), "weight_map names 3"),
        (index_that_names_an_absent_file, "No such file"),
        (repeat_a_tensor_in_a_second_file, "is also in"),
    ],
)
def test_damage_is_refused_in_one_line(
    model_dir: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(model_dir)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load(model_dir)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_config_that_promises_a_giant_is_refused_before_it_is_allocated(model_dir: Path) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 2**24}))
    with pytest.raises(UnsupportedModelError, match=r"config\.json asks for"):
        load(model_dir)


# -- dummy weights


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_dummy_weights_need_only_a_config_and_have_a_sensible_scale(
    tmp_path: Path, name: str
) -> None:
    model_dir = save_checkpoint(tmp_path / "model", name)
    (model_dir / "model.safetensors").unlink()
    model = load(model_dir, load_format="dummy", seed=3)
    for weight in model.parameters():
        assert (weight != 0).all()
    logits = model.head(model.embed(torch.arange(100)))
    assert 0.3 < logits.std() < 3


def test_dummy_weights_follow_their_seed(model_dir: Path) -> None:
    first, again, other = (load(model_dir, load_format="dummy", seed=s) for s in (1, 1, 2))
    assert torch.equal(first.embedding, again.embedding)
    assert not torch.equal(first.embedding, other.embedding)


# -- dtype


def test_auto_dtype_on_the_cpu_is_float32(model_dir: Path) -> None:
    config = load_model_config(model_dir)
    assert resolve_dtype(config, CPU, "auto") == torch.float32
    assert resolve_dtype(config, CPU, "bfloat16") == torch.bfloat16


@pytest.mark.parametrize(
    ("checkpoint", "has_bf16", "expected"),
    [
        ("bfloat16", True, torch.bfloat16),
        ("float16", True, torch.float16),
        ("float32", True, torch.bfloat16),
        ("bfloat16", False, torch.float16),
    ],
)
def test_auto_dtype_on_cuda_is_the_checkpoints_own_in_16_bits(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: str,
    has_bf16: bool,
    expected: torch.dtype,
) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": checkpoint}))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    config = load_model_config(model_dir)
    assert resolve_dtype(config, torch.device("cuda"), "auto") == expected
