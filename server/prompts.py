"""Files of prompts, as `skipllm calibrate` and `skipllm bench serve` read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from server.settings import SettingsError


class PromptLine(msgspec.Struct):
    """One line of the file: a chat or a raw prompt."""

    messages: list[dict[str, str]] | None = None
    prompt: str | None = None


def read_prompt_lines(path: Path) -> Iterator[tuple[int, PromptLine]]:
    """The lines of a JSON Lines file with their numbers, blank ones left out. Raises
    SettingsError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"cannot read {path}: {reason}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=PromptLine)
        except msgspec.DecodeError as error:
            raise SettingsError(f"{path}, line {number}: {error}") from None
        if entry.messages is None and entry.prompt is None:
            raise SettingsError(f"{path}, line {number}: neither messages nor prompt")
        yield number, entry
