"""A run, its interruption, its report, and the clients against scripted servers."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from skipllm_core.errors import ConfigError
from skipllm_core.evals.http import ChatClient, HttpBackend, grade, grading_prompt, parse_rating
from skipllm_core.evals.records import Journal, Record, Setting, Timing
from skipllm_core.evals.report import markdown
from skipllm_core.evals.runner import FULL, grid, run
from skipllm_core.evals.summary import summarise
from skipllm_core.evals.tasks import Item

SKIPPING = Setting(policy="ffn_skip", ratio=0.25)
ITEMS = [
    Item(task="factoid_qa", id=str(n), group="all", turns=(f"q{n}",), accepted=(f"a{n}",))
    for n in range(4)
]
PLAN = [(FULL, ITEMS), (SKIPPING, ITEMS)]


class Scripted:
    """Right at every item under the full model, at half of them when skipping."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.asked: list[str] = []
        self._fails_after = fails_after

    def lead(self, items: Sequence[Item], setting: Setting) -> Iterator[Record | Timing]:
        for item in items:
            if len(self.asked) == self._fails_after:
                raise KeyboardInterrupt
            self.asked.append(item.id)
            is_right = setting == FULL or int(item.id) % 2 == 0
            yield Record(
                setting=setting,
                task=item.task,
                item_id=item.id,
                answers=(f"a{item.id}" if is_right else "wrong",),
                skipped_ffn_blocks=0 if setting == FULL else 3,
                total_ffn_blocks=12,
            )
        yield Timing(
            setting=setting,
            task=items[0].task,
            num_tokens=10,
            duration_s=2.0,
            ffn_weight_reads=9,
            ffn_weight_reads_avoided=1,
        )


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = Scripted(fails_after=5)
    with pytest.raises(KeyboardInterrupt):
        run(first, PLAN, Journal(path, {"model": "m"}))
    with path.open("ab") as file:
        file.write(b'{"type":"answer","sett')  # cut off in the middle of a line
    second, told = Scripted(), []
    journal = Journal(path, {"model": "m"})
    run(second, PLAN, journal, lambda: told.append(1))
    assert second.asked == ["1", "2", "3"]
    assert len(told) == 8
    again = Scripted()
    run(again, PLAN, Journal(path, {"model": "m"}))
    assert again.asked == []
    assert len(journal.records) == 8


def test_the_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "a", {"model": "m"})
    with pytest.raises(ConfigError, match="other settings"):
        Journal(tmp_path / "a", {"model": "other"})


def test_rows_are_what_was_counted(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a", {})
    run(Scripted(), PLAN, journal)
    full, skipping = summarise(ITEMS, [FULL, SKIPPING], journal.records, journal.timings, 0.5, FULL)
    assert full.scores["exact"].mean == 1
    assert skipping.scores["exact"].mean == skipping.scores["agreement"].mean == 0.5
    assert skipping.token_skip_ratio == 0.25
    assert skipping.weight_bytes_ratio == 0.125
    assert skipping.weight_skip_ratio == 0.1
    assert skipping.tokens_per_s == 5


def test_a_setting_without_all_its_answers_has_no_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a", {})
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(fails_after=6), PLAN, journal)
    rows = summarise(ITEMS, [FULL, SKIPPING], journal.records, journal.timings, None, FULL)
    assert [row.setting for row in rows] == [FULL]


@pytest.mark.parametrize(
    ("model", "has_paper"), [("skipllm-demo", False), ("meta-llama/Llama-2-7b-chat-hf", True)]
)
def test_the_papers_numbers_stand_beside_its_own_model_alone(
    tmp_path: Path, model: str, has_paper: bool
) -> None:
    journal = Journal(tmp_path / "a", {})
    run(Scripted(), PLAN, journal)
    rows = summarise(ITEMS, [FULL, SKIPPING], journal.records, journal.timings, None, FULL)
    text = markdown({"model": model}, rows)
    assert ("79.02" in text) is has_paper
    assert "| ffn_skip | 25% | profile's | 0.250 |" in text


