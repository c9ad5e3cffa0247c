"""Texts and chats of a GGUF file become the ids that transformers makes of the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from transformers import AutoTokenizer

from skipllm_core.errors import UnsupportedModelError
from skipllm_core.model.hub import resolve_model
from skipllm_core.tokenizer import HFTokenizer
from tests.model.checkpoints import make_oracle
from tests.model.gguf.files import CHATML, Edit, Vocabulary, byte_level, sentencepiece, write_gguf

PAGE = """\
The quick brown fox can't jump; it'LL rest. Don't — it's 12345 o'clock, 3.14159 or 1,000,000!
  Two spaces, tabs\tand\t\tmore, trailing   \n\n\n\tdef f(x: int) -> str:  # code
for (int i = 0; i < 10; ++i) { a[i] <<= 2; } // https://example.org/a?b=c&d=%20#e
Ελληνικά, русский, 中文字符和标点。日本語のテキスト、한국어, العربية, עברית, हिन्दी, ไทย
naïve café Ångström ﬁ ½ ² ① 😀👍🏽👩‍👩‍👧‍👦🇩🇪 ❤️ ∑∫√≤ ←→ camelCaseHTTPServer SHOUTING
<tool_call>{"name": "f"}</tool_call><|im_end|> and <|nothing|> and [PAD3] and \u200b\ufeff
"""
CHAT = [
    {"role": "user", "content": "What is  2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "naïve 😀"},
]
Pair = tuple[HFTokenizer, Any]


def both(
    file: Path, vocabulary: Vocabulary, *, edit: Edit | None = None, template: Any = CHATML
) -> Pair:
    oracle = make_oracle("llama2", num_hidden_layers=1, vocab_size=len(vocabulary.tokens))
    write_gguf(file, oracle, vocabulary=vocabulary, edit=edit, template=template)
    ours = HFTokenizer(resolve_model(str(file)))
    return ours, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.mark.parametrize(
    "pre", ["qwen2", "llama-bpe", "llama3", "tekken", "gpt-2", "default", "deepseek-r1-qwen"]
)
def test_a_page_of_mixed_text_has_transformers_ids(tmp_path: Path, pre: str) -> None:
    ours, theirs = both(tmp_path / "model.gguf", byte_level(pre))
    ids = ours.encode(PAGE, add_special_tokens=False)
    assert ids == theirs.encode(PAGE, add_special_tokens=False)
    assert ours.decode(ids) == PAGE


def test_a_page_in_sentencepiece_has_transformers_ids(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path / "model.gguf", sentencepiece())
    for text in (PAGE, "fox", " fox", "  the quick"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ids[0] == 1
        assert ours.decode(ids) == theirs.decode(ids)
    assert b"".join(map(ours.token_bytes, ours.encode("😀", add_special_tokens=False))) == (
        b" " + "😀".encode()
    )


@pytest.mark.parametrize("vocabulary", [byte_level(), sentencepiece()], ids=["bytes", "pieces"])
def test_a_chat_has_transformers_ids(tmp_path: Path, vocabulary: Vocabulary) -> None:
    ours, theirs = both(tmp_path / "model.gguf", vocabulary)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(CHAT) == expected


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "refact"])
def test_digits_stand_alone_where_the_models_were_trained_so(tmp_path: Path, pre: str) -> None:
    """transformers reads these files with GPT-2's rule; the models' own tokenizers, and llama.cpp,
    have every number character by itself."""
    ours, _ = both(tmp_path / "model.gguf", byte_level(pre))
    pieces = [ours.token_piece(i) for i in ours.encode("jumps 2024 in")]
    assert pieces[-6:] == ["Ġ", "2", "0", "2", "4", "Ġin"]
    gpt2, _ = both(tmp_path / "gpt-2.gguf", byte_level("gpt-2"))
    assert "Ġ2024" in [gpt2.token_piece(i) for i in gpt2.encode("jumps 2024 in")]


def test_what_begins_and_ends_a_prompt_is_as_the_file_says(tmp_path: Path) -> None:
    def edit(writer: GGUFWriter) -> None:
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(True)

    ours, theirs = both(tmp_path / "model.gguf", byte_level(), edit=edit)
    assert ours.encode("fox") == theirs.encode("fox")
    assert ours.encode("fox")[0] == 0
    assert ours.encode("fox")[-1] == 2


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", True), ("qwen2", False)])
def test_llama_3_prompts_begin_with_their_token_though_the_file_is_silent(
    tmp_path: Path, pre: str, expected: bool
) -> None:
    ours, _ = both(tmp_path / "model.gguf", byte_level(pre))
    assert (ours.encode("fox")[0] == 0) == expected


def test_a_word_that_is_a_token_is_one_in_llama_3(tmp_path: Path) -> None:
    """Even where no merges lead to it."""
    vocabulary = byte_level("llama-bpe")
    tokens = [*vocabulary.tokens]
    tokens[-1] = "zebra"
    ours, _ = both(tmp_path / "model.gguf", replace(vocabulary, tokens=tokens))
    assert ours.encode("zebra", add_special_tokens=False) == [len(tokens) - 1]


def test_a_space_in_front_is_left_out_where_the_file_says_so(tmp_path: Path) -> None:
    ours, _ = both(
        tmp_path / "model.gguf", sentencepiece(), edit=lambda w: w.add_add_space_prefix(False)
    )
    ids = ours.encode(" fox", add_special_tokens=False)
    assert ours.decode(ids) == " fox"
    assert ids != ours.encode("fox", add_special_tokens=False)


def test_special_tokens_are_those_that_the_file_marks(tmp_path: Path) -> None:
    ours, _ = both(tmp_path / "model.gguf", byte_level())
    spelled = {ours.token_piece(i): i for i in range(576)}
    assert all(ours.is_special(spelled[t]) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    assert not ours.is_special(spelled["<tool_call>"])
    assert ours.encode("<tool_call>") == [spelled["<tool_call>"]]
    assert not ours.is_special(spelled["[PAD3]"])


def test_answers_end_with_every_token_that_ends_a_turn(tmp_path: Path) -> None:
    vocabulary = byte_level()
    ours, _ = both(tmp_path / "a.gguf", vocabulary)
    assert ours.eos_token_ids == (0, 2)  # <|endoftext|> by its name, <|im_end|> by its id
    ours, _ = both(tmp_path / "b.gguf", vocabulary, edit=lambda w: (w.add_eot_token_id(7), None)[1])
    assert ours.eos_token_ids == (0, 2, 7)


def test_a_file_may_have_a_template_for_tools_beside_the_other(tmp_path: Path) -> None:
    template = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ tools[0].function.name }}"},
    ]
    ours, _ = both(tmp_path / "model.gguf", byte_level(), template=template)
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert ours.decode(ours.encode_chat(CHAT)) == "plain"
    assert ours.decode(ours.encode_chat(CHAT, tools=tools)) == "with look"


def test_a_file_without_a_template_is_for_completions(tmp_path: Path) -> None:
    ours, _ = both(tmp_path / "model.gguf", byte_level(), template=None)
    assert ours.chat_template is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, r"tokenizer\.ggml\.model is 'bert'; supported: 'gpt2'"),
        ({"pre": "viking"}, r"tokenizer\.ggml\.pre is 'viking'; supported: default, gpt-2"),
        ({"ids": (0, 576, 0)}, r"eos_token_id is 576, which is no token"),
        ({"types": [1]}, "token_type is not one for each token"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"merges": ["one"]}, "its tokenizer is broken"),
        ({"merges": ["nothing such"]}, "its tokenizer is broken"),
        ({"tokens": ["a"] * 576}, "a token appears twice"),
        ({"model": "llama", "merges": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"model": "llama", "merges": None, "scores": [0.0]}, "scores is not one for each token"),
    ],
)
def test_a_tokenizer_that_is_not_supported_is_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    oracle = make_oracle("llama2", num_hidden_layers=1)
    vocabulary = replace(byte_level(), **changes)
    file = write_gguf(tmp_path / "model.gguf", oracle, vocabulary=vocabulary)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        resolve_model(str(file))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
