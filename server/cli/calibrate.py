"""`skipllm calibrate`: prompts, progress on the terminal, a skip profile and its picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from server.cli.models import find_model
from server.cli.prompts import (
    TEXT_SUFFIXES,
    read_answer_lines,
    read_paragraphs,
    read_prompt_lines,
)
from server.settings import Settings, SettingsError
from skipllm_core.calibration.answers import Answer
from skipllm_core.calibration.prompts import BUILT_IN
from skipllm_core.calibration.work import OnProgress, Options
from skipllm_core.client.worker_handle import openmp_environment
from skipllm_core.demo.data import prompts as demo_prompts
from skipllm_core.errors import ConfigError, InvalidRequestError
from skipllm_core.skip.profile import MEASURED_POLICIES, SkipProfile
from skipllm_core.tokenizer import HFTokenizer, Tokenizer
from skipllm_core.types import SkipPolicyName

TEXT_PROMPT_TOKENS = 64  # of a paragraph; what follows would have been the answer
NUM_DEMO_PROMPTS = 128


def run_calibration(
    settings: Settings,
    prompt_files: Sequence[Path],
    answer_files: Sequence[Path],
    out: Path,
    options: Options,
) -> None:
    """Measures the model on the prompts and answers, and writes its profile. Raises ConfigError."""
    if not out.parent.is_dir():  # better told now than after the measurement
        raise SettingsError(f"cannot write {out}: {out.parent} is not a directory")
    model_dir = find_model(settings)
    tokenizer = HFTokenizer(model_dir)
    if prompt_files or answer_files:
        prompts = [ids for path in prompt_files for ids in read_prompts(path, tokenizer)]
    elif settings.is_embedded_model:
        chats = islice(demo_prompts.prompts(), NUM_DEMO_PROMPTS)
        prompts = [tokenizer.encode_chat(messages) for messages in chats]
    else:
        prompts = built_in_prompts(tokenizer)
    answers = [Answer(prompt_ids, []) for prompt_ids in prompts]
    answers += [answer for path in answer_files for answer in read_answers(path, tokenizer)]
    console = Console(stderr=True, highlight=False, markup=False)  # [..] is no style here
    journal = out.with_name(out.name + ".partial")
    os.environ.update(openmp_environment(settings.num_threads))
    from skipllm_core.calibration.calibrate import calibrate_model

    try:
        with _progress(console) as on_progress:
            profile = calibrate_model(
                settings.engine_config(model_dir),
                answers,
                options,
                journal=journal,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        if journal.exists():
            console.print(f"interrupted; what was done is in {journal}: the same command goes on")
        raise
    profile.save(out)
    journal.unlink()  # not before: a profile that could not be written is not measured again
    console.print(_summary(profile))
    console.print(f"the profile is in {out}")
    _draw(profile, out.with_suffix(".png"), console)
    console.print(
        f"To serve with it: skipllm serve {settings.model or ''} --skip-profile {out} "
        "--skip-ratio 0.2 (or --min-agreement 0.95)".replace("  ", " ")
    )


def parse_policies(text: str) -> tuple[SkipPolicyName, ...]:
    """Names with commas between them. Raises SettingsError."""
    known = {str(name): name for name in MEASURED_POLICIES}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise SettingsError(f"--policies {name!r}: not one of {', '.join(known)}")
    return tuple(dict.fromkeys(known[name] for name in names))


@contextmanager
def _progress(console: Console) -> Iterator[OnProgress]:
    """A bar on a terminal; elsewhere a line for each thing that is begun."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, speed_estimate_period=600)
    task = bar.add_task("", total=None)
    told = ""

    def on_progress(what: str, done: float, total: float) -> None:
        nonlocal told
        bar.update(task, description=what, completed=done, total=total)
        if what != told and not console.is_terminal:
            console.print(f"{what} ({done / total:.0%} done)")
        told = what

    with bar:
        yield on_progress


def _draw(profile: SkipProfile, path: Path, console: Console) -> None:
    from skipllm_core.calibration.picture import draw_profile

    try:
        draw_profile(profile, path)
    except ConfigError as error:  # the profile is what matters
        console.print(f"no picture: {error}")
    else:
        console.print(f"a picture of it is in {path}")


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of a text file's paragraphs, or of a JSON Lines file of chats and raw prompts.
    Raises SettingsError."""
    if path.suffix in TEXT_SUFFIXES:
        texts = read_paragraphs(path)
        return [tokenizer.encode(text)[:TEXT_PROMPT_TOKENS] for text in texts]
    return list(_read_json_lines(path, tokenizer))


def _read_json_lines(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    for number, line in read_prompt_lines(path):
        try:
            if line.messages is not None:
                yield tokenizer.encode_chat(line.messages)
            else:
                yield tokenizer.encode(line.prompt or "")
        except InvalidRequestError as error:
            raise SettingsError(f"{path}, line {number}: {error}") from None


def read_answers(path: Path, tokenizer: Tokenizer) -> Iterator[Answer]:
    """Token ids of a JSON Lines file of finished answers. Raises SettingsError."""
    for number, line in read_answer_lines(path):
        try:
            prompt_ids, text = line.prompt_ids, line.answer or ""
            if line.messages is not None:
                prompt_ids = tokenizer.encode_chat(line.messages[:-1])
                text = line.messages[-1].get("content", "")
            elif prompt_ids is None:
                prompt_ids = tokenizer.encode(line.prompt or "")
            answer_ids = line.answer_ids or tokenizer.encode(text, add_special_tokens=False)
        except InvalidRequestError as error:
            raise SettingsError(f"{path}, line {number}: {error}") from None
        if not prompt_ids or not answer_ids:
            raise SettingsError(f"{path}, line {number}: the prompt or the answer is empty")
        yield Answer(prompt_ids, answer_ids)


def built_in_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the built-in set, as chats where the model has a chat template."""
    try:
        return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in BUILT_IN]
    except InvalidRequestError:
        return [tokenizer.encode(text) for text in BUILT_IN]


def _summary(profile: SkipProfile) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="left out: of the FFN weights, per token, and where the model reads its own text "
        "(free); b N: of their reads at batch N. top-1: same next token as the full model's; KL in "
        "nats; ppl: change of the perplexity",
    )
    measured = [points for policy in MEASURED_POLICIES if (points := profile.points(policy))]
    batches = [b for points in measured[:1] for b in points[0].weight_skip_ratio if b > 1]
    table.add_column("policy", no_wrap=True, min_width=max(map(len, MEASURED_POLICIES)))
    for heading in (
        "target",
        "left out",
        "free",
        *(f"b {batch}" for batch in batches),
        "top-1",
        "KL",
        "ppl",
    ):
        table.add_column(heading, justify="right")
    for policy in MEASURED_POLICIES:
        points = profile.points(policy)
        for point in points:
            table.add_row(
                policy if point is points[0] else "",
                f"{point.target_ratio:.0%}",
                f"{point.skipped_ffn_share:.1%}",
                "" if point.free_ffn_share is None else f"{point.free_ffn_share:.1%}",
                *(f"{point.weight_skip_ratio[batch]:.1%}" for batch in batches),
                f"{point.top1_agreement:.1%}",
                f"{point.kl:.4f}",
                f"{point.perplexity_change:+.1%}",
                end_section=point is points[-1],
            )
    return table
