"""Tiny GGUF files, written by the gguf package from models of transformers', as llama.cpp's
converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.model.checkpoints import VOCAB_SIZE

TEXTS = ["The quick brown fox jumps over the lazy dog in 2024, doesn't it? naïve café 12345 "] * 9
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Edit = Callable[[GGUFWriter], None]


@dataclass(frozen=True)
class Vocabulary:
    """What the keys of a tokenizer say."""

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    ids: tuple[int, int, int] = (0, 2, 0)  # of begin, end and padding

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        bos, eos, pad = self.ids
        writer.add_bos_token_id(bos)
        writer.add_eos_token_id(eos)
        writer.add_pad_token_id(pad)


def byte_level(pre: str | None = "qwen2", size: int = VOCAB_SIZE) -> Vocabulary:
    """Bytes, some merges, and unused tokens as far as the model is wider."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS, trainer)
    tokens, merges = _parts(trained)
    types = [TokenType.CONTROL] * len(SPECIALS) + [TokenType.NORMAL] * (len(tokens) - len(SPECIALS))
    tokens.append("<tool_call>")
    types.append(TokenType.USER_DEFINED)
    unused = size - len(tokens)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens + [f"[PAD{i}]" for i in range(unused)],
        types=[int(kind) for kind in types] + [int(TokenType.UNUSED)] * unused,
        merges=merges,
    )


def sentencepiece(size: int = VOCAB_SIZE) -> Vocabulary:
    """Control tokens, bytes, and pieces with scores; without merges, as llama.cpp stores them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    pieces, merges = _parts(trained)
    letters = [piece for piece in pieces if len(piece) == 1]
    joined = ["".join(merge.split(" ")) for merge in merges]  # the earlier merged, the better
    control = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*control, *raw, *joined, *letters]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * (len(joined) + len(letters))
    unused = size - len(tokens)
    return Vocabulary(
        model="llama",
        pre=None,
        tokens=tokens + [f"[PAD{i}]" for i in range(unused)],
        types=[int(kind) for kind in kinds] + [int(TokenType.UNUSED)] * unused,
        scores=[0.0] * 259
        + [float(-rank) for rank in range(len(joined))]
        + [-1e4] * (len(letters) + unused),
        ids=(1, 2, 0),
    )


def _parts(trained: Tokenizer) -> tuple[list[str], list[str]]:
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    return sorted(vocab, key=vocab.__getitem__), [" ".join(merge) for merge in model["merges"]]


def write_gguf(
    path: Path,
    oracle: transformers.PreTrainedModel,
    *,
    vocabulary: Vocabulary | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    edit: Edit | None = None,
    template: str | Sequence[dict[str, str]] | None = CHATML,
) -> Path:
    """A file of this model, its matrices of this kind. `edit` writes keys of its own first."""
    config = oracle.config
    family = config.model_type
    architecture = {"mistral": "llama"}.get(family, family)
    writer = GGUFWriter(path, architecture)
    if edit is not None:
        edit(writer)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config.vocab_size)
    if head_dim * config.num_attention_heads != config.hidden_size or family == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if family in ("qwen2", "qwen3") and config.use_sliding_window:
        writer.add_sliding_window(config.sliding_window)
        pattern = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_sliding_window_pattern(pattern)
    _write_rope(writer, config.rope_parameters, head_dim)
    (vocabulary or byte_level(size=config.vocab_size)).write(writer)
    if template is not None:
        writer.add_chat_template(template)
    _write_weights(writer, oracle, architecture, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_rope(writer: GGUFWriter, rope: dict[str, Any], head_dim: int) -> None:
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            if "beta_fast" in rope:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        case "llama3":  # as a tensor: what the frequencies are divided by
            exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
            plain = 1.0 / np.float32(rope["rope_theta"]) ** exponents
            compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
            config = transformers.LlamaConfig(
                hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=rope
            )
            scaled, _ = compute(config, "cpu")
            writer.add_tensor("rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32))


def _write_weights(
    writer: GGUFWriter,
    oracle: transformers.PreTrainedModel,
    architecture: str,
    kind: GGMLQuantizationType,
) -> None:
    config = oracle.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    random = np.random.default_rng(0)
    for name, parameter in oracle.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        numbers = parameter.numpy()
        if architecture == "llama" and ".attn_q." in theirs:
            numbers = _paired(numbers, config.num_attention_heads)
        if architecture == "llama" and ".attn_k." in theirs:
            numbers = _paired(numbers, config.num_key_value_heads)
        if numbers.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(theirs, numbers)
        else:
            writer.add_tensor(theirs, quantized(numbers, kind, random), raw_dtype=kind)


def _paired(numbers: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The halves of every head side by side, as in llama.cpp's files of Llama models."""
    halves = numbers.reshape(num_heads, 2, -1, *numbers.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(numbers.shape))


def quantized(
    numbers: NDArray[np.float32], kind: GGMLQuantizationType, random: np.random.Generator
) -> NDArray[Any]:
    """As the gguf package does it; kinds that it cannot make get random blocks of sane scales."""
    try:
        return gguf.quants.quantize(numbers, kind)
    except NotImplementedError:
        pass
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = numbers.size // block_size
    blocks = random.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
    scales = random.uniform(0.001, 0.01, (num_blocks, 2)).astype(np.float16)
    if kind == GGMLQuantizationType.Q6_K:  # one scale, at the end
        blocks[:, -2:] = scales[:, :1].view(np.uint8)
    else:  # scale and minimum, at the start
        blocks[:, :4] = scales.view(np.uint8)
    return blocks.reshape(numbers.shape[0], -1)
