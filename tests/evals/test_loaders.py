"""Loaders on tiny files in each data set's own form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from skipllm_core.errors import ConfigError
from skipllm_core.evals.loaders import load_factoid_qa, load_multi_turn, load_summaries
from skipllm_core.evals.tasks import TASKS, bundled, length_group, load


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")
    return str(path)


def test_freebaseqa_brings_every_parse_s_names_once(tmp_path: Path) -> None:
    parses = [
        {"Answers": [{"AnswersMid": "m.1", "AnswersName": ["al pacino", "pacino"]}]},
        {"Answers": [{"AnswersMid": "m.2", "AnswersName": ["al pacino"]}]},
    ]
    question = {"Question-ID": "q-1", "RawQuestion": "Who?", "Parses": parses}
    path = write(tmp_path / "f.json", {"Dataset": "FreebaseQA-eval", "Questions": [question]})
    (loaded,) = load_factoid_qa(path)
    assert (loaded.id, loaded.question) == ("q-1", "Who?")
    assert loaded.answers == ("al pacino", "pacino")


def test_mt_bench_keeps_its_turns_and_category(tmp_path: Path) -> None:
    row = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
    (loaded,) = load_multi_turn(write(tmp_path / "question.jsonl", row))
    assert (loaded.id, loaded.category) == ("81", "writing")
    assert loaded.turns == ("Write.", "Rewrite.")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    row = {"question_id": 81, "category": "writing", "turns": ["a\u2028b"]}
    path = tmp_path / "question.jsonl"
    path.write_bytes(json.dumps(row, ensure_ascii=False).encode("utf-8-sig") + b"\r\n")
    assert [loaded.turns for loaded in load_multi_turn(str(path))] == [("a\u2028b",)]
    path = tmp_path / "f.json"
    path.write_bytes(json.dumps({"Questions": []}).encode("utf-8-sig"))
    assert load_factoid_qa(str(path)) == []


def test_summaries_are_grouped_by_the_papers_lengths(tmp_path: Path) -> None:
    rows = [{"id": str(n), "article": "w " * n, "highlights": "h"} for n in (469, 470, 790, 791)]
    items = load("summarization", write(tmp_path / "cnn.jsonl", *rows), 10)
    assert [item.group for item in items] == ["< 470", "470-790", "470-790", "> 790"]
    assert length_group("") == "< 470"


def test_a_row_of_another_form_is_told_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "cnn.jsonl", {"id": "1", "text": "no article"})
    with pytest.raises(ConfigError, match=r"cnn\.jsonl.*article"):
        load_summaries(path)
    with pytest.raises(ConfigError, match="Questions"):
        load_factoid_qa(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_multi_turn(str(tmp_path / "none.jsonl"))


ARTICLES = [{"id": str(n), "article": f"article {n}", "highlights": f"point {n}"} for n in (1, 2)]


def test_parquet_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ARTICLES), path)
    loaded = load_summaries(str(path))
    assert [(a.id, a.article, a.highlights) for a in loaded] == [
        ("1", "article 1", "point 1"),
        ("2", "article 2", "point 2"),
    ]
    path.write_bytes(b"no parquet")
    for wrong in (path, tmp_path / "none.parquet"):
        with pytest.raises(ConfigError, match=f"cannot read {wrong}"):
            load_summaries(str(wrong))


def test_hub_ids_go_through_the_datasets_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory stands for a repository of the hub: the library reads both alike."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    repository = tmp_path / "news"
    repository.mkdir()
    write(repository / "train.jsonl", {"id": "9", "article": "other", "highlights": "other"})
    write(repository / "test.jsonl", *ARTICLES)
    assert [a.id for a in load_summaries(f"hub:{repository}")] == ["1", "2"]
    with pytest.raises(ConfigError, match="cannot load the data set"):
        load_summaries(f"hub:{repository}:no_such_config")
    with pytest.raises(ConfigError, match="cannot load the data set"):
        load_summaries(f"hub:{tmp_path / 'nowhere'}")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'skipllm\[datasets\]'"):
        load_summaries("hub:cnn_dailymail:3.0.0")
    with pytest.raises(ConfigError, match=r"pip install 'skipllm\[datasets\]'"):
        load_summaries("articles.parquet")


def test_the_bundled_sets_repeat_and_have_their_groups() -> None:
    for task in TASKS:
        items = bundled(task, 16)
        assert items == bundled(task, 16)
        assert len({item.id for item in items}) == 16
        assert all(item.is_story or any(item.accepted) for item in items)
    assert len({item.group for item in bundled("multi_turn", 16)}) == 8
    lengths: dict[str, list[int]] = {}
    for item in bundled("summarization", 30):
        lengths.setdefault(item.group, []).append(len(item.turns[-1].split()))
    assert max(lengths["short"]) <= min(lengths["medium"])
    assert max(lengths["medium"]) <= min(lengths["long"])
