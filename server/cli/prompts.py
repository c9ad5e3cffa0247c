"""Files of prompts, as `skipllm calibrate` and `skipllm bench serve` read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from server.settings import SettingsError

TEXT_SUFFIXES = (".txt", ".md")


class PromptLine(msgspec.Struct):
    """One line of the file: a chat or a raw prompt."""

    messages: list[dict[str, str]] | None = None
    prompt: str | None = None


def read_prompt_lines(path: Path) -> Iterator[tuple[int, PromptLine]]:
    """The lines of a JSON Lines file with their numbers, blank ones left out. Lines end at \\n and
    nowhere else: JSON's strings may hold what other texts part lines with. Raises SettingsError."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=PromptLine)
        except msgspec.DecodeError as error:
            raise SettingsError(f"{path}, line {number}: {error}") from None
        if entry.messages is None and entry.prompt is None:
            raise SettingsError(f"{path}, line {number}: neither messages nor prompt")
        yield number, entry


def read_paragraphs(path: Path) -> list[str]:
    """The paragraphs of a text file, parted by blank lines. Raises SettingsError."""
    paragraphs: list[list[str]] = [[]]
    for line in _read(path).replace("\r\n", "\n").split("\n"):
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs if lines]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # a byte order mark is no part of the text
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"cannot read {path}: {reason}") from None
