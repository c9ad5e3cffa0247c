"""Text as it comes: whole characters, no part of a stop string, whatever the split."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipllm_core.detokenizer import Detokenizer, whole_text
from skipllm_core.tokenizer import ByteTokenizer, Tokenizer

# Few letters, so that stop strings occur; several bytes each, so that splits fall inside them.
TEXTS = st.text(alphabet="ab\n é漢🦊", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n é🦊", min_size=1, max_size=4), max_size=3).map(tuple)


class PieceTokenizer(ByteTokenizer):
    """A vocabulary of given pieces of bytes: a token may hold half a character, or several."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def is_special(self, token_id: int) -> bool:
        return False


def split(raw: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    return [raw[a:b] for a, b in itertools.pairwise(bounds)]


def deltas_of(pieces: list[bytes], stop: tuple[str, ...] = (), **options: bool) -> list[str]:
    """What is released after each token until a stop string ends it, and at the end."""
    detokenizer = Detokenizer(PieceTokenizer(pieces), stop=stop, **options)
    deltas = []
    for token_id in range(len(pieces)):
        deltas.append(detokenizer.add(token_id))
        if detokenizer.stopped_by is not None:
            return deltas
    return [*deltas, detokenizer.flush()]


def text_of(ids: list[int], tokenizer: Tokenizer | None = None, **options: bool) -> str:
    detokenizer = Detokenizer(tokenizer or ByteTokenizer(), **options)
    return "".join(map(detokenizer.add, ids)) + detokenizer.flush()


@given(TEXTS, st.lists(st.integers(0, 1000)))
def test_any_split_into_tokens_gives_the_text(text: str, cuts: list[int]) -> None:
    assert "".join(deltas_of(split(text.encode(), cuts))) == text


@given(TEXTS, st.lists(st.integers(0, 1000)), STOPS)
def test_any_split_stops_at_the_same_place(
    text: str, cuts: list[int], stop: tuple[str, ...]
) -> None:
    bytewise = deltas_of([bytes([byte]) for byte in text.encode()], stop)
    assert "".join(deltas_of(split(text.encode(), cuts), stop)) == "".join(bytewise)


@given(TEXTS, st.lists(st.integers(0, 1000)), STOPS)
def test_no_stop_string_ever_shows_nor_anything_that_became_one(
    text: str, cuts: list[int], stop: tuple[str, ...]
) -> None:
    shown = "".join(deltas_of(split(text.encode(), cuts), stop))
    assert not any(s in shown for s in stop)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if ends:
        first = min(ends)
        assert shown == min(
            (text[: first - len(s)] for s in stop if text[:first].endswith(s)), key=len
        )
    else:
        assert shown == text


@given(TEXTS, st.lists(st.integers(0, 1000)), STOPS.filter(bool))
def test_an_included_stop_string_is_the_end_of_the_text(
    text: str, cuts: list[int], stop: tuple[str, ...]
) -> None:
    shown = "".join(deltas_of(split(text.encode(), cuts), stop, include_stop=True))
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert shown == (text[: min(ends)] if ends else text)


@given(st.binary(max_size=40), st.lists(st.integers(0, 1000)))
def test_bytes_that_are_no_text_become_replacement_characters(raw: bytes, cuts: list[int]) -> None:
    whole = raw.decode(errors="replace")
    shown = "".join(deltas_of(split(raw, cuts)))
    assert shown in (whole, whole.removesuffix("\ufffd"))  # an unfinished character at the end


@given(TEXTS, st.lists(st.integers(0, 1000)))
def test_every_delta_is_whole_characters(text: str, cuts: list[int]) -> None:
    for delta in deltas_of(split(text.encode(), cuts)):
        assert "\ufffd" not in delta


def test_text_that_may_become_a_stop_string_is_held_back_and_then_released() -> None:
    pieces = [b"a", b"\n", b"\n", b"b"]
    assert deltas_of(pieces, ("\n\nc",)) == ["a", "", "", "\n\nb", ""]


def test_what_is_held_at_the_end_is_released() -> None:
    assert deltas_of([b"a", b"EN"], ("END",)) == ["a", "", "EN"]


def test_of_two_stop_strings_the_one_completed_first_ends_the_text() -> None:
    assert "".join(deltas_of([b"x", b"abc"], ("abc", "b"))) == "xa"


def test_an_unfinished_character_at_the_end_is_not_shown() -> None:
    assert "".join(deltas_of([b"ok", "🦊".encode()[:3]])) == "ok"


def test_special_tokens_are_text_only_when_asked_for() -> None:
    ids = [*b"hi", ByteTokenizer.EOS]
    assert text_of(ids) == "hi"
    assert text_of(ids, skip_special_tokens=False) == "hi</s>"


def test_special_tokens_that_a_parser_needs_are_shown() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), shown_tokens=[ByteTokenizer.EOS])
    ids = [ByteTokenizer.BOS, *b"hi", ByteTokenizer.EOS]
    assert "".join(map(detokenizer.add, ids)) == "hi</s>"


