"""One pass over a finished answer against decoding it token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipllm_core.calibration.answers import Answer
from skipllm_core.calibration.passes import Group, Passes
from skipllm_core.engine.runner import ScheduledSeq
from skipllm_core.model.llama import Block
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence as Seq
from skipllm_core.skip.policy import SkipGate, gate_for, skip_at
from skipllm_core.types import SamplingParams, SkipParams
from tests.model.checkpoints import VOCAB_SIZE, make_oracle
from tests.runner.tiny import BLOCK_BYTES, VOCAB, engine_config, write_config

NUM_LAYERS = 8
WARMUP = 3
POLICIES = [
    SkipParams(),
    SkipParams(policy="ffn_skip", threshold=0.9, warmup_tokens=5, cold_start=1, cold_end=7),
    SkipParams(
        policy="ffn_skip", threshold=0.8, warmup_tokens=0, cold_start=1, cold_end=7, max_skips=2
    ),
    SkipParams(policy="static", layers=(2, 3, 5), warmup_tokens=9),
    SkipParams(policy="random", probability=0.4, warmup_tokens=1, cold_start=1, cold_end=7),
    SkipParams(policy="layer_drop", layers=(2, 5), warmup_tokens=0),
    SkipParams(policy="early_exit", first_exit=8, cold_start=3, cold_end=8, warmup_tokens=0),
    SkipParams(
        policy="neurons",
        up_thresholds=(0.02,) * NUM_LAYERS,
        down_thresholds=(0.01,) * NUM_LAYERS,
        warmup_tokens=WARMUP,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchModelRunner:
    directory = tmp_path_factory.mktemp("oracle")
    make_oracle("llama3", num_hidden_layers=NUM_LAYERS).save_pretrained(directory)
    return TorchModelRunner(engine_config(directory, load_format="auto"))


def answers(*lengths: tuple[int, int]) -> list[Answer]:
    """Prompts and answers of these lengths, of tokens in no order."""
    text = torch.randint(3, VOCAB_SIZE, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        Answer(text[7 * n : 7 * n + first], text[7 * n + first : 7 * n + first + second])
        for n, (first, second) in enumerate(lengths)
    ]


TEXTS = answers((5, 30), (40, 21), (1, 1), (17, 3), (1, 12))


class Decoded:
    """An answer decoded token by token: of the tokens behind the warm-up the logits, the skipped
    layers, and what was left out of the others."""

    def __init__(
        self, runner: TorchModelRunner, number: int, answer: Answer, skip: SkipParams
    ) -> None:
        params = SamplingParams(max_tokens=len(answer.answer_ids), seed=number, skip=skip)
        self._runner = runner
        self._seq = Seq(0, answer.prompt_ids, params)
        self._seq.block_table = list(range(16))
        self.logits: list[Tensor] = []
        self.skipped: list[list[int]] = []
        self.neurons: list[list[tuple[int, int]]] = []
        self._step(len(answer.prompt_ids))
        for count, token_id in enumerate(answer.answer_ids[:-1], start=1):
            self._seq.num_computed_tokens = self._seq.num_tokens
            self._seq.token_ids.append(token_id)
            logits, gate = self._step(1)
            if count >= skip.warmup_tokens:
                self.logits.append(logits[0])
                self.skipped.append(list(gate.skipped_layers[0]))
                self.neurons.append(list(gate.neurons.counts[0]))

    def _step(self, num_tokens: int) -> tuple[Tensor, SkipGate]:
        places = range(self._seq.num_tokens - num_tokens, self._seq.num_tokens)
        gate = gate_for([skip_at(self._seq, position) for position in places])
        return self._runner.logits([ScheduledSeq(self._seq, num_tokens)], gate), gate


@pytest.mark.parametrize("skip", POLICIES, ids=lambda skip: skip.policy)
@torch.inference_mode()
def test_a_pass_decides_and_computes_what_decoding_does(
    runner: TorchModelRunner, skip: SkipParams
) -> None:
    decoded = [Decoded(runner, n, answer, skip) for n, answer in enumerate(TEXTS)]
    passes = Passes(runner)
    (group,) = passes.add(TEXTS)
    found = passes.under(group, skip)
    logits = runner.model.head(found.h)
    assert torch.allclose(logits, torch.stack([x for d in decoded for x in d.logits]), atol=1e-4)
    skipped = [found.gate.skipped_layers[row] for row in found.rows]
    assert [list(layers) for layers in skipped] == [x for d in decoded for x in d.skipped]
    neurons = [found.gate.neurons.counts[row] for row in found.rows]
    assert neurons == [x for d in decoded for x in d.neurons]
    full = runner.model.head(passes.in_full(group))[found.places]
    if skip.policy == "never":
        assert torch.allclose(logits, full, atol=1e-4)
    else:
        assert any(skipped) or any(neurons)
        assert not torch.allclose(logits, full, atol=1e-2), "nothing was skipped"


def logits_of(passes: Passes, groups: Sequence[Group], skip: SkipParams) -> Tensor:
    return torch.cat([passes.model.head(passes.under(group, skip).h) for group in groups])


@torch.inference_mode()
def test_passes_do_not_see_each_other(runner: TorchModelRunner) -> None:
    """Whatever the last one left in the cache, and however many answers pass at once."""
    together = Passes(runner)
    one_by_one = Passes(runner, tokens_at_once=1)
    groups, many = together.add(TEXTS), one_by_one.add(TEXTS)
    assert (len(groups), len(many)) == (1, 4)
    for skip in (*POLICIES, *reversed(POLICIES)):
        for layer in range(NUM_LAYERS):
            runner.kv_cache.keys[layer].fill_(torch.nan)
        passes = Passes(runner)
        fresh = logits_of(passes, passes.add(TEXTS), skip)
        together.forget()
        for other in (POLICIES[5], POLICIES[1], POLICIES[6], skip):
            again = logits_of(together, groups, other)
        assert torch.allclose(again, fresh, atol=1e-4)
        one_by_one.forget()
        assert torch.allclose(logits_of(one_by_one, many, skip), fresh, atol=1e-4)


@torch.inference_mode()
def test_answers_beyond_the_cache_take_turns_in_it(tmp_path: Path) -> None:
    config = engine_config(write_config(tmp_path), kv_cache_memory_bytes=4 * BLOCK_BYTES)
    small = TorchModelRunner(config)
    large = TorchModelRunner(engine_config(tmp_path))
    texts = [
        Answer([t % VOCAB for t in a.prompt_ids], [t % VOCAB for t in a.answer_ids])
        for a in answers((5, 30), (30, 21), (1, 12))
    ]
    found = []
    for runner in (small, large):
        passes = Passes(runner)
        groups = passes.add(texts[:2]) + passes.add(texts[1:])
        found.append(torch.cat([logits_of(passes, groups, POLICIES[1]) for _ in range(2)]))
        assert len(groups) == (4 if runner is small else 2)
    assert torch.allclose(*found, atol=1e-4)


@torch.inference_mode()
def test_the_full_model_is_seen_at_every_layer(runner: TorchModelRunner) -> None:
    passes = Passes(runner)
    (group,) = passes.add(TEXTS)
    seen: list[tuple[int, int]] = []
    last: list[Tensor] = []

    def observe(layer: int, block: Block, h: Tensor, attended: Tensor, after: Tensor) -> None:
        assert torch.allclose(block.feed_forward(attended), after, atol=1e-5)
        assert not last or torch.equal(last[-1], h)
        seen.append((layer, len(h)))
        last.append(after)

    found = passes.in_full(group, observe)
    num_decoded = sum(len(answer.answer_ids) - 1 for answer in TEXTS)
    assert seen == [(layer, num_decoded) for layer in range(NUM_LAYERS)]
    assert torch.equal(found, last[-1])
    assert group.targets.tolist() == [t for answer in TEXTS for t in answer.answer_ids[1:]]


@torch.inference_mode()
def test_alone_or_beside_its_like_a_row_leaves_out_what_it_would_by_itself(
    runner: TorchModelRunner,
) -> None:
    skip = POLICIES[-1]
    passes = Passes(runner)
    for number_of_rows in (1, 2):
        (group,) = passes.add([TEXTS[0]] * number_of_rows)
        own, found = passes.under(group, skip), passes.together(group, skip)
        assert torch.equal(found.places, own.places)
        assert torch.allclose(found.h, own.h, atol=1e-4)
        assert [found.gate.neurons.counts[row] for row in found.rows] == [
            own.gate.neurons.counts[row] for row in own.rows
        ]


@torch.inference_mode()
def test_rows_of_a_step_leave_out_as_many_together_and_go_on_when_others_have_ended(
    runner: TorchModelRunner,
) -> None:
    skip = POLICIES[-1]
    passes = Passes(runner)
    (group,) = passes.add(TEXTS)
    own, found = passes.under(group, skip), passes.together(group, skip)
    assert torch.equal(found.places, own.places)
    assert not torch.allclose(found.h, own.h, atol=1e-2)
    counts = found.gate.neurons.counts
    lengths = [len(a.answer_ids) - WARMUP for a in TEXTS if len(a.answer_ids) > WARMUP]
    firsts = [sum(lengths[:n]) for n in range(len(lengths))]
    for step in range(max(lengths)):
        now = [f + step for f, num in zip(firsts, lengths, strict=True) if step < num]
        assert all(counts[row] == counts[now[0]] for row in now)
    last = firsts[0] + lengths[0] - 1
    assert lengths[0] == max(lengths)
    assert any(counts[last])
