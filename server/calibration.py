"""`skipllm calibrate`: prompts from a file, progress on the terminal, a skip profile."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from server.settings import Settings, SettingsError
from skipllm_core.errors import InvalidRequestError
from skipllm_core.model.hub import resolve_model
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.tokenizer import HFTokenizer, Tokenizer


class PromptLine(msgspec.Struct):
    """One line of the prompts file: a chat or a raw prompt."""

    messages: list[dict[str, str]] | None = None
    prompt: str | None = None


def run_calibration(
    settings: Settings, prompts_file: Path, out: Path, *, max_tokens: int, warmup_tokens: int
) -> None:
    """Measures the model on the prompts and writes its profile. Raises ConfigError."""
    assert settings.model is not None
    if not out.parent.is_dir():  # better told now than after the measurement
        raise SettingsError(f"cannot write {out}: {out.parent} is not a directory")
    model_dir = resolve_model(settings.model)
    prompts = read_prompts(prompts_file, HFTokenizer(model_dir))
    console = Console(stderr=True, highlight=False)
    # Before torch is loaded: spinning threads collapse as soon as anything else needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from skipllm_core.skip.calibrate import calibrate_model

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        profile = calibrate_model(
            settings.engine_config(model_dir),
            prompts,
            max_tokens=max_tokens,
            warmup_tokens=warmup_tokens,
            on_progress=lambda what, done, total: progress.update(
                task, description=what, completed=done, total=total
            ),
        )
    profile.save(out)
    console.print(_summary(profile))
    console.print(f"the profile is in {out}")


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of a JSON Lines file of chats and raw prompts. Raises SettingsError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"cannot read {path}: {reason}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=PromptLine)
            if entry.messages is not None:
                prompts.append(tokenizer.encode_chat(entry.messages))
            elif entry.prompt is not None:
                prompts.append(tokenizer.encode(entry.prompt))
            else:
                raise InvalidRequestError("neither messages nor prompt")
        except (msgspec.DecodeError, InvalidRequestError) as error:
            raise SettingsError(f"{path}, line {number}: {error}") from None
    return prompts


def _summary(profile: SkipProfile) -> Table:
    table = Table(
        "target", "layers", "threshold", "token skip ratio", "top-1 agreement", "KL (nats)"
    )
    for point in profile.points:
        start, end = profile.region_at(point)
        table.add_row(
            f"{point.target_ratio:.0%}",
            f"{start} to {end - 1}",
            f"{point.threshold:.6f}",
            f"{point.token_skip_ratio:.3f}",
            f"{point.top1_agreement:.3f}",
            f"{point.kl:.4f}",
        )
    return table
