"""Where the commands find the model that they are given, and what belongs to it."""

from __future__ import annotations

from pathlib import Path

from server.protocol.sampling import SamplingDefaults
from server.settings import Settings
from skipllm_core.demo import MODEL_DIR
from skipllm_core.errors import ConfigError
from skipllm_core.model.hub import resolve_model, resolve_tokenizer


def find_model(settings: Settings) -> Path:
    """The directory of the settings' model. Raises ConfigError where there is none."""
    if settings.model is None or settings.is_embedded_model:
        if settings.revision is not None:
            raise ConfigError("the embedded model has no revisions; leave --revision out")
        return MODEL_DIR
    return resolve_model(settings.model, revision=settings.revision)


def find_tokenizer(settings: Settings, model_dir: Path) -> Path:
    """The directory of the tokenizer: the model's, or the one that was named in its place."""
    return model_dir if settings.tokenizer is None else resolve_tokenizer(settings.tokenizer)


def find_sampling_defaults(settings: Settings, model_dir: Path) -> SamplingDefaults:
    """What requests get that leave sampling parameters out."""
    match settings.generation_config:
        case "none":
            return SamplingDefaults()
        case "auto":
            return SamplingDefaults.of_model(model_dir)
        case named:
            if not (Path(named) / "generation_config.json").is_file():
                raise ConfigError(
                    f"--generation-config: there is no generation_config.json in {named}"
                )
            return SamplingDefaults.of_model(Path(named))
