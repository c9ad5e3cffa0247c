"""Finds a model: a local directory or GGUF file, or one of the hub, fetched once. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipllm_core.errors import ConfigError, UnsupportedModelError
from skipllm_core.model.gguf.directory import directory_of_gguf, is_directory_of_gguf

# What is served from, and nothing that could be a pickle or code.
_ALLOWED = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.yaml",  # what was measured of the model and travels with it
    "*.safetensors",
    "*.safetensors.index.json",
]
_GGUF = ".gguf"
_IGNORED = ["*/*", "consolidated*"]  # the same weights again, in another layout


def resolve_model(name_or_path: str, *, revision: str | None = None) -> Path:
    """The directory of a model: the given one, or a snapshot of the hub repository of that id, at
    `revision` (None: its main branch). Of a GGUF file (FILE.gguf, a directory with one, or
    REPOSITORY/FILE.gguf of the hub, of which only that file is fetched), the directory that is made
    of it.

    Raises ConfigError when there is no such directory and the hub has none either or cannot be
    reached, and UnsupportedModelError for a file that is not supported.
    """
    directory = _resolve(name_or_path, revision, _ALLOWED)
    if not (directory / "config.json").exists() and not os.path.exists(name_or_path):
        raise ConfigError(
            f"{name_or_path}: no config.json there; of a repository of GGUF files, name one: "
            f"{name_or_path}/FILE.gguf"
        )
    return directory


def resolve_tokenizer(name_or_path: str) -> Path:
    """The directory of a tokenizer, as `resolve_model` finds it; of the hub, without weights."""
    return _resolve(name_or_path, None, [name for name in _ALLOWED if "safetensors" not in name])


def _resolve(name_or_path: str, revision: str | None, allowed: list[str]) -> Path:
    path = Path(os.path.expanduser(name_or_path))  # Path.expanduser raises for unknown users
    if path.exists() and revision is not None:
        what = "directory" if path.is_dir() else "file"
        raise ConfigError(f"{name_or_path}: a {what}, which has no revision {revision}")
    if path.is_dir():
        file = _only_gguf(path)
        return path if file is None else directory_of_gguf(file)
    if path.is_file():
        if path.suffix.lower() == _GGUF:
            return directory_of_gguf(path)
        raise UnsupportedModelError(
            f"{name_or_path}: a file; a model is a directory with config.json and safetensors, or "
            "a .gguf file"
        )
    is_path = name_or_path.startswith(("/", ".", "~"))
    if name_or_path.lower().endswith(_GGUF):
        if is_path or name_or_path.count("/") < 2:
            raise ConfigError(f"{name_or_path}: no such file")
        return directory_of_gguf(_fetch_file(name_or_path, revision))
    if is_path or name_or_path.count("/") > 1:
        raise ConfigError(f"{name_or_path}: no such directory")
    return _fetch(name_or_path, revision, allowed)


def _only_gguf(directory: Path) -> Path | None:
    """The GGUF file that a directory is there for: one with no safetensors in it."""
    if is_directory_of_gguf(directory) or any(directory.glob("*.safetensors")):
        return None
    files = sorted(file for file in directory.glob("*.[gG][gG][uU][fF]") if file.is_file())
    if len(files) > 1:
        some = ", ".join(file.name[:100] for file in files[:5])
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        raise ConfigError(f"{directory}: several models, name one of its files: {some}{more}")
    return files[0] if files else None


def _fetch(repo_id: str, revision: str | None, allowed: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # takes long to import, and few need it

    with _told(repo_id, revision, "directory"):
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=allowed, ignore_patterns=_IGNORED
            )
        )


def _fetch_file(name: str, revision: str | None) -> Path:
    """ORGANISATION/REPOSITORY/FILE, which may be in a folder there."""
    from huggingface_hub import hf_hub_download

    organisation, repository, file = name.split("/", 2)
    with _told(name, revision, "file"):
        return Path(hf_hub_download(f"{organisation}/{repository}", file, revision=revision))


@contextmanager
def _told(name: str, revision: str | None, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # the bases of all that the hub's client raises
        at = "" if revision is None else f" at {revision}"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"{name}{at}: no such {what}, and not to be had from the Hugging Face hub: "
            f"{type(error).__name__}: {' '.join(lines)[:400]}"
        ) from error
