"""Where settings come from: command line, environment, YAML file; each names its own mistakes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError

from server.settings import (
    CONFIG_VARIABLE,
    ENV_PREFIX,
    HOW_MUCH_TO_SKIP,
    Settings,
    SettingsError,
    flag_of,
)

# What Kubernetes sets in the pods beside a Service named `skipllm`, SKIPLLM_PORT=tcp://.. too.
_SERVICE_LINK = re.compile(ENV_PREFIX + r"(SERVICE_(HOST|PORT).*|PORT_\d+_(TCP|UDP).*)")


def load_settings(
    flags: Mapping[str, object], environ: Mapping[str, str], config_file: Path | None = None
) -> Settings:
    """Settings from the command line, else the environment, else the YAML file, else defaults.

    `flags` holds what was given on the command line (None: not given). An empty variable counts
    as unset, as container files write it. Raises SettingsError.
    """
    # Each layer: the values it sets, and how its source spells a name, for messages.
    layers: list[tuple[Mapping[str, object], Callable[[str], str]]] = [
        (_read_environ(environ), lambda name: ENV_PREFIX + name.upper()),
        ({name: value for name, value in flags.items() if value is not None}, flag_of),
    ]
    if config_file is not None:
        layers.insert(0, (_read_yaml(config_file), lambda name: f"'{name}' in {config_file}"))
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for layer, spell in layers:
        if not HOW_MUCH_TO_SKIP.isdisjoint(layer):  # a threshold here replaces a ratio from below
            values = {name: values[name] for name in values.keys() - HOW_MUCH_TO_SKIP}
        values |= layer
        sources |= {name: spell(name) for name in layer}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].replace("Input should be", "must be").partition(", unable to")[0]
        if not first["loc"]:
            raise SettingsError(message.removeprefix("Value error, ")) from None
        name = str(first["loc"][0])
        given = "" if name == "api_key" else f", but got {first['input']!r}"
        raise SettingsError(f"{sources[name]}: {message}{given}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what `name` was meant to be, or nothing."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def _read_yaml(config_file: Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(config_file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"cannot read {config_file}: {reason}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{config_file} is not valid YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{config_file} must be a mapping of settings")
    for key in content:
        if key not in Settings.model_fields:
            hint = nearest(str(key), Settings.model_fields)
            raise SettingsError(f"unknown key '{key}' in {config_file}{hint}")
    # A YAML number or truth value is checked like the same text in a flag: `true` is no integer.
    return {
        key: str(value) if isinstance(value, bool | int | float) else value
        for key, value in content.items()
        if value is not None
    }


def _read_environ(environ: Mapping[str, str]) -> dict[str, str]:
    variables = {ENV_PREFIX + name.upper(): name for name in Settings.model_fields}
    found = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if _SERVICE_LINK.fullmatch(variable) or text.startswith(("tcp://", "udp://")):
            continue
        if variable not in variables:
            hint = nearest(variable, [*variables, CONFIG_VARIABLE])
            raise SettingsError(f"unknown environment variable {variable}{hint}")
        if text:
            found[variables[variable]] = text
    return found
