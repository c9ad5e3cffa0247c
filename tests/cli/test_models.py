"""Which directories and recommendations the settings name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.cli.models import find_model, find_sampling_defaults, find_tokenizer
from server.protocol.sampling import SamplingDefaults
from server.settings import Settings
from skipllm_core.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    return folder


def test_recommendations_come_from_the_model_from_nowhere_or_from_a_directory(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 7}))
    found = {
        where: find_sampling_defaults(Settings(generation_config=where), model)
        for where in ("auto", "none", str(tmp_path))
    }
    assert found["auto"] == SamplingDefaults(temperature=0.6)
    assert found["none"] == SamplingDefaults()
    assert found[str(tmp_path)] == SamplingDefaults(top_k=7)


def test_a_directory_without_recommendations_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--generation-config: there is no generation_config"):
        find_sampling_defaults(Settings(generation_config=str(tmp_path / "other")), model)


def test_the_tokenizer_is_the_models_unless_another_is_named(model: Path, tmp_path: Path) -> None:
    assert find_tokenizer(Settings(), model) == model
    assert find_tokenizer(Settings(tokenizer=str(tmp_path)), model) == tmp_path
    with pytest.raises(ConfigError, match="no such directory"):
        find_tokenizer(Settings(tokenizer="./nowhere"), model)


def test_the_embedded_model_and_directories_have_no_revisions(model: Path) -> None:
    for settings in (Settings(revision="v2"), Settings(model=str(model), revision="v2")):
        with pytest.raises(ConfigError, match="revision"):
            find_model(settings)
