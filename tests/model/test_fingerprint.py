"""The fingerprint tells models apart, and only models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipllm_core.errors import UnsupportedModelError
from skipllm_core.model.fingerprint import model_fingerprint
from tests.model.checkpoints import save_checkpoint


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model")


def test_sharding_and_incidental_settings_leave_it(model_dir: Path, tmp_path: Path) -> None:
    sharded = save_checkpoint(tmp_path / "sharded", max_shard_size="100KB")
    path = sharded / "config.json"
    config = {**json.loads(path.read_text()), "transformers_version": "4.0", "use_cache": False}
    path.write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert model_fingerprint(sharded) == model_fingerprint(model_dir)


def test_any_tuned_tensor_changes_it(model_dir: Path) -> None:
    before = model_fingerprint(model_dir)
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"] += 1e-3
    save_file(tensors, file)
    assert model_fingerprint(model_dir) != before


def test_a_setting_that_matters_changes_it(model_dir: Path) -> None:
    before = model_fingerprint(model_dir)
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-6}))
    assert model_fingerprint(model_dir) != before


def test_other_weights_have_another(model_dir: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", seed=1)
    assert model_fingerprint(other) != model_fingerprint(model_dir)


def test_only_a_bounded_part_of_a_large_tensor_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    save_file({"large": torch.zeros(0)}, file)
    num_bytes = 2**34  # 16 GiB, all of it a hole in the file
    header = json.dumps(
        {"large": {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}
    ).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + num_bytes)
    assert len(model_fingerprint(tmp_path)) == 64


def test_a_directory_of_only_a_config_has_one(model_dir: Path) -> None:
    before = model_fingerprint(model_dir)
    (model_dir / "model.safetensors").unlink()
    assert model_fingerprint(model_dir) != before


def test_a_directory_that_is_no_model_has_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        model_fingerprint(tmp_path)
