"""Tokenizer, chat template, packing, and a run of a few steps; and what the shipped model knows."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from skipllm_core.demo import MODEL_DIR
from skipllm_core.demo.data.dialogues import DialogueMaker
from skipllm_core.demo.training.batches import make_batch
from skipllm_core.demo.training.evaluate import accuracies
from skipllm_core.demo.training.muon import orthogonalised
from skipllm_core.demo.training.tokenizer import Renderer, load_tokenizer, train_tokenizer
from skipllm_core.demo.training.train import Recipe, Trainer

_TINY = Recipe(
    hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, num_rows=2
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(num_conversations=300)


@pytest.fixture
def run_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@given(st.text())
def test_any_text_survives_the_shipped_tokenizer(text: str) -> None:
    shipped = load_tokenizer(MODEL_DIR)
    ids = shipped.encode(text, add_special_tokens=False)
    if not any(special in text for special in shipped.all_special_tokens):
        assert shipped.decode(ids) == text


@pytest.mark.parametrize("text", ["naïve café", "日本語 🦊", "a\n\n b\t", "1234+5", "\x00\x7f"])
def test_text_outside_the_data_survives_a_fresh_tokenizer(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.encode("2026")) == 4


def test_training_ids_are_those_of_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer)
    for conversation in itertools.islice(DialogueMaker(2).conversations(), 200):
        ids, weights = renderer.render(conversation)
        assert ids == tokenizer.apply_chat_template(conversation, return_dict=False)
        assert len(weights) == len(ids)
        prompt = tokenizer.apply_chat_template(
            conversation[:-1], add_generation_prompt=True, return_dict=False
        )
        assert ids[: len(prompt)] == prompt


def test_only_the_assistants_words_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "2 + 2 = 4."},
    ]
    ids, weights = Renderer(tokenizer).render(conversation)
    learned = [i for i, weight in zip(ids, weights, strict=True) if weight]
    assert tokenizer.decode(learned) == "2 + 2 = 4.<|end|>"


def test_the_template_refuses_unknown_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="Unknown role"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "no"}])


def test_a_batch_depends_on_seed_and_step_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer)
    one, again, other = (make_batch(renderer, 0, step, 2, 256) for step in (5, 5, 6))
    assert one.inputs.shape == (2, 256)
    assert torch.equal(one.inputs, again.inputs)
    assert not torch.equal(one.inputs, other.inputs)
    # The target of a position is the id after it.
    flat = one.inputs.flatten()
    inner = (one.where + 1) % 256 != 0
    assert torch.equal(flat[one.where[inner] + 1], one.targets[inner])


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 32, 96)])
def test_muon_makes_singular_values_alike(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(stack).float())
    assert values.min() > 0.3
    assert values.max() < 1.6


def test_a_resumed_run_equals_an_unbroken_one(run_dir: Path) -> None:
    unbroken = Trainer(run_dir, _TINY)
    losses = [unbroken.train_step() for _ in range(2)]

    first = Trainer(run_dir, _TINY)
    assert first.train_step() == losses[0]
    first.save()
    resumed = Trainer(run_dir, _TINY)
    resumed.resume()
    assert resumed.step == 1
    assert resumed.train_step() == losses[1]
    for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_lowers_the_loss(run_dir: Path) -> None:
    trainer = Trainer(run_dir, _TINY)
    losses = [trainer.train_step() for _ in range(30)]
    assert losses[-1] < losses[0]


def test_the_shipped_model_is_small_deep_and_complete() -> None:
    files = {path.name for path in MODEL_DIR.iterdir()}
    assert files >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json", "README.md",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 20e6
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR)
    assert model.config.num_hidden_layers >= 12
    assert model.config.vocab_size > len(load_tokenizer(MODEL_DIR))


@pytest.mark.slow
def test_the_shipped_model_knows_its_facts_in_unseen_wordings() -> None:
    model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    tokenizer = load_tokenizer(MODEL_DIR)
    shares = accuracies(model, tokenizer, 100, ("facts", "unknowns", "summaries", "stories"))
    assert shares["facts"] >= 0.95
    assert shares["stories"] >= 0.85  # word for word a plot, with two names that differ
    assert min(shares["unknowns"], shares["summaries"]) >= 0.9, shares
