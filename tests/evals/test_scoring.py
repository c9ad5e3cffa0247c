"""Scores on answers written by hand."""

from __future__ import annotations

import pytest

from skipllm_core.evals.scoring import (
    bootstrap,
    contains_answer,
    exact_match,
    is_collapsed,
    is_repetitive,
    normalise,
    rouge,
    wilson,
)


def test_case_articles_punctuation_and_spaces_do_not_count() -> None:
    assert normalise("  The  U.S.A.,\nan Answer! ") == "usa answer"
    assert normalise("Theatre") == "theatre"  # an article is a word, not a beginning


def test_any_alias_is_an_exact_match_and_a_longer_answer_is_none() -> None:
    assert exact_match("The Beatles.", ["Fab Four", "beatles"])
    assert not exact_match("The Beatles and others", ["beatles"])


def test_a_contained_answer_is_whole_words() -> None:
    assert contains_answer("It was the Beatles, in 1962.", ["Beatles"])
    assert not contains_answer("Romeo", ["Rome"])
    assert not contains_answer("anything", ["The"])


def test_rouge_on_numbers_by_hand() -> None:
    # Unigrams: 2 of 2 and 2 of 3; bigrams: "a c" is not in "a b c"; LCS is 2.
    scores = rouge("a c", "a b c")
    assert scores["rouge1"] == pytest.approx(0.8)
    assert scores["rouge2"] == 0
    assert scores["rougeL"] == pytest.approx(0.8)


def test_repetition_is_four_pieces_three_times() -> None:
    assert is_repetitive("we saw it then " * 3)
    assert not is_repetitive("we saw it then " * 2)
    assert not is_repetitive("")


def test_collapse_is_a_tail_of_one_piece() -> None:
    assert is_collapsed("Well: " + "no " * 8)
    assert is_collapsed("!" * 8)
    assert not is_collapsed("no " * 7)
    assert not is_collapsed("no " * 8 + "yes")


def test_wilson_against_the_textbook() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == 1
    assert wilson(0, 0) == (0, 1)


def test_bootstrap_surrounds_the_mean_and_repeats() -> None:
    values = [0.0, 0.5, 1.0] * 20
    low, high = bootstrap(values)
    assert low < 0.5 < high
    assert high - low < 0.3
    assert bootstrap(values) == (low, high)
