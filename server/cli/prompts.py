"""Files of prompts and of finished answers, as `skipllm calibrate` and `bench serve` read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from server.settings import SettingsError

TEXT_SUFFIXES = (".txt", ".md")

Line = TypeVar("Line")
TokenIds = Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]], msgspec.Meta(min_length=1)]


class PromptLine(msgspec.Struct):
    """One line of the file: a chat or a raw prompt."""

    messages: list[dict[str, str]] | None = None
    prompt: str | None = None


class AnswerLine(msgspec.Struct):
    """One line of the file: a chat whose last message is the answer, a raw prompt with what
    followed it, or the token ids of both."""

    messages: list[dict[str, str]] | None = None
    prompt: str | None = None
    answer: str | None = None
    prompt_ids: TokenIds | None = None
    answer_ids: TokenIds | None = None


def read_prompt_lines(path: Path) -> Iterator[tuple[int, PromptLine]]:
    """The lines of a JSON Lines file with their numbers, blank ones left out. Raises
    SettingsError."""
    for number, entry in _read_lines(path, PromptLine):
        if entry.messages is None and entry.prompt is None:
            raise SettingsError(f"{path}, line {number}: neither messages nor prompt")
        yield number, entry


def read_answer_lines(path: Path) -> Iterator[tuple[int, AnswerLine]]:
    """The same of a file of answers. Each has exactly one of the three forms."""
    for number, entry in _read_lines(path, AnswerLine):
        forms = (
            (entry.messages or [{}])[-1].get("role") == "assistant",
            entry.prompt is not None and entry.answer is not None,
            entry.prompt_ids is not None and entry.answer_ids is not None,
        )
        if sum(forms) != 1:
            raise SettingsError(
                f"{path}, line {number}: not messages that end with the assistant's, nor a prompt "
                "and its answer, nor prompt_ids and answer_ids"
            )
        yield number, entry


def _read_lines(path: Path, kind: type[Line]) -> Iterator[tuple[int, Line]]:
    """Lines end at \\n and nowhere else: JSON's strings may hold what other texts part lines
    with."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=kind)
        except msgspec.DecodeError as error:
            raise SettingsError(f"{path}, line {number}: {error}") from None
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
