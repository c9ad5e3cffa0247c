"""GGUF files are read as transformers reads them: the same weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from torch import Tensor

from skipllm_core.model.gguf.header import KINDS
from skipllm_core.model.hub import resolve_model
from skipllm_core.model.loader import load_model
from tests.model.checkpoints import CHECKPOINTS, make_oracle
from tests.model.gguf.files import write_gguf
from tests.model.test_parity import Paged, prefill_in_one_go

CPU = torch.device("cpu")
PROMPT = torch.randint(0, 576, (150,), generator=torch.Generator().manual_seed(0))
# Of what files can tell: attention biases are Llama's own, and factors of YaRN are the usual ones.
FILES = [name for name in CHECKPOINTS if name != "llama_yarn_mscale"]


def of_transformers(file: Path, **config: object) -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **config
    )
    return model.eval()


def logits_of(model_dir: Path, prompt: Tensor) -> Tensor:
    model = load_model(model_dir, device=CPU, dtype=torch.float32)
    paged = Paged(model, [prompt])
    prefill_in_one_go(paged)
    return paged.all_logits()[0]


def fused(weights: dict[str, Tensor], name: str, parts: tuple[str, ...]) -> Tensor:
    return torch.cat([weights[f"{name}.{part}"] for part in parts])


@torch.no_grad()
def check_weights(file: Path, **config: object) -> None:
    """Those that are read are those that transformers reads from the file."""
    theirs = of_transformers(file, **config).state_dict()
    ours = load_model(resolve_model(str(file)), device=CPU, dtype=torch.float32)
    assert torch.equal(ours.embedding, theirs["model.embed_tokens.weight"])
    assert torch.equal(ours.lm_head.weight, theirs["lm_head.weight"])
    assert torch.equal(ours.norm.weight, theirs["model.norm.weight"])
    for layer, block in enumerate(ours.blocks):
        at = f"model.layers.{layer}"
        assert torch.equal(block.norm1.weight, theirs[f"{at}.input_layernorm.weight"])
        assert torch.equal(block.norm2.weight, theirs[f"{at}.post_attention_layernorm.weight"])
        qkv = [f"{part}_proj.weight" for part in "qkv"]
        assert torch.equal(block.attention.qkv.weight, fused(theirs, f"{at}.self_attn", (*qkv,)))
        assert torch.equal(block.attention.o.weight, theirs[f"{at}.self_attn.o_proj.weight"])
        gate_up = ("gate_proj.weight", "up_proj.weight")
        assert torch.equal(block.ffn.gate_up.weight, fused(theirs, f"{at}.mlp", gate_up))
        assert torch.equal(block.ffn.down.weight, theirs[f"{at}.mlp.down_proj.weight"])
        if block.attention.qkv.bias is not None and f"{at}.self_attn.q_proj.bias" in theirs:
            biases = [f"{part}_proj.bias" for part in "qkv"]
            expected = fused(theirs, f"{at}.self_attn", (*biases,))
            assert torch.equal(block.attention.qkv.bias, expected)
        if (norms := block.attention.qk_norm) is not None:
            heads = [f"{at}.self_attn.{part}_norm.weight" for part in "qk"]
            counts = block.attention.num_heads, block.attention.num_kv_heads
            expected = torch.cat(
                [theirs[n].expand(k, -1) for n, k in zip(heads, counts, strict=True)]
            )
            assert torch.equal(norms.weight, expected)


@pytest.mark.parametrize("name", ["llama2", "llama3_tied", "mistral", "qwen2", "qwen3"])
def test_the_weights_are_those_that_transformers_reads(tmp_path: Path, name: str) -> None:
    said = {"head_dim": 16} if name == "qwen3" else {}  # transformers does not look into the file
    check_weights(write_gguf(tmp_path / "model.gguf", make_oracle(name)), **said)


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values()])
def test_every_kind_of_numbers_is_read_as_transformers_reads_it(tmp_path: Path, kind: str) -> None:
    oracle = make_oracle("llama2", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    check_weights(write_gguf(tmp_path / "model.gguf", oracle, kind=GGMLQuantizationType[kind]))


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_the_logits_are_those_of_the_model_that_the_file_was_made_of(
    tmp_path: Path, name: str
) -> None:
    """Nothing of the config is lost: heads, biases, ties, windows, and how positions rotate."""
    oracle = make_oracle(name)
    file = write_gguf(tmp_path / "model.gguf", oracle)
    expected = oracle(PROMPT[None]).logits[0]
    assert (logits_of(resolve_model(str(file)), PROMPT) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_the_logits_of_a_quantized_model_are_transformers(tmp_path: Path) -> None:
    oracle = make_oracle("llama2", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    file = write_gguf(tmp_path / "model.gguf", oracle, kind=GGMLQuantizationType.Q4_0)
    expected = of_transformers(file)(PROMPT[None]).logits[0]
    assert (logits_of(resolve_model(str(file)), PROMPT) - expected).abs().max() < 1e-4