def test_text_that_is_not_searched_releases_what_is_held_and_stops_nothing() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), stop=("ab",))
    assert detokenizer.add(ord("a")) == ""
    assert detokenizer.add(ord("b"), is_searched=False) == "ab"
    assert detokenizer.stopped_by is None
    assert detokenizer.add(ord("a")) == ""
    detokenizer.add(ord("b"))
    assert detokenizer.stopped_by == "ab"


@pytest.mark.parametrize("is_shown", [True, False])
@pytest.mark.parametrize("is_included", [True, False])
def test_a_stop_string_that_spells_a_special_token_ends_at_it_shown_or_not(
    is_shown: bool, is_included: bool
) -> None:
    detokenizer = Detokenizer(
        ByteTokenizer(),
        stop=("xyz", "</s>"),
        include_stop=is_included,
        skip_special_tokens=not is_shown,
    )
    texts = [detokenizer.add(i) for i in (*b"ax", ByteTokenizer.EOS)]
    assert detokenizer.stopped_by == "</s>"
    assert "".join(texts) == "ax" + "</s>" * is_included


def test_a_special_token_that_is_no_stop_string_releases_nothing() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), stop=("xyz",))
    ids = (*b"ax", ByteTokenizer.EOS, *b"y")
    assert [detokenizer.add(i) for i in ids] == ["a", "", "", ""]
    assert detokenizer.add(ord("z")) == ""
    assert detokenizer.stopped_by == "xyz"


def test_a_special_tokens_stop_string_counts_from_min_tokens_on_too() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), stop=("</s>",), min_tokens=1)
    detokenizer.add(ByteTokenizer.EOS)
    assert detokenizer.stopped_by is None
    detokenizer.add(ByteTokenizer.EOS)
    assert detokenizer.stopped_by == "</s>"


@given(TEXTS, st.integers(0, 1000), st.lists(st.integers(0, 1000)))
def test_a_text_goes_on_inside_a_character(text: str, cut: int, cuts: list[int]) -> None:
    raw = text.encode()
    cut %= len(raw) + 1
    pieces = split(raw, [*cuts, cut])
    num_prompt = 0
    while b"".join(pieces[:num_prompt]) != raw[:cut]:
        num_prompt += 1
    ids = list(range(len(pieces)))
    tokenizer = PieceTokenizer(pieces)
    detokenizer = Detokenizer(tokenizer, prompt_ids=ids[:num_prompt])
    said = "".join(map(detokenizer.add, ids[num_prompt:]))
    assert whole_text(tokenizer, ids[:num_prompt]) == raw[:cut].decode(errors="ignore")
    assert whole_text(tokenizer, ids[:num_prompt]) + said == text


def test_a_prompt_that_ends_inside_what_is_no_character_leaves_nothing_behind() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), prompt_ids=[0xF0, 0x9F, 0x41, 0x80])
    assert detokenizer.add(ord("a")) == "a"
    assert Detokenizer(ByteTokenizer(), prompt_ids=[0xF0, 0x9F]).add(ord("a")) == "\ufffda"


def test_ids_without_a_text_are_silent() -> None:
    assert text_of([104, 300, 105]) == "hi"


def test_stop_strings_are_not_searched_in_the_first_min_tokens() -> None:
    detokenizer = Detokenizer(ByteTokenizer(), stop=("a",), min_tokens=2)
    assert "".join(map(detokenizer.add, b"aaba"[:3])) == "aab"
    assert detokenizer.add(ord("a")) == ""
    assert detokenizer.stopped_by == "a"
