"""Models by name: directories, hub ids, and what happens when there is neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from skipllm_core.errors import ConfigError, UnsupportedModelError
from skipllm_core.model.hub import resolve_model, resolve_tokenizer


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(UnsupportedModelError, match=r"a model is a directory .*, or a \.gguf file"):
        resolve_model(str(file))


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent-model", "a/b/c"])
def test_an_absent_path_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise AssertionError(f"{repo_id} looked for on the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match="no such directory"):
        resolve_model(name)


def test_of_a_hub_repository_neither_pickles_nor_code_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "config.json").touch()
    assert resolve_model("org/name") == tmp_path
    assert (asked.pop("repo_id"), asked.pop("revision")) == ("org/name", None)
    repository = [
        "config.json",
        "tokenizer.json",
        "skip.yaml",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "modeling_custom.py",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "original/model.safetensors",
    ]
    fetched = list(filter_repo_objects(repository, **asked))
    assert fetched == repository[:5]
    assert resolve_tokenizer("org/name") == tmp_path
    del asked["repo_id"], asked["revision"]
    assert list(filter_repo_objects(repository, **asked)) == repository[:3]


def test_of_a_repository_of_gguf_files_one_is_to_be_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"org/name: no config\.json there; .*org/name/FILE\.gguf"
    ):
        resolve_model("org/name")


def test_a_revision_is_the_hubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot_download(repo_id: str, *, revision: str | None, **options: Any) -> str:
        if revision == "absent":
            raise OSError("404")
        (tmp_path / str(revision)).mkdir()
        (tmp_path / str(revision) / "config.json").touch()
        return str(tmp_path / str(revision))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name", revision="v2") == tmp_path / "v2"
    with pytest.raises(ConfigError, match="org/name at absent: no such directory"):
        resolve_model("org/name", revision="absent")
    with pytest.raises(ConfigError, match="a directory, which has no revision v2"):
        resolve_model(str(tmp_path), revision="v2")


def test_a_repository_that_is_not_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise OSError("404 Client Error.\n\nRepository Not Found for url.\nPlease log in.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match="org/absent: no such directory, and not to be") as caught:
        resolve_model("org/absent")
    assert "\n" not in str(caught.value)


def test_offline_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="org/name: no such directory, and not to be") as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)


def test_a_name_that_no_repository_can_have_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        resolve_model("bad name?")
