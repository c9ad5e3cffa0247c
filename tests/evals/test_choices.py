"""Multiple choice: what is scored, and under which settings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from skipllm_core.evals.choices import choose
from skipllm_core.evals.engine_backend import EngineBackend
from skipllm_core.evals.records import FULL, Record, Setting
from skipllm_core.evals.tasks import Item
from skipllm_core.tokenizer import ByteTokenizer
from skipllm_core.types import (
    SamplingParams,
    SeqOutput,
    SkipParams,
    SkipUsage,
    StepOutput,
    TokenLogprobs,
)

ITEM = Item(
    task="multiple_choice", id="c", group="g", turns=("zzz?",), accepted=("aa",),
    choices=("aa", "b", "zzzz"),
)  # fmt: skip
SKIPPING = SkipParams(policy="neurons", up_thresholds=(0.1,), warmup_tokens=25)


class ByLetter:
    """An engine whose tokens are the likelier the earlier in the alphabet; in two parts."""

    info = SimpleNamespace(max_model_len=100, skip_policies=("never",))

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []
        self._queue: list[SeqOutput] = []

    def add(self, seq_id: int, prompt_ids: list[int], params: SamplingParams) -> None:
        self.asked.append(params)
        found = tuple(TokenLogprobs(-float(one), (), ()) for one in prompt_ids[1:])
        usage = SkipUsage(total_ffn_blocks=10, skipped_ffn_rows=3, total_ffn_rows=30)
        self._queue += [
            SeqOutput(seq_id=seq_id, prompt_logprobs=found[:4]),
            SeqOutput(
                seq_id=seq_id, prompt_logprobs=found[4:], finish_reason="length", skip_usage=usage
            ),
        ]

    def step(self) -> StepOutput | None:
        if not self._queue:
            return None
        return StepOutput(outputs=(self._queue.pop(0),), stats=cast(Any, None))


def test_the_choice_of_the_highest_sum_is_taken_and_the_question_is_not_scored() -> None:
    items = [ITEM, replace(ITEM, id="d", turns=("a longer one?",), choices=("zz", "zy", "zzz"))]
    records = list(choose(cast(Any, ByLetter()), ByteTokenizer(), items, FULL, SKIPPING))
    assert [record.answers for record in records] == [("b",), ("zy",)]
    first = records[0]
    assert (first.skipped_ffn_blocks, first.total_ffn_blocks) == (3.0, 30)


def test_question_and_choice_are_computed_under_the_setting_from_their_second_token_on() -> None:
    engine = ByLetter()
    list(choose(cast(Any, engine), ByteTokenizer(), [ITEM], FULL, SKIPPING))
    assert len(engine.asked) == 3
    for params in engine.asked:
        assert params.max_tokens == 0
        assert params.skip == replace(SKIPPING, prompt=True, warmup_tokens=0)


def test_a_backend_chooses_where_there_are_choices() -> None:
    backend = EngineBackend(cast(Any, ByLetter()), ByteTokenizer(), None, 9)
    (record,) = backend.lead([ITEM], Setting(policy="never", ratio=0))
    assert isinstance(record, Record)
    assert record.answers == ("b",)
