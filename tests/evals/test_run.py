"""A run, its interruption, its report, and the clients against scripted servers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import msgspec
import pytest
from typer.testing import CliRunner

from server.cli.app import app
from skipllm_core.demo import MODEL_DIR
from skipllm_core.errors import ConfigError
from skipllm_core.evals.engine_backend import EngineBackend
from skipllm_core.evals.http import ChatClient, HttpBackend
from skipllm_core.evals.judge import grade, grading_prompt, parse_rating
from skipllm_core.evals.records import FULL, Journal, Record, Setting, Timing
from skipllm_core.evals.runner import grid, run, seed_of, skip_wish
from skipllm_core.evals.tasks import Item
from skipllm_core.model.fingerprint import model_fingerprint
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.tokenizer import ByteTokenizer
from skipllm_core.types import SamplingParams, SeqOutput, SkipPolicyName, StepOutput, StepStats
from tests.evals.scripted import PLAN, SKIPPING, Scripted

TALK = Item(task="multi_turn", id="t", group="g", turns=("one?", "two?"))


class OneStep:
    """An engine that ends every answer with its third token, in one step."""

    info = SimpleNamespace(max_model_len=1000, skip_policies=("never", "ffn_skip"))

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []
        self._new: list[int] = []

    def add(self, seq_id: int, prompt_ids: list[int], params: SamplingParams) -> None:
        self.asked.append(params)
        self._new.append(seq_id)

    def step(self) -> StepOutput | None:
        if not self._new:
            return None
        ended = SeqOutput(seq_id=self._new.pop(), token_ids=(65, 66, 67), finish_reason="stop")
        stats = StepStats(
            kind="decode", duration_s=0.1, num_running=0, num_waiting=0, num_kv_blocks_used=0,
            num_kv_blocks=1,
        )  # fmt: skip
        return StepOutput(outputs=(ended,), stats=stats)


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


def test_a_policy_that_the_build_lacks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'no_such'"):
        grid(["no_such"], [0.25])
    assert grid(["never", "ffn_skip"], [0.0, 0.25]) == [FULL, SKIPPING]


def test_all_stands_for_every_policy() -> None:
    policies = {setting.policy for setting in grid(["all"], [0.25])}
    assert policies == set(get_args(SkipPolicyName))


def test_all_goes_as_far_as_the_profile_does_and_a_policy_by_name_beyond() -> None:
    profile = SkipProfile.load(MODEL_DIR / "skip.yaml")
    far = profile.max_ratio("ffn_skip") + 0.01
    unmeasured = msgspec.structs.replace(profile, neurons=())
    named = {(s.policy, s.ratio) for s in grid(["all", "auto"], [0.1, far], unmeasured)}
    assert {("ffn_skip", 0.1), ("layer_drop", far), ("auto", 0.1)} <= named
    assert not {("ffn_skip", far), ("neurons", 0.1)} & named
    assert Setting(policy="ffn_skip", ratio=far) in grid(["ffn_skip"], [far], unmeasured)


def test_seeds_differ_between_items_and_turns_and_are_the_same_again() -> None:
    seeds = {seed_of(s, item, turn) for s in (0, 1) for item in ("a", "b") for turn in (0, 1)}
    assert len(seeds) == 8
    assert seed_of(0, "a", 0) == 1526491797  # the same on every machine, in every process
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_the_engine_is_given_seeds_and_its_tokens_are_counted() -> None:
    engine = OneStep()
    backend = EngineBackend(cast(Any, engine), ByteTokenizer(), None, 9, seed=3)
    record, timing = backend.lead([TALK], FULL)
    assert isinstance(record, Record)
    assert isinstance(timing, Timing)
    assert (record.num_tokens, len(record.answers)) == (6, 2)
    assert [params.seed for params in engine.asked] == [seed_of(3, "t", 0), seed_of(3, "t", 1)]


def test_a_policy_that_the_engine_lacks_is_refused_before_anything_is_asked() -> None:
    engine = OneStep()
    profile = SkipProfile.load(MODEL_DIR / "skip.yaml")
    backend = EngineBackend(cast(Any, engine), ByteTokenizer(), profile, 9)
    dropping = Setting(policy="layer_drop", ratio=0.25)
    with pytest.raises(ConfigError, match=r"layer_drop: .*--enforce-eager"):
        backend.resolve(dropping)
    with pytest.raises(ConfigError, match=r"ffn_skip: .*out of reach"):
        backend.resolve(Setting(policy="ffn_skip", ratio=0.99))


def test_a_running_server_is_asked_without_torch() -> None:
    names = ["runner", "http", "judge", "summary", "report", "figures"]
    modules = ", ".join(["server.cli.eval", *(f"skipllm_core.evals.{name}" for name in names)])
    code = f"import sys, {modules}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


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
        skip = {"skipped_ffn_share": 0.25, "total_ffn_blocks": 12}
        usage = {"completion_tokens": 3, "skip": skip}
        return 200, {**said(f"answer {len(seen)}"), "usage": usage}

    with answering(reply) as url:
        record, timing = HttpBackend(ChatClient(url, "m"), 9, 1).lead([TALK], SKIPPING)
    assert isinstance(record, Record)
    assert isinstance(timing, Timing)
    assert record.answers == ("answer 1", "answer 2")
    assert (record.skipped_ffn_blocks, record.total_ffn_blocks) == (6, 24)
    assert timing.num_tokens == 6
    assert record.num_tokens == 6
    assert [body["skip"] for body in seen] == [{"policy": "ffn_skip", "ratio": 0.25}] * 2
    assert [body["seed"] for body in seen] == [seed_of(0, "t", 0), seed_of(0, "t", 1)]
    assert [m["content"] for m in seen[1]["messages"]] == ["one?", "answer 1", "two?"]


def test_a_request_names_what_its_setting_has() -> None:
    assert skip_wish(FULL, None) == {"policy": "off"}
    warm = Setting(policy="ffn_skip", ratio=0.25, warmup_tokens=0)
    assert skip_wish(warm, None) == {"policy": "ffn_skip", "ratio": 0.25, "warmup_tokens": 0}
    exiting = Setting(policy="early_exit", ratio=0.2)
    assert skip_wish(exiting, 12) == {"policy": "early_exit", "ratio": 0.2, "budget_tokens": 12}


@pytest.mark.slow
def test_the_embedded_model_is_evaluated_and_the_judge_asked_once(tmp_path: Path) -> None:
    out, asked = tmp_path / "eval", []

    def reply(body: dict[str, Any]) -> tuple[int, object]:
        asked.append(body)
        return 200, said("[[8]]")

    with answering(reply) as url:
        command = ["eval", "skipllm-demo", "--out", str(out), "--limit", "8",
                   "--ratios", "0.25", "--warmups", "--policies", "all", "--num-threads", "1",
                   "--judge-url", url, "--judge-model", "j",
                   "--tasks", "factoid_qa,multi_turn"]  # fmt: skip
        for _ in range(2):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
    assert len(asked) == 8 * 13  # the full model, six policies, six warm-ups; none twice
    with (out / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    exact = {row["policy"]: row for row in rows if row["score"] == "exact"}
    assert float(exact["never"]["mean"]) >= 0.75
    assert float(exact["never"]["skipped_ffn_share"]) == 0
    for policy in ("ffn_skip", "static", "random", "layer_drop", "early_exit"):
        assert 0.15 < float(exact[policy]["skipped_ffn_share"]) < 0.4
    assert float(exact["static"]["mean"]) >= 0.75
    assert exact["layer_drop"]["weight_bytes_ratio"] == "0.25"
    assert {row["mean"] for row in rows if row["score"] == "overall"} == {"8.0"}
    assert (out / "accuracy.png").stat().st_size > 10_000
    assert (out / "warmup.png").exists()
    run_id = json.loads((out / "report.json").read_text("utf-8"))["run"]
    assert run_id["fingerprint"] == model_fingerprint(MODEL_DIR)
    profile = tmp_path / "other.yaml"
    profile.write_text((MODEL_DIR / "skip.yaml").read_text("utf-8") + "# another file\n", "utf-8")
    result = CliRunner().invoke(app, [*command, "--skip-profile", str(profile)])
    assert result.exit_code != 0
    assert "other settings" in result.output
