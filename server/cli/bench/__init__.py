"""`skipllm bench`: how fast the engine and a server are, here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.bench.decode import decode, prefill
from server.cli.bench.gpu import gpu
from server.cli.bench.serve import serve
from server.cli.options import Command, told_in_one_line
from server.settings import SettingsError
from skipllm_core.bench.shapes import SHAPE_NAMES, write_shape
from skipllm_core.errors import ConfigError

app = typer.Typer(
    name="bench",
    help="Measure how fast the engine and a server are on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for command in (decode, gpu, prefill, serve):
    app.command(cls=Command)(command)


@app.command(cls=Command, epilog="To serve it: skipllm serve DIR --load-format dummy")
def shape(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(SHAPE_NAMES)}.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
) -> None:
    """Write a model of a known shape, without weights."""
    with told_in_one_line():
        if name not in SHAPE_NAMES:
            raise SettingsError(f"NAME: must be one of {', '.join(SHAPE_NAMES)}, but got {name!r}")
        try:
            write_shape(name, directory)
        except OSError as error:
            raise ConfigError(f"cannot write {directory}: {error.strerror}") from None
    typer.echo(f"to serve it: skipllm serve {directory} --load-format dummy")
