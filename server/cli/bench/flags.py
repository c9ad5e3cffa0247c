"""What the benchmarks' flags have in common: lists, and checks before anything is measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from server.settings import SettingsError
from skipllm_core.errors import ConfigError

Number = TypeVar("Number", int, float)


class Peer(StrEnum):
    """What can take turns with the engine."""

    TRANSFORMERS = "transformers"


def numbers(flag: str, text: str, kind: type[Number], least: int = 0) -> list[Number]:
    """`1,8` as the numbers it names, each once, in their order."""
    try:
        found = [kind(item) for item in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= number <= 2**31 for number in found):  # nor NaN
        what = "whole numbers" if kind is int else "numbers"
        raise SettingsError(
            f"{flag}: must be {what} of at least {least}, separated by commas, but got {text!r}"
        )
    return list(dict.fromkeys(found))


def names(flag: str, text: str, known: Collection[str]) -> list[str]:
    found = [name.strip() for name in text.split(",")]
    for name in found:
        if name not in known:
            raise SettingsError(f"{flag}: must be of {', '.join(known)}, but got {name!r}")
    return found


def check_surroundings(compare: Peer | None, plot: Path | None, json_file: Path | None) -> None:
    """What is missing is better told now than after the measurement."""
    needs = [("--compare", "transformers", compare), ("--plot", "matplotlib", plot)]
    for flag, package, is_given in needs:
        if is_given is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{flag} needs {package}: pip install 'skipllm[bench]'")
    for path in (plot, json_file):
        if path is not None and not path.parent.is_dir():
            raise SettingsError(f"cannot write {path}: {path.parent} is not a directory")
        if path is not None and path.is_dir():
            raise SettingsError(f"cannot write {path}: it is a directory")
