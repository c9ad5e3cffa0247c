"""A GGUF file as a model directory: what its header says, in the files that all others read, and a
link to the file itself, where the weights stay."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tokenizers

from skipllm_core.errors import ConfigError
from skipllm_core.model.gguf.config import generation_config, model_config
from skipllm_core.model.gguf.header import Header, read_header
from skipllm_core.model.gguf.tokenizer import chat_templates, tokenizer_config, tokenizer_json
from skipllm_core.user_cache import user_cache_dir

logger = logging.getLogger(__name__)

LINK = "weights.gguf"  # in the directory: the file
_PROFILE = "skip.yaml"  # a link, too: to the one that stands beside the file, if any does
_FORM = 1  # of the directory's files; counts up when they are made differently


def directory_of_gguf(path: Path) -> Path:
    """The model directory of a GGUF file, made once and kept in the user's cache: until the file
    changes. Where the cache cannot be written, it is a temporary one of this process.

    Raises UnsupportedModelError, in one line, for a file that cannot be served, and ConfigError
    where nothing can be written at all.
    """
    path = Path(os.path.abspath(path))
    directory = user_cache_dir() / "gguf" / _name(path)
    if os.path.isfile(directory / "config.json"):
        return directory
    files = _files(read_header(path))
    made = directory.with_name(f".new-{secrets.token_hex(8)}")
    try:
        made.mkdir(parents=True)
        _write(made, path, files)
        made.rename(directory)  # all of it or nothing, whoever looks
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        if os.path.isfile(directory / "config.json"):  # another process was faster
            return directory
        logger.warning("%s cannot be written: %s", directory, error.strerror)
        return _temporary(path, files)
    return directory


def is_directory_of_gguf(directory: Path) -> bool:
    """Whether it is one of those made here."""
    return (directory / LINK).is_symlink() and (directory / "config.json").is_file()


def _name(path: Path) -> str:
    """Of the directory: another for every file, and for the same one once it has been changed."""
    try:
        state = path.stat()
    except OSError:
        return f"{_stem(path)}-absent"  # reading it says why
    identity = (_FORM, str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    return f"{_stem(path)}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"


def _stem(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)[:80]


def _temporary(path: Path, files: dict[str, str]) -> Path:
    try:
        made = Path(tempfile.mkdtemp(prefix=f"{_stem(path)}-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        _write(made, path, files)
    except OSError as error:
        raise ConfigError(
            f"{path}: there is no place for its config and tokenizer (see XDG_CACHE_HOME and "
            f"TMPDIR): {error.strerror or error}"
        ) from error
    return made


def _files(header: Header) -> dict[str, str]:
    """Names and contents."""
    config = model_config(header)
    tokenizer = json.dumps(tokenizer_json(header), ensure_ascii=False)
    try:
        tokenizers.Tokenizer.from_str(tokenizer)
    except Exception as error:  # the library raises nothing narrower
        raise header.refused(f"its tokenizer is broken: {error}"[:400]) from error
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _text(tokenizer_config(header)),
        "generation_config.json": _text(generation_config(header)),
        "config.json": _text(config),
    }
    templates = chat_templates(header)
    if "default" in templates:
        files["chat_template.jinja"] = templates["default"]
    if "tool_use" in templates:
        files["additional_chat_templates/tool_use.jinja"] = templates["tool_use"]
    return files


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)


def _write(directory: Path, path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
    (directory / LINK).symlink_to(path)
    (directory / _PROFILE).symlink_to(path.parent / _PROFILE)
