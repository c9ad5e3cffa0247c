"""Which tokens may come next, and when a text is over."""

from __future__ import annotations

import json
import random

import jsonschema_rs
import pytest

from skipllm_core.grammar.state import DEAD_END
from tests.grammar.texts import (
    EOS,
    PERSON,
    VOCAB,
    allowed,
    compact,
    feed,
    of_schema,
    random_text,
    state_of,
)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_drawn_from_the_masks_fits_the_schema(seed: int) -> None:
    text = bytes(random_text(state_of(compact(PERSON)), random.Random(seed)))
    jsonschema_rs.validate(PERSON, json.loads(text))


def test_ids_beyond_the_tokenizer_are_never_allowed() -> None:
    state = state_of(r"start: /(.|\n)*/")
    assert max(allowed(state.mask())) == EOS
    assert len(state.mask() or b"") * 8 >= VOCAB


def test_control_tokens_are_no_text() -> None:
    assert 256 not in allowed(state_of(r"start: /(.|\n)*/").mask())


def test_a_text_that_may_end_may_also_go_on() -> None:
    state = feed(state_of("start: /a+/"), b"aa")
    assert not state.is_complete
    assert allowed(state.mask()) == [ord("a"), EOS]
    assert state.ends_with(EOS)
    assert not state.ends_with(ord("a"))


def test_a_text_that_may_not_go_on_is_complete_without_a_token_more() -> None:
    state = feed(state_of('start: "yes" | "no"'), b"no")
    assert state.is_complete


def test_every_stop_token_of_the_sequence_ends_a_text_that_may_end() -> None:
    state = state_of("start: /a+/", stop_token_ids=(EOS, ord("z")))
    assert allowed(state.mask()) == [ord("a")]
    feed(state, b"a")
    assert allowed(state.mask()) == [ord("a"), ord("z"), EOS]
    assert state.ends_with(ord("z"))


def test_without_stop_tokens_a_text_goes_on_while_it_can() -> None:
    state = feed(state_of("start: /a{1,3}/", stop_token_ids=()), b"aa")
    assert allowed(state.mask()) == [ord("a")]
    assert feed(state, b"a").is_complete


def test_min_tokens_puts_off_the_end_of_what_can_go_on_and_no_other() -> None:
    state = feed(state_of("start: /a+/", min_tokens=3), b"aa")
    assert allowed(state.mask()) == [ord("a")]
    assert allowed(feed(state, b"a").mask()) == [ord("a"), EOS]
    assert feed(state_of('start: "a"', min_tokens=3), b"a").is_complete


@pytest.mark.parametrize("stop_token_ids", [(EOS,), ()])
def test_an_empty_text_can_be_all_that_is_allowed(stop_token_ids: tuple[int, ...]) -> None:
    state = state_of('start: ""', stop_token_ids=stop_token_ids, min_tokens=5)
    assert allowed(state.mask()) == [EOS]
    assert state.ends_with(EOS)


def test_where_nothing_is_left_to_say_the_state_has_an_error() -> None:
    state = state_of("start: /a{3}/", stop_token_ids=(ord("a"),), min_tokens=2)
    assert state.mask() is None
    assert state.error == DEAD_END
    assert state.is_ready


def test_copies_of_a_grammar_do_not_know_each_other() -> None:
    first, second = state_of('start: "ab"'), state_of('start: "ab"')
    feed(first, b"a")
    assert allowed(second.mask()) == [ord("a")]
    assert allowed(first.mask()) == [ord("b")]


def test_a_mask_that_is_not_there_is_late_and_not_waited_for() -> None:
    state = state_of("start: /a+/")
    state.accept(ord("a"))
    assert state.mask(timeout_s=0) is None
    assert state.is_late
    assert state.error is None
    state.fill()
    assert state.mask(timeout_s=0) is not None
    assert not state.is_late


def test_json_has_no_space_around_it() -> None:
    assert allowed(state_of(of_schema({"type": "object"})).mask()) == [ord("{")]
