"""Logits equal transformers' own, however the tokens reach the model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipllm_core.model.attention import ContextRow
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.llama import LlamaModel
from skipllm_core.model.loader import load_model
from tests.model.checkpoints import CHECKPOINTS, VOCAB_SIZE, make_oracle

CPU = torch.device("cpu")
BLOCK_SIZE = 4
NUM_BLOCKS = 64
TOLERANCE = 1e-4


class Paged:
    """Feeds sequences to the model in pieces, each with its own scattered blocks of one cache."""

    def __init__(self, model: LlamaModel, prompts: list[Tensor]) -> None:
        self.model = model
        self.prompts = prompts
        dtype = model.embedding.dtype
        self.kv_cache = KVCache(
            model.config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=dtype, device=CPU
        )
        for memory in (*self.kv_cache.keys, *self.kv_cache.values):
            memory.fill_(float("nan"))  # what was never written must never be seen
        blocks = list(range(NUM_BLOCKS))
        random.Random(0).shuffle(blocks)
        self.block_tables = []
        for prompt in prompts:
            num_blocks = -(-len(prompt) // BLOCK_SIZE)
            self.block_tables.append(blocks[:num_blocks])
            blocks = blocks[num_blocks:]
        self.starts = [0] * len(prompts)
        self.logits: list[list[Tensor]] = [[] for _ in prompts]

    def step(self, num_tokens: dict[int, int]) -> None:
        """One forward: so many further tokens of each of these sequences."""
        rows = [
            ContextRow(self.starts[seq], count, self.block_tables[seq])
            for seq, count in num_tokens.items()
        ]
        tokens = torch.cat(
            [
                self.prompts[seq][row.start : row.start + row.num_tokens]
                for seq, row in zip(num_tokens, rows, strict=True)
            ]
        )
        ctx = self.model.context(rows, self.kv_cache)
        logits = self.model.head(self.model.forward(tokens, ctx))
        pieces = logits.split(list(num_tokens.values()))
        for (seq, count), piece in zip(num_tokens.items(), pieces, strict=True):
            self.starts[seq] += count
            self.logits[seq].append(piece)

    def all_logits(self) -> list[Tensor]:
        assert self.starts == [len(prompt) for prompt in self.prompts]
        return [torch.cat(pieces) for pieces in self.logits]


def prefill_in_one_go(paged: Paged) -> None:
    for seq, prompt in enumerate(paged.prompts):
        paged.step({seq: len(prompt)})


def prefill_together(paged: Paged) -> None:
    paged.step({seq: len(prompt) for seq, prompt in enumerate(paged.prompts)})


def prefill_in_chunks(paged: Paged) -> None:
    for seq, prompt in enumerate(paged.prompts):
        while left := len(prompt) - paged.starts[seq]:
            paged.step({seq: min(left, 7)})


def decode_alone(paged: Paged) -> None:
    for seq, prompt in enumerate(paged.prompts):
        paged.step({seq: 3})
        for _ in range(len(prompt) - 3):
            paged.step({seq: 1})


def decode_together(paged: Paged) -> None:
    """Contexts of different lengths in every decode batch, which shrinks as sequences end."""
    paged.step({seq: 1 + 5 * seq for seq in range(len(paged.prompts))})
    while live := [s for s, prompt in enumerate(paged.prompts) if paged.starts[s] < len(prompt)]:
        paged.step(dict.fromkeys(live, 1))


def mixed_batches(paged: Paged) -> None:
    """Every batch holds decode tokens and prefill chunks, in changing order."""
    rng = random.Random(1)
    while live := [s for s, prompt in enumerate(paged.prompts) if paged.starts[s] < len(prompt)]:
        rng.shuffle(live)
        paged.step(
            {s: min(rng.choice([1, 1, 6]), len(paged.prompts[s]) - paged.starts[s]) for s in live}
        )


@pytest.fixture(scope="module", params=CHECKPOINTS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LlamaModel, list[Tensor], list[Tensor]]:
    """A loaded model, prompts longer than any window and RoPE context, and the oracle's logits."""
    oracle = make_oracle(request.param)
    directory: Path = tmp_path_factory.mktemp(request.param)
    oracle.save_pretrained(directory)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in (5, 30, 71, 33)
    ]
    with torch.no_grad():
        expected = [oracle(prompt[None], use_cache=False).logits[0] for prompt in prompts]
    return load_model(directory, device=CPU, dtype=torch.float32), prompts, expected


@pytest.mark.parametrize(
    "feed",
    [
        prefill_in_one_go,
        prefill_together,
        prefill_in_chunks,
        decode_alone,
        decode_together,
        mixed_batches,
    ],
)
def test_logits_equal_transformers(
    case: tuple[LlamaModel, list[Tensor], list[Tensor]], feed: Callable[[Paged], None]
) -> None:
    model, prompts, expected = case
    paged = Paged(model, prompts)
    feed(paged)
    for actual, wanted in zip(paged.all_logits(), expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted, atol=TOLERANCE, rtol=0)


def test_the_blocks_one_by_one_are_the_forward_bit_for_bit(
    case: tuple[LlamaModel, list[Tensor], list[Tensor]],
) -> None:
    model, prompts, _ = case
    paged = Paged(model, prompts)
    prompt, row = prompts[1], [ContextRow(0, len(prompts[1]), paged.block_tables[1])]
    whole = model.forward(prompt, model.context(row, paged.kv_cache))
    ctx = model.context(row, paged.kv_cache)
    h = model.embed(prompt)
    for block in model.blocks:
        h = block.feed_forward(block.attend(h, ctx))
    assert torch.equal(h, whole)


def test_a_row_of_nans_leaves_the_other_rows_alone(
    case: tuple[LlamaModel, list[Tensor], list[Tensor]],
) -> None:
    model, prompts, expected = case
    paged = Paged(model, prompts)
    rows = [
        ContextRow(0, len(p), table) for p, table in zip(prompts, paged.block_tables, strict=True)
    ]
    ctx = model.context(rows, paged.kv_cache)
    h = model.embed(torch.cat(prompts))
    h[: len(prompts[0])] = float("nan")
    for block in model.blocks:
        h = block.feed_forward(block.attend(h, ctx))
    logits = model.head(h).split([len(prompt) for prompt in prompts])
    assert logits[0].isnan().all()
    for actual, wanted in zip(logits[1:], expected[1:], strict=True):
        torch.testing.assert_close(actual, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_in_16_bits_the_error_is_no_larger_than_transformers_own(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    oracle = make_oracle(name)
    oracle.save_pretrained(tmp_path)
    prompt = torch.arange(60) % VOCAB_SIZE
    with torch.no_grad():
        exact = oracle(prompt[None], use_cache=False).logits[0]
        rounded = oracle.to(dtype)(prompt[None], use_cache=False).logits[0].float()
    paged = Paged(load_model(tmp_path, device=CPU, dtype=dtype), [prompt])
    mixed_batches(paged)
    (actual,) = paged.all_logits()
    assert (actual - exact).norm() < 1.2 * (rounded - exact).norm()


def test_feed_forward_takes_any_rows_and_none(
    case: tuple[LlamaModel, list[Tensor], list[Tensor]],
) -> None:
    model, _, _ = case
    h = torch.randn(6, model.config.hidden_size)
    block = model.blocks[0]
    together = block.feed_forward(h)
    torch.testing.assert_close(block.feed_forward(h[2:5]), together[2:5])
    assert block.feed_forward(h[:0]).shape == (0, model.config.hidden_size)
