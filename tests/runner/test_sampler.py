"""The sampler: each setting against transformers' own processor, and every row on its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from skipllm_core.runner.sampler import adjust_logits, filter_logits, sample
from skipllm_core.sequence import Sequence
from skipllm_core.types import SamplingParams

VOCAB = 48
GREEDY = SamplingParams(max_tokens=64, temperature=0)
RANDOM = SamplingParams(max_tokens=64, seed=1234)


def seq(
    params: SamplingParams, *, prompt: tuple[int, ...] = (1, 2, 3), output: Iterable[int] = ()
) -> Sequence:
    sequence = Sequence(0, list(prompt), params)
    sequence.token_ids += output
    return sequence


def random_logits(num_rows: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def tokens(logits: Tensor, *seqs: Sequence) -> list[int | None]:
    return [row.token_id for row in sample(logits, list(seqs))]


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = random_logits(5)
    assert tokens(logits, *[seq(GREEDY)] * 5) == logits.argmax(-1).tolist()


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = random_logits(2)
    before = logits.clone()
    params = replace(RANDOM, top_k=3, presence_penalty=1.0, logit_bias=((1, 9.0),))
    sample(logits, [seq(params)] * 2)
    assert torch.equal(logits, before)


# Filters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 2.0])
def test_temperature_scales_the_distribution_as_in_transformers(temperature: float) -> None:
    logits = random_logits(3)
    ours = filter_logits(logits, [replace(RANDOM, temperature=temperature)] * 3)
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize(
    ("change", "warper"),
    [
        ({"top_k": 1}, TopKLogitsWarper(1)),
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_k": VOCAB + 1}, TopKLogitsWarper(VOCAB)),
        ({"top_p": 0.05}, TopPLogitsWarper(0.05)),
        ({"top_p": 0.9}, TopPLogitsWarper(0.9)),
        ({"top_p": 0.999}, TopPLogitsWarper(0.999)),
        ({"min_p": 0.02}, MinPLogitsWarper(0.02)),
        ({"min_p": 0.5}, MinPLogitsWarper(0.5)),
        ({"min_p": 1.0}, MinPLogitsWarper(1.0)),
    ],
)
def test_each_filter_leaves_what_transformers_leaves(change: dict[str, float], warper) -> None:
    logits = random_logits(20)
    ours = filter_logits(logits, [replace(RANDOM, **change)] * 20)
    torch.testing.assert_close(ours.softmax(-1), warper(None, logits.clone()).softmax(-1))


def test_filters_apply_in_the_order_min_p_top_k_top_p() -> None:
    logits = random_logits(30)
    params = replace(RANDOM, temperature=1.5, min_p=0.02, top_k=12, top_p=0.85)
    theirs = logits.clone()
    for warper in (
        TemperatureLogitsWarper(1.5),
        MinPLogitsWarper(0.02),
        TopKLogitsWarper(12),
        TopPLogitsWarper(0.85),
    ):
        theirs = warper(None, theirs)
    ours = filter_logits(logits, [params] * 30)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


def test_equal_logits_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([[3.0, 1.0, 3.0, 3.0, 0.0]])
    for change in ({"top_k": 2}, {"top_p": 0.4}):
        kept = filter_logits(logits, [replace(RANDOM, **change)]).isfinite()
        assert kept.tolist() == [[True, False, True, True, False]]


def test_a_filter_of_one_row_does_not_touch_another() -> None:
    logits = random_logits(3)
    params = [RANDOM, replace(RANDOM, top_k=2), replace(RANDOM, top_p=0.3)]
    kept = filter_logits(logits, params).isfinite().sum(-1).tolist()
    assert kept[:2] == [VOCAB, 2]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-4])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = random_logits(8)
    rows = [seq(replace(RANDOM, temperature=temperature, seed=n)) for n in range(8)]
    assert tokens(logits, *rows) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("top_p", [0.0, 1e-300, 1e-46, 1e-12])
@pytest.mark.parametrize("top_k", [0, 7])
def test_the_best_token_is_kept_however_small_top_p_is(top_p: float, top_k: int) -> None:
    logits = random_logits(8)
    params = replace(RANDOM, top_p=top_p, top_k=top_k)
    rows = [seq(replace(params, seed=n)) for n in range(8)]
    assert tokens(logits, *rows) == logits.argmax(-1).tolist()
    assert filter_logits(logits, [params] * 8).isfinite().sum(-1).tolist() == [1] * 8


# Adjustments -------------------------------------------------------------------------------------


def test_repetition_penalty_covers_prompt_and_output_as_in_transformers() -> None:
    logits = random_logits(1)
    row = seq(replace(GREEDY, repetition_penalty=1.7), prompt=(5, 5, 9), output=[0, VOCAB - 1])
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([row.token_ids]), logits.clone())
    torch.testing.assert_close(adjust_logits(logits, [row]), theirs)


@pytest.mark.parametrize("penalty", [1e-20, 1e-40, 1e-46, 5e-324])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_best_token_is_kept_however_small_the_repetition_penalty_is(
    penalty: float, temperature: float
) -> None:
    logits = random_logits(8)
    params = replace(RANDOM, repetition_penalty=penalty, temperature=temperature)
    rows = [seq(params, prompt=(n, n + 20, n + 30), output=[n + 10]) for n in range(8)]
    seen = torch.tensor([row.token_ids for row in rows])
    best = seen.gather(1, logits.gather(1, seen).argmax(-1, keepdim=True))[:, 0]
    assert (logits.gather(1, best[:, None]) > 0).all(), "a repeated token becomes the best"
    assert tokens(logits, *rows) == best.tolist()


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.zeros(1, VOCAB)
    params = replace(GREEDY, presence_penalty=0.5, frequency_penalty=0.25)
    adjusted = adjust_logits(logits, [seq(params, prompt=(7, 8), output=[8, 9, 9, 9])])
    expected = {8: -0.75, 9: -1.25}
    assert {i: v for i, v in enumerate(adjusted[0].tolist()) if v} == expected


def test_penalties_of_one_row_do_not_touch_another() -> None:
    logits = random_logits(3)
    penalised = seq(replace(GREEDY, frequency_penalty=2.0), output=[4, 4])
    adjusted = adjust_logits(logits, [seq(GREEDY, output=[4]), penalised, seq(RANDOM, output=[4])])
    assert torch.equal(adjusted[[0, 2]], logits[[0, 2]])
    assert adjusted[1, 4] == logits[1, 4] - 4.0


def test_logit_bias_forces_and_forbids_tokens_up_to_the_last_id() -> None:
    logits = random_logits(2)
    best = int(logits[1].argmax())
    forced = seq(replace(GREEDY, logit_bias=((VOCAB - 1, 100.0), (0, 1.0))))
    forbidden = seq(replace(RANDOM, logit_bias=((best, -100.0),)))
    first, second = tokens(logits, forced, forbidden)
    assert first == VOCAB - 1
    assert second != best


def test_ids_beyond_the_logits_are_ignored() -> None:
    logits = random_logits(1)
    biased = replace(GREEDY, logit_bias=((VOCAB, 100.0), (-1, 100.0)))
    barred = replace(GREEDY, min_tokens=4, stop_token_ids=(VOCAB, 10**12))
    for params in (biased, barred):
        assert torch.equal(adjust_logits(logits, [seq(params)]), logits)


def test_stop_tokens_cannot_come_before_min_tokens() -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    params = replace(GREEDY, min_tokens=2, stop_token_ids=(best, 3))
    assert tokens(logits, seq(params, output=[9])) != [best]
    assert tokens(logits, seq(params, output=[9, 9])) == [best]


# Randomness --------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 3.0]])
    num_draws = 4000
    rows = [seq(replace(RANDOM, seed=n)) for n in range(num_draws)]
    counts = Counter(tokens(logits.expand(num_draws, -1), *rows))
    for token, p in enumerate(logits.softmax(-1)[0].tolist()):
        # Five standard deviations of a binomial: the seeds are fixed, so it holds or it does not.
        assert abs(counts[token] - num_draws * p) < 5 * math.sqrt(num_draws * p * (1 - p))


def test_successive_tokens_of_a_seed_follow_the_distribution_too() -> None:
    num_draws = 2000
    rows = [seq(RANDOM, output=[0] * n) for n in range(num_draws)]
    counts = Counter(tokens(torch.zeros(num_draws, 4), *rows))
    tolerance = 5 * math.sqrt(num_draws * 3 / 16)
    assert all(abs(counts[token] - num_draws / 4) < tolerance for token in range(4))


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others() -> None:
    logits = torch.zeros(40, VOCAB)

    def draw(seed: int) -> list[int | None]:
        params = replace(RANDOM, seed=seed)
        return tokens(logits, *[seq(params, output=[0] * n) for n in range(40)])

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(7) != draw(7 + 2**32)
    assert draw(-(2**63)) != draw(2**63 - 1)


settings_of_a_row = st.builds(
    SamplingParams,
    max_tokens=st.just(64),
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    top_k=st.integers(0, VOCAB + 2),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 1.0]),
    frequency_penalty=st.sampled_from([-2.0, 0.0, 1.0]),
    logit_bias=st.sampled_from([(), ((0, 5.0), (VOCAB - 1, -100.0))]),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 1, 20]),
    stop_token_ids=st.sampled_from([(), (0, 5, VOCAB - 1)]),
)
rows_of_a_batch = st.lists(
    st.tuples(settings_of_a_row, st.lists(st.integers(0, VOCAB - 1), max_size=6)),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=150)
@given(rows_of_a_batch, st.integers(0, 2**31))
def test_a_row_gets_what_it_would_get_alone(rows, seed: int) -> None:
    seqs = [seq(params, output=output) for params, output in rows]
    logits = random_logits(len(rows), seed)
    together = sample(logits, seqs)
    assert together == [sample(logits[n : n + 1], [row])[0] for n, row in enumerate(seqs)]


# Logprobs ----------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = random_logits(1)
    params = replace(RANDOM, temperature=0.2, top_k=1, presence_penalty=2.0, logprobs=3)
    row = sample(logits, [seq(params, output=[int(logits.argmax())])])[0]
    raw = logits.log_softmax(-1)[0]
    assert row.logprobs is not None
    assert row.logprobs.logprob == pytest.approx(raw[row.token_id].item())
    assert row.logprobs.top_ids == tuple(raw.topk(3).indices.tolist())
    assert row.logprobs.top_logprobs == pytest.approx(raw.topk(3).values.tolist())


def test_each_row_gets_as_many_logprobs_as_it_asked_for() -> None:
    rows = [seq(replace(GREEDY, logprobs=count)) for count in (None, 0, 5, VOCAB + 9)]
    results = sample(random_logits(4), rows)
    assert results[0].logprobs is None
    assert [len(row.logprobs.top_ids) for row in results[1:]] == [0, 5, VOCAB]


# Broken logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [GREEDY, replace(RANDOM, top_p=0.5, logprobs=2)])
def test_a_row_that_is_not_finite_fails_alone(broken: float, params: SamplingParams) -> None:
    logits = random_logits(3)
    healthy = sample(logits, [seq(params)] * 3)
    logits[1, 17] = broken
    results = sample(logits, [seq(params)] * 3)
    assert results[1].token_id is None
    assert results[1].error
    assert [results[0], results[2]] == [healthy[0], healthy[2]]
