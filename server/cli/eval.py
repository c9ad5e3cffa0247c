"""`skipllm eval`: policies x ratios x tasks, judged and reported."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.cli.options import takes_settings, told_in_one_line
from server.settings import EMBEDDED_MODEL_NAME, Settings, SettingsError
from server.settings_sources import load_settings

if TYPE_CHECKING:
    from skipllm_core.evals.judge import Ratings
    from skipllm_core.evals.records import Setting
    from skipllm_core.evals.runner import Backend
    from skipllm_core.evals.tasks import Item
    from skipllm_core.model.config import ModelConfig
    from skipllm_core.skip.profile import SkipProfile

WARMUPS = (0, 5, 10, 20, 30, 40)  # the paper's Figure 5
_WARMUP_RATIO = 0.25
_LONG_ANSWERS = ("multi_turn", "summarization")  # that a warm-up does not cover


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run, as the flags say it."""

    policies: tuple[str, ...]
    ratios: tuple[float, ...]
    tasks: tuple[str, ...]
    files: dict[str, str]  # by task; a task without one has the embedded model's set
    limit: int
    max_tokens: int
    seed: int
    out: Path
    with_warmups: bool
    base_url: str | None
    model_name: str
    concurrency: int
    judge_url: str | None
    judge_model: str | None


_Data = Annotated[
    str | None, typer.Option(metavar="FILE", help="A file, or hub:NAME (needs `datasets`).")
]


_ENGINE = (
    "device", "dtype", "num_threads", "kv_cache_memory", "max_num_seqs", "max_model_len",
    "enforce_eager", "revision",
)  # fmt: skip


@takes_settings((*_ENGINE, "skip_profile", "warmup_tokens"))
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A local directory, a GGUF file or a Hugging Face id. "
            f"Default: {EMBEDDED_MODEL_NAME}.",
        ),
    ] = None,
    *,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="For the answers and the report. The same command "
            "again goes on where it was interrupted.",
        ),
    ],
    policies: Annotated[
        str,
        typer.Option(
            metavar="NAME,..",
            help="never always runs; all: every policy, as far "
            "as the skip profile goes; auto: the one that the profile shows best.",
        ),
    ] = "ffn_skip",
    ratios: Annotated[
        str, typer.Option(metavar="FLOAT,..", help="Shares of the FFN weights to leave out.")
    ] = "0.05,0.15,0.2,0.25,0.35",
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,..",
            help="What to ask: these, and multiple_choice. Without files, the embedded model has "
            "the prompts it was not trained on, other models facts and short texts.",
        ),
    ] = "factoid_qa,multi_turn,summarization",
    factoid_file: _Data = None,
    multi_turn_file: _Data = None,
    summaries_file: _Data = None,
    limit: Annotated[int, typer.Option(metavar="INT", min=1, help="Items of each task.")] = 200,
    max_tokens: Annotated[int, typer.Option(metavar="INT", min=1, help="Of an answer.")] = 160,
    seed: Annotated[
        int, typer.Option(metavar="INT", help="Of the policy random; answers are greedy.")
    ] = 0,
    warmups: Annotated[
        bool,
        typer.Option(
            "--warmups", help="Add the ablation of warm-up tokens, 0 to 40: ffn_skip at 25 %."
        ),
    ] = False,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask a running server (URL ends in /v1) instead; MODEL is "
            "its name there. Its key: SKIPLLM_EVAL_API_KEY.",
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(metavar="INT", min=1, help="Requests at once with --base-url.")
    ] = 8,
    judge_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A judge behind OpenAI's API, for multi_turn and "
            "summarization. Its key: SKIPLLM_JUDGE_API_KEY.",
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="Its model.")] = None,
    **flags: Any,
) -> None:
    """Measure what skipping costs MODEL on the paper's tasks; write a report with figures."""
    with told_in_one_line():
        settings = load_settings({**flags, "model": model}, os.environ)
        if base_url is not None and settings.warmup_tokens is not None:
            raise SettingsError("--warmup-tokens is the server's to say, with --base-url")
        if (judge_url is None) != (judge_model is None):
            raise SettingsError("--judge-url and --judge-model go together")
        files = {
            "factoid_qa": factoid_file,
            "multi_turn": multi_turn_file,
            "summarization": summaries_file,
        }
        plan = Plan(
            policies=tuple(policies.split(",")),
            ratios=_ratios(ratios),
            tasks=tuple(tasks.split(",")),
            files={task: path for task, path in files.items() if path is not None},
            limit=limit,
            max_tokens=max_tokens,
            seed=seed,
            out=out,
            with_warmups=warmups,
            base_url=base_url,
            model_name=_name(model, is_here=base_url is None),
            concurrency=concurrency,
            judge_url=judge_url,
            judge_model=judge_model,
        )
        run_evaluation(plan, settings)


def _name(model: str | None, *, is_here: bool) -> str:
    """As the report has it, which may be read elsewhere: a file's or directory's last part."""
    if model is None:
        return EMBEDDED_MODEL_NAME
    return Path(model).name if is_here and Path(model).exists() else model


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(one) for one in text.split(","))
    except ValueError:
        raise SettingsError(f"--ratios: {text!r} is not a list of numbers") from None
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise SettingsError("--ratios: each must be within 0 and 1")
    return ratios


