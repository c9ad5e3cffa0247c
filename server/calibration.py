"""`skipllm calibrate`: prompts from a file, progress on the terminal, a skip profile."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from server.prompts import read_prompt_lines
from server.settings import Settings, SettingsError
from skipllm_core.client.worker_handle import openmp_environment
from skipllm_core.errors import InvalidRequestError
from skipllm_core.model.hub import resolve_model
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.tokenizer import HFTokenizer, Tokenizer


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
    os.environ.update(openmp_environment(settings.num_threads))
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
    prompts = []
    for number, line in read_prompt_lines(path):
        try:
            if line.messages is not None:
                prompts.append(tokenizer.encode_chat(line.messages))
            else:
                prompts.append(tokenizer.encode(line.prompt or ""))
        except InvalidRequestError as error:
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
