"""A checkpoint written by transformers is served from its directory, with transformers' tokens."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.e2e.serving import serve

pytestmark = pytest.mark.slow

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 9], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML
    )


def test_a_qwen2_checkpoint_gives_transformers_own_tokens(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=576,  # wider than the tokenizer
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
        )
    ).eval()
    tokenizer = make_tokenizer()
    checkpoint = tmp_path / "tiny-qwen2"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    messages = [{"role": "user", "content": "jumps over the lazy dog?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt"
    )
    ids = prompt["input_ids"]
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    expected_ids = expected[0, ids.shape[1] :].tolist()

    with serve(tmp_path / "log", str(checkpoint), "--served-model-name", "tiny") as served:
        answer = served.openai().chat.completions.create(
            model="tiny",
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=24,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        log = served.log
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == expected_ids
    assert "skipllm calibrate" in log, "skipping is off without a profile, and the log says so"
