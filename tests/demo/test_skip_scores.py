"""The multiple-choice questions that scoring asks the embedded model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from skipllm_core.config import EngineConfig
from skipllm_core.demo import MODEL_DIR
from skipllm_core.demo.training.skip_scores import NUM_CHOICES, Item, choice_set, score
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SkipParams
from skipllm_core.worker import build_engine


def test_a_question_has_one_right_answer_and_others_of_its_kind() -> None:
    items = choice_set(50)
    assert items == choice_set(50)
    assert len({item.question for item in items}) > 40
    for item in items:
        assert len(set(item.answers)) == NUM_CHOICES


def test_the_model_chooses_what_it_knows_and_skipping_shows_in_its_scores() -> None:
    engine, tokenizer = build_engine(EngineConfig(model_dir=MODEL_DIR)), HFTokenizer(MODEL_DIR)
    items = choice_set(12)
    full = score(engine, tokenizer, items, SkipParams())
    assert full.accuracy == 1.0
    assert -0.1 < full.logprob < 0
    assert full.token_skip_ratio == 0
    upside_down = [Item(item.question, item.answers[::-1]) for item in items]
    assert score(engine, tokenizer, upside_down, SkipParams()).accuracy == 0.0
    half = SkipParams(policy="static", layers=(1, 3, 4, 6, 8, 10), warmup_tokens=0, prompt=True)
    skipping = score(engine, tokenizer, items, half)
    assert skipping.token_skip_ratio == pytest.approx(0.5)
    assert skipping.logprob < full.logprob - 0.02
    plain = score(engine, tokenizer, items, replace(half, prompt=False))
    assert plain.logprob == pytest.approx(full.logprob, abs=1e-4)
