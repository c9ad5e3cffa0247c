"""Whatever file declares a token, it is what it is to transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from skipllm_core.errors import ConfigError
from skipllm_core.tokenizer import HFTokenizer
from tests.tokenizer_families import byte_level

TEMPLATE = (
    "{{ bos_token }}{{ image_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{{ eos_token }}{% endfor %}"
)
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
TEXTS = ["hello <|bos|>world<|im_end|>", "<|image|> x <|extra|>y <|image|>", " <tag> the <tag>"]
TOKENS = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|image|>", "<|extra|>", "<tag>"]


def flags(content: str, **changed: bool) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        **changed,
    }


def write(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    tokens_map: dict[str, Any] | None = None,
    known: int = len(TOKENS),
) -> Path:
    """A directory whose tokenizer.json knows the first tokens of TOKENS."""
    stored = json.loads(byte_level([]).to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**stored, "added_tokens": []}))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(TOKENS[:known])
    tokenizer.save(str(folder / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", **(config or {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    if tokens_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens_map))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


FIRST = json.loads(byte_level([]).to_str())
FIRST_ID = len(FIRST["model"]["vocab"])
NAMES: dict[str, Any] = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
DECODER = {
    str(FIRST_ID + i): flags(token, special=token != "<tag>") for i, token in enumerate(TOKENS)
}

CASES: dict[str, dict[str, Any]] = {
    "named in the configuration": {"config": NAMES},
    "named in the map": {"tokens_map": NAMES},
    "named in the map as objects": {"tokens_map": {k: flags(v) for k, v in NAMES.items()}},
    "the map wins": {"config": {"eos_token": "<|extra|>"}, "tokens_map": NAMES},
    "extra tokens with names": {
        "config": {**NAMES, "extra_special_tokens": {"image_token": "<|image|>"}}
    },
    "extra tokens with names in the map": {
        "tokens_map": {**NAMES, "extra_special_tokens": {"image_token": "<|image|>"}}
    },
    "a token with a name of its own": {"config": {**NAMES, "image_token": "<|image|>"}},
    "extra tokens": {
        "config": {**NAMES, "extra_special_tokens": ["<|image|>", "<|extra|>"]},
        "known": 3,
    },
    "additional tokens": {
        "config": {**NAMES, "additional_special_tokens": ["<|image|>"]},
        "known": 3,
    },
    "additional tokens in the map": {
        "tokens_map": {**NAMES, "additional_special_tokens": ["<|image|>", "<|extra|>"]},
        "known": 3,
    },
    "declared in the configuration": {
        "config": {**NAMES, "added_tokens_decoder": DECODER},
        "known": 0,
    },
    "declared with other flags": {
        "config": {
            **NAMES,
            "added_tokens_decoder": {
                **DECODER,
                str(FIRST_ID + 3): flags("<|image|>", lstrip=True, rstrip=True, special=True),
                str(FIRST_ID + 5): flags("<tag>", normalized=True, single_word=True),
            },
        },
        "known": 2,
    },
    "some of them declared": {
        "config": {**NAMES, "added_tokens_decoder": DECODER},
        "known": 4,
    },
    "named, and in no vocabulary": {"config": {**NAMES, "pad_token": "<|pad|>"}, "known": 1},
    "empty and absent names": {"config": {**NAMES, "pad_token": None, "unk_token": None}},
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_what_they_are_to_transformers(case: str, tmp_path: Path) -> None:
    write(tmp_path, **CASES[case])
    ours, theirs = HFTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert [i for i in range(len(theirs) + 1) if ours.is_special(i)] == sorted(
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    )
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )
    assert ours.encode_chat(CHAT) == theirs.apply_chat_template(CHAT)["input_ids"]
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else (eos,))


def test_a_map_beside_declared_tokens_names_what_the_configuration_does_not(tmp_path: Path) -> None:
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": DECODER}
    tokens_map = {"bos_token": "<|bos|>", "eos_token": "<|extra|>"}
    ours = HFTokenizer(write(tmp_path, config=config, tokens_map=tokens_map, known=0))
    text = ours.decode(ours.encode_chat(CHAT[:1]))
    assert text == "<|bos|><|im_start|>user\nhello<|im_end|>"


def test_a_token_that_nothing_defines_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    HFTokenizer(write(tmp_path, config={"eos_token": "<|im_end|>"}))
    (told,) = caplog.messages
    assert "bos_token, image_token" in told
    caplog.clear()
    HFTokenizer(write(tmp_path, config={**NAMES, "image_token": "<|image|>"}))
    assert not caplog.messages


def test_a_token_that_gets_another_id_than_declared_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    declared = {str(FIRST_ID + 7): flags("<|late|>", special=True)}
    write(tmp_path, config={**NAMES, "image_token": "<|image|>", "added_tokens_decoder": declared})
    HFTokenizer(tmp_path)
    (told,) = caplog.messages
    assert f"'<|late|>' as token {FIRST_ID + 7}" in told


def test_a_tokenizer_whose_vocabulary_is_larger_than_the_embedding_is_refused(
    tmp_path: Path,
) -> None:
    write(tmp_path, config={**NAMES, "image_token": "<|image|>"})
    for vocab_size, message in {
        FIRST_ID - 1: f"its vocabulary has {FIRST_ID} entries, the model's embedding",
        FIRST_ID: r"'<\|bos\|>', which prompts are made with, is token",
        FIRST_ID + 2: r"'<\|im_end\|>'",
        FIRST_ID + 3: r"'<\|image\|>'",
    }.items():
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
        with pytest.raises(ConfigError, match=message) as caught:
            HFTokenizer(tmp_path)
        assert "\n" not in str(caught.value)


def test_another_models_tokenizer_has_to_fit_the_model_that_is_served(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    for folder, vocab_size in ((model, FIRST_ID), (other, FIRST_ID + len(TOKENS))):
        folder.mkdir()
        write(folder, config={**NAMES, "image_token": "<|image|>"})
        (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    HFTokenizer(other)
    with pytest.raises(ConfigError, match="does not fit the model"):
        HFTokenizer(other, eos_from=model)


def test_a_token_beyond_the_embedding_that_nothing_needs_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, config={**NAMES, "image_token": "<|image|>"})
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": FIRST_ID + 4}))
    HFTokenizer(tmp_path)
    (told,) = caplog.messages
    assert told.endswith("'<|extra|>', '<tag>' of the tokenizer cannot be used")


def test_a_beginning_beyond_the_embedding_is_refused_without_a_template_too(tmp_path: Path) -> None:
    tokenizer = byte_level(["<|bos|>"], bos="<|bos|>")
    tokenizer.add_special_tokens(["<|late|>"])
    late = tokenizer.token_to_id("<|late|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|late|> $A", special_tokens=[("<|late|>", late)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": late}))
    with pytest.raises(ConfigError, match=r"'<\|late\|>', which prompts are made with"):
        HFTokenizer(tmp_path)


@pytest.mark.parametrize("declared", [[], {"x": flags("a")}, {"3": "a"}, {"3": {"content": 3}}])
def test_a_declaration_that_is_none_is_refused(tmp_path: Path, declared: object) -> None:
    write(tmp_path, config={"added_tokens_decoder": declared})
    if declared == []:
        HFTokenizer(tmp_path)
        return
    with pytest.raises(ConfigError, match="added_tokens_decoder"):
        HFTokenizer(tmp_path)


def _config(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_bytes(path.read_text().encode("utf-8-sig"))


def _template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_bytes(path.read_text().encode("utf-8-sig"))


@pytest.mark.parametrize("mark", [_config, _template])
def test_a_byte_order_mark_is_no_part_of_a_file(
    tmp_path: Path, mark: Callable[[Path], None]
) -> None:
    write(tmp_path, config=NAMES)
    before = HFTokenizer(tmp_path).encode_chat(CHAT)
    mark(tmp_path)
    assert HFTokenizer(tmp_path).encode_chat(CHAT) == before