def test_a_policy_that_the_build_lacks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'no_such'"):
        grid(["no_such"], [0.25])
    assert grid(["never", "ffn_skip"], [0.0, 0.25]) == [FULL, SKIPPING]


@contextmanager
def answering(reply: Callable[[dict[str, Any]], tuple[int, object]]) -> Iterator[str]:
    """A server that gives `reply(request body)` -> (status, body) on every POST."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            status, body = reply(json.loads(self.rfile.read(length)))
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


TALK = Item(task="multi_turn", id="t", group="g", turns=("one?", "two?"))


def test_the_judge_reads_the_whole_conversation_and_its_last_grade_counts() -> None:
    seen: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> tuple[int, object]:
        seen.append(body)
        return 200, said("Between [[3]] and more: [[7.5]]")

    with answering(reply) as url:
        assert grade(ChatClient(url, "judge"), TALK, ["first", "second"]) == 7.5
    (body,) = seen
    assert (body["model"], body["temperature"]) == ("judge", 0)
    prompt = body["messages"][0]["content"]
    order = [prompt.index(f"\n{text}\n") for text in ("one?", "first", "two?", "second")]
    assert order == sorted(order)
    assert "fluency" in grading_prompt(TALK, ["first", "second"], "fluency")


@pytest.mark.parametrize("text", ["7", "[7]", "[[eleven]]", "[[11]]", "[[0]]", ""])
def test_what_is_no_grade_counts_as_none(text: str) -> None:
    assert parse_rating(text) is None


def test_a_server_s_refusal_is_told() -> None:
    with (
        answering(lambda _: (400, {"error": {"message": "no such model"}})) as url,
        pytest.raises(ConfigError, match=r"400: .*no such model"),
    ):
        ChatClient(url, "m").complete([])


def test_over_http_each_request_names_its_skipping_and_turns_follow_each_other() -> None:
    seen: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> tuple[int, object]:
        seen.append(body)
        skip = {"skipped_ffn_blocks": 2, "total_ffn_blocks": 12}
        usage = {"completion_tokens": 3, "skip": skip}
        return 200, {**said(f"answer {len(seen)}"), "usage": usage}

    with answering(reply) as url:
        record, timing = HttpBackend(ChatClient(url, "m"), 9, 1).lead([TALK], SKIPPING)
    assert isinstance(record, Record)
    assert isinstance(timing, Timing)
    assert record.answers == ("answer 1", "answer 2")
    assert (record.skipped_ffn_blocks, record.total_ffn_blocks) == (4, 24)
    assert timing.num_tokens == 6
    assert [body["skip"] for body in seen] == [{"policy": "ffn_skip", "ratio": 0.25}] * 2
    assert [m["content"] for m in seen[1]["messages"]] == ["one?", "answer 1", "two?"]


@pytest.mark.slow
def test_the_embedded_model_is_evaluated_and_the_judge_asked_once(tmp_path: Path) -> None:
    out, asked = tmp_path / "eval", []

    def reply(body: dict[str, Any]) -> tuple[int, object]:
        asked.append(body)
        return 200, said("[[8]]")

    with answering(reply) as url:
        command = ["eval", "--out", str(out), "--limit", "8", "--ratios", "0.25", "--warmups",
                   "--num-threads", "1", "--judge-url", url, "--judge-model", "j",
                   "--tasks", "factoid_qa,multi_turn"]  # fmt: skip
        for _ in range(2):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
    assert len(asked) == 8 * 8  # the full model, one ratio, six warm-ups; none twice
    with (out / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    exact = {row["policy"]: row for row in rows if row["score"] == "exact"}
    assert float(exact["never"]["mean"]) >= 0.75
    assert float(exact["never"]["token_skip_ratio"]) == 0
    assert 0.15 < float(exact["ffn_skip"]["token_skip_ratio"]) < 0.4
    assert {row["mean"] for row in rows if row["score"] == "overall"} == {"8.0"}
    assert (out / "accuracy.png").stat().st_size > 10_000
    assert (out / "warmup.png").exists()
