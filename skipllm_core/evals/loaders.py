"""Reads the public data sets' own files. Nothing is downloaded unless a hub id is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipllm_core.errors import ConfigError

HUB_PREFIX = "hub:"
_INSTALL = "pip install 'skipllm[datasets]'"


@dataclass(frozen=True, slots=True)
class Question:
    """A question with every answer that counts."""

    id: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """What the user says in a conversation, turn after turn."""

    id: str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Article:
    """A news article and the summary written for it."""

    id: str
    article: str
    highlights: str


def load_factoid_qa(path: str) -> list[Question]:
    """FreebaseQA's JSON: {"Questions": [{"Question-ID", "RawQuestion", "Parses": [{"Answers":
    [{"AnswersName": [..]}]}]}]}. Raises ConfigError."""
    questions = []
    for row in _factoid_rows(path):
        with _Told(path):
            answers = {
                name: None
                for parse in row["Parses"]
                for answer in parse["Answers"]
                for name in answer["AnswersName"]
            }
            questions.append(Question(row["Question-ID"], row["RawQuestion"], tuple(answers)))
    return questions


def load_multi_turn(path: str) -> list[Dialogue]:
    """MT-Bench's question.jsonl: {"question_id", "category", "turns": [..]}. Raises ConfigError."""
    dialogues = []
    for row in _rows(path, "train"):
        with _Told(path):
            dialogues.append(
                Dialogue(str(row["question_id"]), row["category"], tuple(row["turns"]))
            )
    return dialogues


def load_summaries(path: str) -> list[Article]:
    """CNN/DailyMail as JSON lines or parquet: {"id", "article", "highlights"}. Raises
    ConfigError."""
    articles = []
    for row in _rows(path, "test"):
        with _Told(path):
            articles.append(Article(str(row["id"]), row["article"], row["highlights"]))
    return articles


class _Told:
    """Turns a field that is missing or of another shape into one line about the file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if isinstance(error, KeyError | TypeError):
            raise ConfigError(f"{self._path}: a row is not of the expected form: {error!r}")


def _factoid_rows(path: str) -> list[Any]:
    if path.startswith(HUB_PREFIX):
        return list(_hub_rows(path.removeprefix(HUB_PREFIX), "test"))
    try:
        data = json.loads(_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("Questions"), list):
        raise ConfigError(f'{path} is not FreebaseQA\'s JSON: it has no list "Questions"')
    questions: list[Any] = data["Questions"]
    return questions


def _rows(path: str, split: str) -> Iterator[Any]:
    if path.startswith(HUB_PREFIX):
        yield from _hub_rows(path.removeprefix(HUB_PREFIX), split)
    elif path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError:
            raise ConfigError("parquet files need pyarrow: " + _INSTALL) from None
        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's are of these
            raise ConfigError(f"cannot read {path}: {error}") from None
    else:
        try:
            for line in _text(path).split("\n"):
                if line.strip():
                    yield json.loads(line)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None


def _text(path: str) -> str:
    return Path(path).read_bytes().decode("utf-8-sig")  # a byte order mark is no part of it


def _hub_rows(name: str, split: str) -> Iterator[Any]:
    """NAME or NAME:CONFIG, as cnn_dailymail:3.0.0."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("hub ids need datasets: " + _INSTALL) from None
    repo, _, config = name.partition(":")
    try:
        yield from datasets.load_dataset(repo, config or None, split=split)
    except (OSError, ValueError) as error:  # no such data set, no network, no such split
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot load the data set {name}: {reason}") from None
