"""Where the commands find the model that they are given."""

from __future__ import annotations

from pathlib import Path

from server.settings import Settings
from skipllm_core.demo import MODEL_DIR
from skipllm_core.model.hub import resolve_model


def find_model(settings: Settings) -> Path:
    """The directory of the settings' model. Raises ConfigError where there is none."""
    if settings.model is None or settings.is_embedded_model:
        return MODEL_DIR
    return resolve_model(settings.model)
