"""What the commands share: options made of settings, help that fits, errors in one line."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from server.settings import Settings, SettingsError
from skipllm_core.errors import ConfigError

_METAVARS: dict[object, str] = {int: "INT", float: "FLOAT", ByteSize: "SIZE", Path: "FILE"}


class Command(TyperCommand):
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
            if not records:
                continue
            with formatter.section(heading):
                formatter.write_dl(records)


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
        shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        default = "" if shown in (None, "") or is_flag else f" Default: {shown}."
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


def takes_settings(names: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: in place of the command's `**flags`, one typer parameter for each setting."""
    settings = [_parameter(name, Settings.model_fields[name]) for name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=own + settings)  # type: ignore[attr-defined]
        return command

    return decorate


@contextmanager
def told_in_one_line() -> Iterator[None]:
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
