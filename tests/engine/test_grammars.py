"""Sequences under a grammar among others: admitted when it is compiled, kept to it, isolated."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
from llguidance import LLMatcher

from skipllm_core.engine.engine import Engine
from skipllm_core.engine.runner import Batch, RowResult, ScheduledSeq, StepResult
from skipllm_core.grammar.compiler import Grammar, new_matcher
from skipllm_core.grammar.state import GrammarState
from skipllm_core.grammar.vocabulary import Vocabulary
from skipllm_core.sequence import Sequence
from skipllm_core.tokenizer import ByteTokenizer, Tokenizer
from skipllm_core.types import SamplingParams, SeqOutput
from tests.engine.late import LateFakeRunner
from tests.engine.test_scheduler import assert_pool_is_whole, counted_up, tokens
from tests.fakes import FakeRunner, count_up, fake_engine
from tests.grammar.texts import EOS, PERSON, allowed, compact, of_schema

PEOPLE = SamplingParams(max_tokens=400, stop_token_ids=(EOS,), grammar=compact(PERSON))
PLAIN = SamplingParams(max_tokens=30)


def drawn(seq: Sequence) -> int:
    """Of the tokens that the grammar allows, one that follows from the text so far."""
    if seq.grammar is None:
        return count_up(seq)
    rng = random.Random(f"{seq.params.seed} {seq.output_ids}")
    return rng.choice(allowed(seq.grammar.mask()))


class LateGrammarRunner(LateFakeRunner):
    """A device that needs a row's last token, and the mask made of it, before it is launched."""

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        for row in batch.rows:
            if row.seq.grammar is not None and row.samples:
                assert row.seq.num_pending_tokens == 0
                assert row.seq.grammar.is_ready
            self._twin(row.seq).grammar = row.seq.grammar
        return super().launch(batch)


def engine_of(runner: FakeRunner | None = None, **settings: Any) -> Engine:
    settings = {"max_model_len": 10_000, "load_tokenizer": ByteTokenizer} | settings
    return fake_engine(runner or FakeRunner(drawn), **settings)


def run(engine: Engine) -> dict[int, list[SeqOutput]]:
    outputs: dict[int, list[SeqOutput]] = {}
    while engine.has_work:
        step = engine.step()
        for output in step.outputs if step is not None else ():
            outputs.setdefault(output.seq_id, []).append(output)
    return outputs


def text_of(outputs: list[SeqOutput]) -> str:
    ids = tokens(outputs)
    return bytes(ids[: len(ids) - (outputs[-1].stop_token_id is not None)]).decode()


RUNNERS = pytest.mark.parametrize("runner_type", [FakeRunner, LateGrammarRunner])


@RUNNERS
def test_every_text_fits_its_schema_and_the_others_are_what_they_are_alone(
    runner_type: type[FakeRunner],
) -> None:
    engine = engine_of(runner_type(next_token=drawn), max_num_seqs=8)
    for seq_id in range(20):
        engine.add(seq_id, [40 + seq_id], replace(PEOPLE, seed=seq_id) if seq_id % 2 else PLAIN)
    outputs = run(engine)
    for seq_id in range(20):
        if seq_id % 2:
            jsonschema_rs.validate(PERSON, json.loads(text_of(outputs[seq_id])))
            assert outputs[seq_id][-1].finish_reason == "stop"
        else:
            assert tokens(outputs[seq_id]) == counted_up(40 + seq_id, 30)
    assert_pool_is_whole(engine)


def test_late_tokens_make_the_same_texts() -> None:
    def serve(runner: FakeRunner) -> list[str]:
        engine = engine_of(runner, max_num_seqs=4)
        for seq_id in range(10):
            engine.add(seq_id, [40], replace(PEOPLE, seed=seq_id))
        outputs = run(engine)
        return [text_of(outputs[seq_id]) for seq_id in range(10)]

    assert serve(LateGrammarRunner(next_token=drawn)) == serve(FakeRunner(drawn))


def test_rows_without_a_grammar_are_launched_ahead_as_before() -> None:
    runner = LateGrammarRunner(next_token=drawn)
    engine = engine_of(runner)
    engine.add(0, [40], PLAIN)
    engine.add(1, [40], PEOPLE)
    run(engine)
    assert runner.max_unread > 1


@RUNNERS
def test_preempted_texts_go_on_where_they_were(runner_type: type[FakeRunner]) -> None:
    def serve(num_kv_blocks: int) -> tuple[list[str], int]:
        runner = runner_type(next_token=drawn, num_kv_blocks=num_kv_blocks, block_size=4)
        engine = engine_of(runner, max_model_len=80)
        for seq_id in range(6):
            engine.add(seq_id, [40] * 5, replace(PEOPLE, max_tokens=70, seed=seq_id))
        outputs = run(engine)
        num_preemptions = sum(outputs[seq_id][-1].num_preemptions for seq_id in range(6))
        return [text_of(outputs[seq_id]) for seq_id in range(6)], num_preemptions

    texts, num_preemptions = serve(num_kv_blocks=24)
    assert num_preemptions > 0
    assert texts == serve(num_kv_blocks=256)[0]