def run_evaluation(plan: Plan, settings: Settings) -> None:
    """Raises ConfigError."""
    from skipllm_core.evals import figures
    from skipllm_core.evals.records import Journal, Setting
    from skipllm_core.evals.report import write_report
    from skipllm_core.evals.runner import grid, run
    from skipllm_core.evals.summary import summarise
    from skipllm_core.evals.tasks import TASKS, bundled, load, of_world

    if unknown := set(plan.tasks) - set(TASKS):
        raise SettingsError(f"--tasks: {unknown.pop()!r} is none of {', '.join(TASKS)}")
    chosen = [task for task in TASKS if task in plan.tasks]
    own = bundled if plan.model_name == EMBEDDED_MODEL_NAME else of_world
    items = {
        task: load(task, plan.files[task], plan.limit)
        if task in plan.files
        else own(task, plan.limit)
        for task in chosen
    }
    local = None if plan.base_url is not None else _local(settings)
    profile = None if local is None else local.profile
    settings_list = grid(plan.policies, plan.ratios, profile)
    steps = [(setting, items[task]) for setting in settings_list for task in chosen]
    if plan.with_warmups:
        for num in WARMUPS:
            setting = Setting(policy="ffn_skip", ratio=_WARMUP_RATIO, warmup_tokens=num)
            settings_list.append(setting)
            steps += [(setting, items[task]) for task in chosen if task in _LONG_ANSWERS]
    backend, config, identity = _backend(plan, settings, local, settings_list)
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot write to {plan.out}: {error}") from None
    # What answers depend on; a journal of another run is refused. Policies and ratios may be added.
    run_id: dict[str, object] = {
        "model": plan.model_name,
        **identity,
        "limit": plan.limit,
        "max_tokens": plan.max_tokens,
        "seed": plan.seed,
        "files": plan.files,
        "max_num_seqs": settings.max_num_seqs if plan.base_url is None else plan.concurrency,
        "over_http": plan.base_url is not None,
    }
    journal = Journal(plan.out / "answers.jsonl", run_id)
    with _progress() as bar:
        total = sum(len(of) for _, of in steps)
        task_id = bar.add_task("answering", total=total)
        run(backend, steps, journal, lambda: bar.advance(task_id))
    everything = [item for of in items.values() for item in of]
    ratings = _grade(plan, everything, settings_list, journal.records)
    rows = summarise(everything, settings_list, journal.records, journal.timings, config, ratings)
    write_report(plan.out, run_id, rows, profile)
    figures.draw(plan.out, plan.model_name, rows)
    if profile is not None:
        figures.draw_points(plan.out / "points.png", plan.model_name, profile)
    typer.echo(f"the report is in {plan.out / 'report.md'}", err=True)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True, highlight=False), transient=True)


@dataclass(frozen=True, slots=True)
class _Local:
    """A model that runs in this process."""

    model_dir: Path
    fingerprint: str
    profile: SkipProfile | None
    profile_sha256: str | None


def _local(settings: Settings) -> _Local:
    """Raises ConfigError."""
    from server.cli.launch import find_profile, find_profile_file
    from server.cli.models import find_model
    from skipllm_core.model.fingerprint import model_fingerprint

    model_dir = find_model(settings)
    fingerprint = model_fingerprint(model_dir)
    file = find_profile_file(settings.skip_profile, model_dir, fingerprint)
    return _Local(
        model_dir,
        fingerprint,
        find_profile(settings.skip_profile, model_dir),
        None if file is None else hashlib.sha256(file.read_bytes()).hexdigest(),
    )


def _backend(
    plan: Plan, settings: Settings, local: _Local | None, asked: Sequence[Setting]
) -> tuple[Backend, ModelConfig | None, dict[str, object]]:
    """(the backend; in this process also the model's shape, and what names its weights, its profile
    and how it is computed). Raises ConfigError where a setting of `asked` cannot be met."""
    if local is None or plan.base_url is not None:  # nothing here loads torch
        assert plan.base_url is not None
        from skipllm_core.evals.http import ChatClient, HttpBackend

        client = ChatClient(plan.base_url, plan.model_name, os.environ.get("SKIPLLM_EVAL_API_KEY"))
        return HttpBackend(client, plan.max_tokens, plan.concurrency, plan.seed), None, {}
    from skipllm_core.client.worker_handle import openmp_environment
    from skipllm_core.model.config import load_model_config

    os.environ.update(openmp_environment(settings.num_threads))  # before torch is loaded
    from skipllm_core.evals.engine_backend import EngineBackend
    from skipllm_core.tokenizer import HFTokenizer
    from skipllm_core.worker import build_engine

    engine = build_engine(settings.engine_config(local.model_dir))
    backend = EngineBackend(
        engine,
        HFTokenizer(local.model_dir),
        local.profile,
        plan.max_tokens,
        plan.seed,
        settings.warmup_tokens,
    )
    for setting in asked:
        backend.resolve(setting)
    identity: dict[str, object] = {
        "fingerprint": local.fingerprint,
        "profile_sha256": local.profile_sha256,
        "device": engine.info.device,
        "dtype": engine.info.dtype,
        "enforce_eager": settings.enforce_eager,
        "warmup_tokens": settings.warmup_tokens,
    }
    return backend, load_model_config(local.model_dir), identity


def _grade(plan: Plan, items: Sequence[Item], settings: Sequence[Setting], records: Any) -> Ratings:
    if plan.judge_url is None or plan.judge_model is None:
        return {}
    from skipllm_core.evals.http import ChatClient
    from skipllm_core.evals.judge import grade_all

    judge = ChatClient(plan.judge_url, plan.judge_model, os.environ.get("SKIPLLM_JUDGE_API_KEY"))
    path = plan.out / "grades.jsonl"
    with _progress() as bar:
        task_id = bar.add_task("judging", total=None)

        def on_grade(total: int) -> None:
            bar.update(task_id, advance=1, total=total)

        return grade_all(judge, plan.judge_model, path, items, settings, records, on_grade)
