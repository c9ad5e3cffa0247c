"""The tensors of a model directory, whichever of the formats they are stored in. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

from skipllm_core.model import checkpoint
from skipllm_core.model.checkpoint import TensorInfo
from skipllm_core.model.gguf.directory import LINK, is_directory_of_gguf
from skipllm_core.model.gguf.tensors import read_gguf_tensors


def read_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model by the name that checkpoints have for it.

    Raises UnsupportedModelError when there are no weights, or broken ones.
    """
    if is_directory_of_gguf(model_dir):
        return read_gguf_tensors(Path(os.readlink(model_dir / LINK)))
    return checkpoint.read_tensors(model_dir)


def has_weights(model_dir: Path) -> bool:
    return is_directory_of_gguf(model_dir) or any(model_dir.glob("*.safetensors"))