@RUNNERS
def test_a_mask_is_made_once_though_its_row_is_preempted_meanwhile(
    runner_type: type[FakeRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_made: Counter[GrammarState] = Counter()
    num_accepted: Counter[GrammarState] = Counter()
    fill, accept = GrammarState.fill, GrammarState.accept

    def fill_slowly(state: GrammarState) -> None:
        num_made[state] += 1
        time.sleep(0.005)  # some steps of the others
        fill(state)

    def accept_counted(state: GrammarState, token_id: int) -> None:
        num_accepted[state] += 1
        accept(state, token_id)

    monkeypatch.setattr(GrammarState, "fill", fill_slowly)
    monkeypatch.setattr(GrammarState, "accept", accept_counted)
    engine = engine_of(
        runner_type(next_token=drawn, num_kv_blocks=24, block_size=4), max_model_len=80
    )
    for seq_id in range(6):
        params = replace(PEOPLE if seq_id % 2 else PLAIN, max_tokens=70, seed=seq_id)
        engine.add(seq_id, [40] * 5, params)
    outputs = run(engine)
    assert sum(outputs[seq_id][-1].num_preemptions for seq_id in (1, 3, 5)) > 0
    assert {outputs[seq_id][-1].finish_reason for seq_id in range(6)} <= {"stop", "length"}
    assert all(num_made[state] <= num_accepted[state] for state in num_accepted)


@RUNNERS
def test_length_ends_a_text_that_is_not_complete(runner_type: type[FakeRunner]) -> None:
    engine = engine_of(runner_type(next_token=drawn))
    engine.add(0, [40], replace(PEOPLE, max_tokens=5))
    (output,) = run(engine)[0][-1:]
    assert output.finish_reason == "length"


def test_a_text_that_is_complete_at_the_last_token_is_not_cut() -> None:
    engine = engine_of()
    engine.add(0, [40], SamplingParams(max_tokens=3, grammar='start: "yes"'))
    outputs = run(engine)[0]
    assert text_of(outputs) == "yes"
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_token_id is None


@pytest.mark.parametrize("stop_token_ids", [(EOS,), ()])
def test_a_complete_text_ends_whatever_the_parameters_say(stop_token_ids: tuple[int, ...]) -> None:
    engine = engine_of()
    engine.add(
        0,
        [40],
        SamplingParams(
            max_tokens=50,
            min_tokens=20,
            stop_token_ids=stop_token_ids,
            grammar=r'start: "a" | ""',
        ),
    )
    outputs = run(engine)[0]
    assert text_of(outputs) in ("a", "")
    assert outputs[-1].finish_reason == "stop"


def test_a_bad_grammar_ends_its_sequence_alone_and_before_anything_is_computed() -> None:
    runner = FakeRunner(drawn)
    engine = engine_of(runner)
    engine.add(0, [40], replace(PEOPLE, grammar=of_schema({"type": "strin"})))
    (output,) = run(engine)[0]
    assert output.finish_reason == "error"
    assert output.is_request_fault
    assert output.error == "Invalid type: strin"
    assert not runner.batches
    engine.add(1, [40], replace(PEOPLE, grammar=of_schema({"type": "strin"})))
    engine.add(2, [40], PLAIN)
    outputs = run(engine)
    assert outputs[1][-1].is_request_fault
    assert tokens(outputs[2]) == counted_up(40, 30)
    assert_pool_is_whole(engine)


def test_a_missing_tokenizer_is_not_told_as_the_requests_fault() -> None:
    def load() -> Tokenizer:
        raise OSError("gone")

    engine = engine_of(load_tokenizer=load)
    engine.add(0, [40], PEOPLE)
    (output,) = run(engine)[0]
    assert output.finish_reason == "error"
    assert not output.is_request_fault


class SlowTokenizer(ByteTokenizer):
    def __init__(self, may_load: threading.Event) -> None:
        assert may_load.wait(60)


def test_the_others_do_not_wait_while_a_grammar_is_compiled() -> None:
    may_load = threading.Event()
    engine = engine_of(load_tokenizer=lambda: SlowTokenizer(may_load))
    engine.add(0, [40], PEOPLE)
    engine.add(1, [40], PLAIN)
    num_steps = 0
    while (step := engine.step()) is not None:
        num_steps += 1
        assert step.stats is not None
        assert step.stats.num_waiting == 1
        assert {output.seq_id for output in step.outputs} == {1}
    assert num_steps == PLAIN.max_tokens
    assert engine.has_work
    may_load.set()
    jsonschema_rs.validate(PERSON, json.loads(text_of(run(engine)[0])))


def test_a_sequence_may_be_aborted_while_its_grammar_is_compiled() -> None:
    may_load = threading.Event()
    engine = engine_of(load_tokenizer=lambda: SlowTokenizer(may_load))
    engine.add(0, [40], PEOPLE)
    assert engine.step() is None
    engine.abort(0)
    assert not engine.has_work
    may_load.set()
    engine.add(1, [40], PEOPLE)
    assert set(run(engine)) == {1}


def test_sequences_of_one_grammar_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    compiled: list[str] = []

    def compile_one(vocabulary: Vocabulary, text: str) -> LLMatcher:
        compiled.append(text)
        return new_matcher(vocabulary, text)

    monkeypatch.setattr("skipllm_core.grammar.compiler.new_matcher", compile_one)
    for seq_id in range(8):
        engine.add(seq_id, [40], replace(PEOPLE, seed=seq_id))
    texts = {text_of(outputs) for outputs in run(engine).values()}
    assert len(texts) > 1
    assert compiled == [PEOPLE.grammar]


class LateMaskRunner(FakeRunner):
    """Finds the masks of sequence 1 late, every other time."""

    num_late = 0

    def _row(self, batch: Batch, row: ScheduledSeq) -> RowResult:
        result = super()._row(batch, row)
        if row.seq.seq_id == 1 and batch.kind == "decode" and len(self.batches) % 2:
            self.num_late += 1
            return RowResult(None, is_late=True)
        return result


def test_a_row_whose_mask_is_late_is_computed_again_and_nothing_is_counted_twice() -> None:
    runner = LateMaskRunner(drawn)
    engine = engine_of(runner)
    engine.add(0, [40], PLAIN)
    engine.add(1, [40], PEOPLE)
    num_rows = num_tokens = 0
    outputs: dict[int, list[SeqOutput]] = {0: [], 1: []}
    while engine.has_work:
        step = engine.step()
        if step is None:
            continue
        assert step.stats is not None
        num_rows += sum(step.stats.ffn_computed[:1])  # none where all rows were late
        num_tokens += step.stats.num_generated_tokens
        for output in step.outputs:
            outputs[output.seq_id].append(output)
    assert runner.num_late > 3
    alone = engine_of()
    alone.add(1, [40], PEOPLE)
    assert text_of(outputs[1]) == text_of(run(alone)[1])
    assert tokens(outputs[0]) == counted_up(40, 30)
    assert num_tokens == num_rows + 2
    assert outputs[1][-1].skip_usage is not None
    assert outputs[1][-1].skip_usage.total_ffn_blocks == 4 * (len(tokens(outputs[1])) - 1)
    assert_pool_is_whole(engine)


def test_an_idle_engine_returns_while_a_grammar_is_compiled() -> None:
    may_load = threading.Event()
    engine = engine_of(load_tokenizer=lambda: SlowTokenizer(may_load))
    engine.add(0, [40], PEOPLE)
    for _ in range(3):
        assert engine.step() is None
        assert engine.has_work
    may_load.set()
    assert run(engine)[0][-1].finish_reason == "stop"


def test_a_panic_ends_its_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """What the extension raises when Rust panics is no Exception."""

    class Matcher:
        def __init__(self, matcher: LLMatcher) -> None:
            self._matcher = matcher

        def __getattr__(self, name: str) -> Any:
            return getattr(self._matcher, name)

        def consume_token(self, token_id: int) -> bool:
            raise Panic("it is broken\nin many lines")

    engine = engine_of()
    engine.add(0, [40], PEOPLE)
    engine.add(1, [40], PLAIN)
    engine.add(2, [40], replace(PEOPLE, grammar='start: "yes"'))
    begin = GrammarState.__init__

    def begin_broken(state: GrammarState, grammar: Grammar, params: SamplingParams) -> None:
        begin(state, grammar, params)
        if params is PEOPLE:
            state._matcher = Matcher(state._matcher)  # type: ignore[assignment]

    monkeypatch.setattr(GrammarState, "__init__", begin_broken)
    outputs = run(engine)
    assert outputs[0][-1].error == "it is broken"
    assert tokens(outputs[1]) == counted_up(40, 30)
    assert text_of(outputs[2]) == "yes"
    assert_pool_is_whole(engine)


def test_a_grammar_that_cannot_be_followed_ends_its_sequence_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begin(state: GrammarState, grammar: Grammar, params: SamplingParams) -> None:
        raise RuntimeError("a copy cannot be made")

    monkeypatch.setattr(GrammarState, "__init__", begin)
    engine = engine_of()
    engine.add(0, [40], PEOPLE)
    engine.add(1, [40], PLAIN)
    outputs = run(engine)
    assert outputs[0][-1].finish_reason == "error"
    assert not outputs[0][-1].is_request_fault
    assert tokens(outputs[1]) == counted_up(40, 30)
