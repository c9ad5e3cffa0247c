"""The command line. What a command needs is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.bench import app as bench
from server.cli.eval import evaluate
from server.cli.options import Command, takes_settings, told_in_one_line
from server.settings import CONFIG_VARIABLE, EMBEDDED_MODEL_NAME, ENV_PREFIX, Settings
from server.settings_sources import load_settings
from skipllm_core.calibration.work import DEFAULT_MAX_TOKENS, Options
from skipllm_core.skip.profile import DEFAULT_WARMUP_TOKENS, MEASURED_POLICIES

app = typer.Typer(
    name="skipllm",
    help="Serve Llama-family models behind OpenAI's API, skipping feed-forward blocks adaptively.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of flags at 80 columns
)
app.add_typer(bench)
app.command("eval", cls=Command)(evaluate)


def main() -> None:
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"skipllm {version('skipllm')}")
        raise typer.Exit


@app.callback()
def _skipllm(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command(
    cls=Command,
    epilog=f"Every option is also an environment variable, as {ENV_PREFIX}MAX_MODEL_LEN, and a key "
    "of the --config file, as max_model_len. The command line wins over the environment, and "
    "that over the file.",
)
@takes_settings(Settings.model_fields)
def serve(
    *,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file of settings, as configs/serve.yaml."),
    ] = None,
    **flags: Any,
) -> None:
    """Serve MODEL behind OpenAI's API."""
    with told_in_one_line():
        if config is None and os.environ.get(CONFIG_VARIABLE):
            config = Path(os.environ[CONFIG_VARIABLE])
        settings = load_settings(flags, os.environ, config)

        from server.cli.launch import run_server

        raise typer.Exit(run_server(settings))


@app.command(cls=Command)
@takes_settings(("revision", "device", "dtype", "num_threads", "kv_cache_memory", "max_num_seqs"))
def calibrate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A local directory, a GGUF file or a Hugging Face id. "
            f"Default: {EMBEDDED_MODEL_NAME}.",
        ),
    ] = None,
    *,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to measure with; may be repeated. A .txt or .md file: each paragraph "
            "is one. Others: one JSON object per line, "
            '{"messages": ...} or {"prompt": ...}. Every fourth is held out to measure the '
            "result on. Default: a built-in set.",
        ),
    ] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Finished answers to measure with, as of your own traffic; may be repeated. One "
            'JSON object per line: {"messages": [..., {"role": "assistant", ...}]}, {"prompt": '
            '..., "answer": ...} or {"prompt_ids": [...], "answer_ids": [...]}.',
        ),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(metavar="NAME,..", help="The policies to measure."),
    ] = ",".join(MEASURED_POLICIES),
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Where to write the profile; a picture of it goes beside it. The same command "
            "again goes on where it was interrupted.",
        ),
    ] = Path("skip.yaml"),
    max_tokens: Annotated[
        int, typer.Option(metavar="INT", min=1, help="Tokens of each answer, at most.")
    ] = DEFAULT_MAX_TOKENS,
    warmup_tokens: Annotated[
        int,
        typer.Option(metavar="INT", min=0, help="First generated tokens that are decoded in full."),
    ] = DEFAULT_WARMUP_TOKENS,
    cold_start: Annotated[
        int | None,
        typer.Option(
            metavar="INT",
            min=0,
            help="First layer that may trigger; those behind it may be skipped. Default: found.",
        ),
    ] = None,
    cold_end: Annotated[
        int | None,
        typer.Option(
            metavar="INT",
            min=2,
            help="First layer that always runs again. Default: found.",
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Measure what each skip policy costs MODEL, and write its skip profile."""
    with told_in_one_line():
        settings = load_settings({**flags, "model": model}, os.environ)

        from server.cli.calibrate import parse_policies, run_calibration

        options = Options(
            max_tokens=max_tokens,
            warmup_tokens=warmup_tokens,
            cold_start=cold_start,
            cold_end=cold_end,
            policies=parse_policies(policies),
        )
        run_calibration(settings, prompts or [], answers or [], out, options)
