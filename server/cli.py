"""The command line. What a command needs is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from server.settings import CONFIG_VARIABLE, ENV_PREFIX, Settings, SettingsError, load_settings
from skipllm_core.errors import ConfigError
from skipllm_core.skip.profile import DEFAULT_WARMUP_TOKENS

app = typer.Typer(
    name="skipllm",
    help="Serve Llama-family models behind OpenAI's API, skipping feed-forward blocks adaptively.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of flags at 80 columns
)

_METAVARS: dict[object, str] = {int: "INT", float: "FLOAT", ByteSize: "SIZE", Path: "FILE"}


class _Command(TyperCommand):
    """Shows its options under the headings that they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            heading = getattr(parameter, "rich_help_panel", None) or "Options"
            if parameter.param_type_name == "argument":
                heading = "Arguments"
            if record := parameter.get_help_record(ctx):
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


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


def _metavar(annotation: Any) -> str:
    """How `--help` shows the values of a type, as INT or auto|cpu|cuda; `| None` is not shown."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    members = [member for member in get_args(annotation) if member is not type(None)]
    if members and get_origin(annotation) is not tuple:
        return _metavar(members[0])
    return _METAVARS.get(annotation, "TEXT")


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """A setting as a typer parameter. Values stay text: `load_settings` alone converts and checks.

    The default is None, "not given", so that environment and file can speak; the help tells the
    setting's own.
    """
    if name == "model":
        annotation: Any = Annotated[
            str | None, typer.Argument(help=field.description, metavar="MODEL")
        ]
    else:
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        is_flag = field.annotation is bool
        default = "" if field.default in (None, ()) or is_flag else f" Default: {field.default}."
        option = typer.Option(
            help=f"{field.description}{default}",
            metavar=None if is_flag else _metavar(field.annotation),
            rich_help_panel=str(extra["panel"]),
        )
        is_repeated = get_origin(field.annotation) is tuple
        text: Any = bool if is_flag else list[str] if is_repeated else str
        annotation = Annotated[text | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _takes_settings(names: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: in place of the command's `**flags`, one typer parameter for each setting."""
    settings = [_parameter(name, Settings.model_fields[name]) for name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=own + settings)  # type: ignore[attr-defined]
        return command

    return decorate


@app.command(
    cls=_Command,
    epilog=f"Every option is also an environment variable, as {ENV_PREFIX}MAX_MODEL_LEN, and a key "
    "of the --config file, as max_model_len. The command line wins over the environment, and "
    "that over the file.",
)
@_takes_settings(Settings.model_fields)
def serve(
    *,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file of settings, as configs/serve.yaml."),
    ] = None,
    **flags: Any,
) -> None:
    """Serve MODEL behind OpenAI's API."""
    with _told_in_one_line():
        if config is None and os.environ.get(CONFIG_VARIABLE):
            config = Path(os.environ[CONFIG_VARIABLE])
        settings = load_settings(flags, os.environ, config)

        from server.launch import run_server

        raise typer.Exit(run_server(settings))


@app.command(cls=_Command)
@_takes_settings(("device", "dtype", "num_threads", "kv_cache_memory", "max_num_seqs"))
def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A local directory or a Hugging Face id.")
    ],
    *,
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='Prompts to measure with, one JSON object per line: {"messages": ...} or '
            '{"prompt": ...}. Every fourth is held out to measure the result on.',
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to write the profile, as MODEL/skip.yaml.")
    ],
    max_tokens: Annotated[
        int, typer.Option(metavar="INT", min=1, help="Tokens to generate for each prompt.")
    ] = 128,
    warmup_tokens: Annotated[
        int,
        typer.Option(metavar="INT", min=0, help="First generated tokens that are decoded in full."),
    ] = DEFAULT_WARMUP_TOKENS,
    **flags: Any,
) -> None:
    """Measure MODEL's similarity curve and write its skip profile."""
    with _told_in_one_line():
        settings = load_settings({**flags, "model": model}, os.environ)

        from server.calibration import run_calibration

        run_calibration(settings, prompts, out, max_tokens=max_tokens, warmup_tokens=warmup_tokens)


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """What the user can repair ends the command with one line: 2 for settings, 1 for the rest."""
    try:
        yield
    except SettingsError as error:
        _fail(str(error), code=2)
    except ConfigError as error:
        _fail(str(error), code=1)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
