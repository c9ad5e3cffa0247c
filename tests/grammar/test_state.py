"""Which tokens may come next, and when a text is over."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, width: {"type": "integer", "minimum": low, "maximum": low + width},
        st.integers(-1000, 1000),
        st.integers(0, 5000),
    ),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 8)),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.one_of(st.text(max_size=5), st.integers(-9, 9), st.none()), min_size=1),
    ),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-z]{1,3}[0-9]$"},
            {"type": "string", "format": "date"},
            {"type": ["boolean", "null"]},
            {"const": {"a": [1]}},
        ]
    ),
)


def schemas_of(parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(
            lambda items, most: {"type": "array", "items": items, "maxItems": most},
            parts,
            st.integers(0, 3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(parts, min_size=1, max_size=3)),
        st.builds(
            lambda properties, is_required: {
                "type": "object",
                "properties": properties,
                "required": list(properties) if is_required else [],
                "additionalProperties": False,
            },
            st.dictionaries(st.text(max_size=6), parts, max_size=4),
            st.booleans(),
        ),
    )


@settings(deadline=None, max_examples=60)
@given(st.recursive(SCALARS, schemas_of, max_leaves=8), st.integers(0, 10))
def test_whatever_is_drawn_under_any_schema_fits_it(schema: dict[str, Any], seed: int) -> None:
    text = bytes(random_text(state_of(compact(schema)), random.Random(seed), 5000))
    jsonschema_rs.validate(schema, json.loads(text))


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
