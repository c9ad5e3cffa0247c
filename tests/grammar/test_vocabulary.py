"""llguidance sees the tokens as the detokenizer does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from skipllm_core.grammar.state import GrammarState
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SamplingParams
from tests.grammar.texts import allowed, compiled


@pytest.fixture
def tokenizer(tmp_path: Path) -> HFTokenizer:
    """Bytes, a pair, an added token that is text, and two that are not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"ab": 256, "abc": 257}
    library = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken("<call>", normalized=False)])  # 258
    library.add_special_tokens(["<|end|>", "[CALLS]"])  # 259, 260
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return HFTokenizer(tmp_path)


CALL, END, CALLS = 258, 259, 260


def first(tokenizer: HFTokenizer, text: str) -> list[int]:
    grammar = compiled(text, tokenizer, 300)
    return allowed(GrammarState(grammar, SamplingParams(max_tokens=9)).mask(), 300)


def spelled(tokenizer: HFTokenizer, token_ids: list[int]) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in token_ids]


def test_an_added_token_that_is_text_matches_its_text(tokenizer: HFTokenizer) -> None:
    found = spelled(tokenizer, first(tokenizer, 'start: "<call>" | "b"'))
    assert sorted(found) == [b"<", b"<call>", b"b"]


def test_a_special_token_matches_no_text(tokenizer: HFTokenizer) -> None:
    assert spelled(tokenizer, first(tokenizer, 'start: "[CALLS]" | "b"')) == [b"[", b"b"]
    assert CALLS not in first(tokenizer, r"start: /(.|\n)*/")


def test_a_special_token_is_named_by_its_id(tokenizer: HFTokenizer) -> None:
    assert first(tokenizer, f'start: <[{CALLS}]> "a"') == [CALLS]


def test_forced_text_is_split_as_the_tokenizer_splits_it(tokenizer: HFTokenizer) -> None:
    assert spelled(tokenizer, first(tokenizer, 'start: "abc"')) == [b"abc"]
    assert first(tokenizer, 'start: "<call>x"') == [CALL]


def test_forced_text_that_spells_a_special_token_stays_text(tokenizer: HFTokenizer) -> None:
    found = first(tokenizer, 'start: "<|end|>!"')
    assert END not in found
    assert spelled(tokenizer, found) == [b"<"]


def test_a_tokenizer_that_puts_a_space_in_front_is_not_asked_twice(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "▁a": 3, "a": 4, "b": 5, "ab": 6, "<0x0A>": 7}
    library = Tokenizer(models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    library.decoder = decoders.Metaspace(prepend_scheme="always")
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer = HFTokenizer(tmp_path)
    grammar = compiled('start: "ab"', tokenizer, 16)
    assert allowed(GrammarState(grammar, SamplingParams(max_tokens=9)).mask(), 16) == [6]


def test_without_an_end_of_sequence_token_texts_still_end(tmp_path: Path) -> None:
    library = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    library.decoder = decoders.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    grammar = compiled("start: /a{1,2}/", HFTokenizer(tmp_path), 4)
    state = GrammarState(grammar, SamplingParams(max_tokens=9))
    state.accept(0)
    state.fill()
    assert allowed(state.mask(), 4) == [0]
    state.accept(0)
    assert state.is_complete
