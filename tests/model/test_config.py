"""config.json in both dialects, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skipllm_core.errors import UnsupportedModelError
from skipllm_core.model.config import ModelConfig, load_model_config

HUB_LLAMA: dict[str, Any] = {  # as the hub has them: rope_theta beside rope_scaling
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 576,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "eos_token_id": [2, 3],
    "tie_word_embeddings": True,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def read(tmp_path: Path, values: dict[str, Any] | str) -> ModelConfig:
    text = values if isinstance(values, str) else json.dumps(values)
    (tmp_path / "config.json").write_text(text)
    return load_model_config(tmp_path)


def variant(**changes: Any) -> dict[str, Any]:
    return {**HUB_LLAMA, **changes}


def qwen2(**changes: Any) -> dict[str, Any]:
    return variant(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], rope_scaling=None, **changes
    )


def mistral(**changes: Any) -> dict[str, Any]:
    return variant(
        model_type="mistral", architectures=["MistralForCausalLM"], rope_scaling=None, **changes
    )


def test_both_dialects_of_rope_mean_the_same(tmp_path: Path) -> None:
    hub = read(tmp_path, HUB_LLAMA)
    v5 = variant(rope_parameters={**HUB_LLAMA["rope_scaling"], "rope_theta": 500000.0})
    del v5["rope_scaling"], v5["rope_theta"]
    assert hub.rope.type == "llama3"
    assert hub.rope.theta == 500000.0
    assert read(tmp_path, v5) == hub


def test_the_older_key_type_names_the_rope_type(tmp_path: Path) -> None:
    config = read(tmp_path, variant(rope_scaling={"type": "linear", "factor": 2.0}))
    assert (config.rope.type, config.rope.factor) == ("linear", 2.0)


@pytest.mark.parametrize("max_position_embeddings", [512, 2048])
def test_yarn_gives_the_stretched_context_however_it_is_written(
    tmp_path: Path, max_position_embeddings: int
) -> None:
    values = variant(rope_scaling=YARN, max_position_embeddings=max_position_embeddings)
    assert read(tmp_path, values).max_position_embeddings == 2048


def test_the_generation_config_names_the_end_tokens_if_it_is_there(tmp_path: Path) -> None:
    assert read(tmp_path, HUB_LLAMA).eos_token_ids == (2, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 3, -1, 576]}')
    assert read(tmp_path, HUB_LLAMA).eos_token_ids == (5, 3)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert read(tmp_path, HUB_LLAMA).eos_token_ids == (2, 3)


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        (variant(), (None,) * 4),
        (mistral(sliding_window=8), (8,) * 4),
        (mistral(sliding_window=None), (None,) * 4),
        (mistral(), (4096,) * 4),
        (qwen2(use_sliding_window=False, sliding_window=8, max_window_layers=2), (None,) * 4),
        (
            qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=2),
            (None, None, 8, 8),
        ),
        (
            qwen2(
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            (8, None, 8, None),
        ),
    ],
)
def test_windows_by_family(
    tmp_path: Path, values: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read(tmp_path, values).windows == windows


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (variant(model_type="gpt2"), "model_type 'gpt2' is not supported"),
        (variant(model_type=None), "model_type None is not supported"),
        (variant(architectures=["LlamaForSequenceClassification"]), "architectures"),
        (variant(auto_map={"AutoModel": "code.Model"}), "auto_map asks for"),
        (variant(quantization_config={"quant_method": "gptq"}), "quantised weights"),
        (variant(hidden_act="gelu"), "hidden_act 'gelu'"),
        (variant(rope_scaling={"type": "dynamic", "factor": 2.0}), "RoPE type 'dynamic'"),
        (variant(rope_scaling={"rope_type": "longrope"}), "short_factor is not 8 positive numbers"),
        (
            variant(
                rope_scaling={
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                }
            ),
            "short_factor and long_factor differ",
        ),
        (
            variant(
                rope_scaling={
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 7 + [0.0],
                    "long_factor": [1.0] * 7 + [0.0],
                }
            ),
            "short_factor is not 8 positive numbers",
        ),
        (variant(rope_scaling={"rope_type": ["yarn"]}), "RoPE type"),
        (variant(rope_scaling={"rope_type": "linear"}), "factor is None"),
        (variant(rope_scaling={"rope_type": "linear", "factor": 0}), "factor is 0"),
        (variant(rope_scaling={"full_attention": {"rope_type": "default"}}), "by layer type"),
        (variant(rope_scaling=[1]), "by layer type"),
        (variant(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (variant(rope_theta=float("1e400")), "Infinity is not a JSON number"),
        (variant(rope_theta=-1.0), "rope_theta is -1.0"),
        (variant(num_attention_heads=-4), "num_attention_heads is -4"),
        (variant(num_attention_heads=True), "num_attention_heads is True"),
        (variant(num_attention_heads="4"), "num_attention_heads is '4'"),
        (variant(num_key_value_heads=3), "4 heads cannot share 3"),
        (variant(num_attention_heads=6, num_key_value_heads=6), "no multiple of 6 heads"),
        (variant(head_dim=15), "head_dim 15 is odd"),
        (variant(hidden_size=10**12), "hidden_size is 1000000000000"),
        (variant(num_hidden_layers=0), "num_hidden_layers is 0"),
        (variant(vocab_size=None), "vocab_size is None"),
        (variant(rms_norm_eps=0), "rms_norm_eps is 0"),
        (variant(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
        (variant(eos_token_id="</s>"), "eos_token_id is '</s>'"),
        (mistral(layer_types=["full_attention"] * 4), "layer_types is not supported"),
        (qwen2(use_sliding_window=True, layer_types=["chunked"] * 4), "layer_types is not 4 of"),
        (qwen2(use_sliding_window=True, sliding_window=0), "sliding_window is 0"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message.replace("(", r"\(")) as caught:
        read(tmp_path, values)
    assert "\n" not in str(caught.value)


def test_a_refusal_lists_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(tmp_path, variant(model_type="gpt2"))
    for word in ("LlamaForCausalLM", "Qwen3ForCausalLM", "yarn", "llama3"):
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": NaN}', "[" * 100_000])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        read(tmp_path, text)


def test_a_config_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnsupportedModelError, match="not valid JSON"):
        load_model_config(tmp_path)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no config\.json"):
        load_model_config(tmp_path)
