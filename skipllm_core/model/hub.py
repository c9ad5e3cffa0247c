"""Finds a model: a local directory, or a hub id that is fetched once. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from skipllm_core.errors import ConfigError, UnsupportedModelError

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
_IGNORED = ["*/*", "consolidated*"]  # the same weights again, in another layout


def resolve_model(name_or_path: str, *, revision: str | None = None) -> Path:
    """The directory of a model: the given one, or a snapshot of the hub repository of that id, at
    `revision` (None: its main branch).

    Raises ConfigError when there is no such directory and the hub has none either or cannot be
    reached, and UnsupportedModelError for a file that is not a directory of safetensors.
    """
    return _resolve(name_or_path, revision, _ALLOWED)


def resolve_tokenizer(name_or_path: str) -> Path:
    """The directory of a tokenizer, as `resolve_model` finds it; of the hub, without weights."""
    return _resolve(name_or_path, None, [name for name in _ALLOWED if "safetensors" not in name])


def _resolve(name_or_path: str, revision: str | None, allowed: list[str]) -> Path:
    path = Path(os.path.expanduser(name_or_path))  # Path.expanduser raises for unknown users
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"{name_or_path}: a directory, which has no revision {revision}")
        return path
    if path.is_file():
        raise UnsupportedModelError(
            f"{name_or_path}: a file; a model is a directory with config.json and safetensors"
        )
    if name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1:
        raise ConfigError(f"{name_or_path}: no such directory")
    return _fetch(name_or_path, revision, allowed)


def _fetch(repo_id: str, revision: str | None, allowed: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # takes long to import, and few need it

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=allowed, ignore_patterns=_IGNORED
            )
        )
    except (OSError, ValueError) as error:  # the bases of all that the hub's client raises
        at = "" if revision is None else f" at {revision}"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"{repo_id}{at}: no such directory, and not to be had from the Hugging Face hub: "
            f"{type(error).__name__}: {' '.join(lines)[:400]}"
        ) from error
