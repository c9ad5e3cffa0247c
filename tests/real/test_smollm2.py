"""A real model from its GGUF file: it answers, and does what transformers does with the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipllm_core.model.hub import resolve_model
from skipllm_core.model.loader import load_model
from skipllm_core.tokenizer import HFTokenizer
from tests.e2e.serving import Served
from tests.model.test_parity import Paged, prefill_in_one_go
from tests.real.texts import CHAT, PAGE, QUESTION

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_dir(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return resolve_model(str(smollm2))


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    """transformers' model of the file."""
    return AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def their_tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


def test_it_answers_a_question(served: Served) -> None:
    answer = served.openai().chat.completions.create(
        model="smollm2",
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=24,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_it_streams_what_it_answers(served: Served) -> None:
    wanted: dict[str, Any] = {
        "model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 24
    }  # fmt: skip
    whole = served.openai().chat.completions.create(**wanted)
    chunks = list(served.openai().chat.completions.create(**wanted, stream=True))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 3


def test_its_greedy_answer_is_transformers(
    served: Served, theirs: Any, their_tokenizer: Any
) -> None:
    prompt = their_tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    expected = theirs.generate(prompt, max_new_tokens=32, do_sample=False)[0, prompt.shape[1] :]
    answer = served.openai().chat.completions.create(
        model="smollm2",
        messages=CHAT,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=32,
        extra_body={"return_token_ids": True},
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt.shape[1]
    text = their_tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.choices[0].message.content == text


def test_its_weights_and_logits_are_transformers(
    model_dir: Path, theirs: Any, their_tokenizer: Any
) -> None:
    ids = their_tokenizer(PAGE, return_tensors="pt")["input_ids"][0, :200]
    model = load_model(model_dir, device=CPU, dtype=torch.float32)
    assert torch.equal(model.embedding, theirs.model.embed_tokens.weight)
    attention = theirs.model.layers[7].self_attn
    qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(model.blocks[7].attention.qkv.weight, qkv)
    assert torch.equal(model.blocks[7].ffn.down.weight, theirs.model.layers[7].mlp.down_proj.weight)
    paged = Paged(model, [ids])
    with torch.no_grad():
        prefill_in_one_go(paged)
        expected = theirs(ids[None]).logits[0]
    found = paged.all_logits()[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_its_ids_are_transformers(model_dir: Path, their_tokenizer: Any) -> None:
    ours = HFTokenizer(model_dir)
    ids = ours.encode(PAGE)
    assert ids == their_tokenizer.encode(PAGE)
    assert ours.decode(ids) == PAGE
    chat = their_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(CHAT) == chat


def test_its_numbers_are_split_as_the_model_was_trained(
    model_dir: Path, their_tokenizer: Any
) -> None:
    """transformers reads this file with GPT-2's rule for numbers; the model's own tokenizer (and
    llama.cpp, under the name that the file gives) has every one of their characters by itself."""
    text = "in  2024   3 ½x²"
    backend = copy.deepcopy(their_tokenizer.backend_tokenizer)
    assert HFTokenizer(model_dir).encode(text) != backend.encode(text).ids
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    assert HFTokenizer(model_dir).encode(text) == backend.encode(text).ids
