"""Sampling on the device, or in Triton's interpreter on CPU tensors, against the host's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import triton.language as tl

from skipllm_core.kernels.gpu.rows import DeviceRows
from skipllm_core.runner import device_sampler
from skipllm_core.runner.device_sampler import DeviceSampler, SamplingKind, sampling_kind
from skipllm_core.runner.sampler import adjust_logits, filter_logits
from skipllm_core.sequence import Sequence
from skipllm_core.types import SamplingParams
from tests.runner.operators import WAITING, Operators

VOCAB = 50


CPU = torch.device("cpu")


def make_sampler(
    max_num_rows: int = 4, vocab_size: int = VOCAB, device: torch.device = CPU
) -> DeviceSampler:
    rows = DeviceRows(
        max_num_rows=max_num_rows,
        max_blocks=1,
        num_layers=1,
        vocab_size=vocab_size,
        device=device,
    )
    return DeviceSampler(rows)


def seat(sampler: DeviceSampler, slot: int, seq: Sequence) -> None:
    sampler.assign(slot, seq)
    sampler.rows.positions[slot] = seq.num_tokens - 1
    sampler.rows.token_ids[slot] = seq.token_ids[-1]


def sequence(params: SamplingParams, *output: int, prompt: tuple[int, ...] = (1, 2, 2)) -> Sequence:
    seq = Sequence(0, list(prompt), params)
    seq.token_ids.extend(output)
    return seq


GREEDY = SamplingParams(max_tokens=100, temperature=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"frequency_penalty": -1.0, "repetition_penalty": 0.5},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 5e-324},
        {"logit_bias": ((3, 4.0), (7, -100.0), (9999, 5.0))},
        {"min_tokens": 6, "stop_token_ids": (0, 4, 8, 9999)},
    ],
)
def test_greedy_texts_equal_the_host_samplers_over_many_steps(
    changes: dict[str, object], device: torch.device
) -> None:
    params = replace(GREEDY, **changes)  # type: ignore[arg-type]
    sampler = make_sampler(device=device)
    seq = sequence(params, 5)
    seat(sampler, 1, seq)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        logits = torch.randn(2, VOCAB, generator=generator)
        sampler.rows.logits[:2] = logits
        sampler.step(2, sampling_kind([params]))
        expected = int(adjust_logits(logits[1:], [seq]).argmax())
        assert sampler.results[1].tolist() == [expected, 1]
        seq.token_ids.append(expected)
        assert int(sampler.rows.token_ids[1]) == expected
        assert int(sampler.rows.positions[1]) == seq.num_tokens - 1
    assert int(sampler.rows.positions[0]) == -1, "a padded row stays one"
    assert int(sampler.output_counts[0].sum()) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_p": 0.0},
        {"top_p": 1e-300, "repetition_penalty": 1e-40},
        {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5, "presence_penalty": 0.5},
    ],
)
def test_draws_follow_the_host_samplers_distribution(
    changes: dict[str, object], device: torch.device
) -> None:
    params = SamplingParams(max_tokens=10, **changes)  # type: ignore[arg-type]
    num_rows, vocab_size = 500, 12
    sampler = make_sampler(num_rows, vocab_size, device)
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(3))
    seqs = [sequence(replace(params, seed=seed), 5) for seed in range(num_rows)]
    for slot, seq in enumerate(seqs):
        seat(sampler, slot, seq)
    sampler.rows.logits[:] = logits
    sampler.step(num_rows, sampling_kind([params]))
    drawn = Counter(sampler.results[:, 0].tolist())
    adjusted = adjust_logits(logits[None], seqs[:1])
    probs = filter_logits(adjusted, [params]).softmax(dim=-1)[0].tolist()
    for token_id, prob in enumerate(probs):
        deviation = (num_rows * prob * (1 - prob)) ** 0.5
        assert abs(drawn[token_id] - num_rows * prob) <= 4 * deviation
        assert prob > 0 or not drawn[token_id]


def test_a_draw_depends_on_seed_and_index_alone(device: torch.device) -> None:
    params = SamplingParams(max_tokens=10, seed=7)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))

    def draws(slot: int, mates: int, kind: SamplingKind, num_known: int) -> list[int]:
        """Tokens `num_known`.. 6 of the sequence, whose first ones were recomputed."""
        sampler = make_sampler(device=device)
        for mate in range(mates):
            if mate != slot:
                seat(sampler, mate, sequence(SamplingParams(max_tokens=9, seed=mate, top_p=0.5)))
        seat(sampler, slot, sequence(params, *range(num_known)))
        found = []
        for _ in range(num_known, 7):
            sampler.rows.logits[:] = logits
            sampler.step(max(mates, slot + 1), kind)
            found.append(int(sampler.results[slot, 0]))
        return found

    alone = draws(0, 1, SamplingKind.DRAW, 1)
    assert len(set(alone)) > 2
    assert draws(2, 4, SamplingKind.CUT, 1) == alone
    assert draws(3, 4, SamplingKind.CUT, 4) == alone[3:], "goes on after a preemption"


def test_nothing_of_a_slots_last_sequence_reaches_the_next(device: torch.device) -> None:
    everything = SamplingParams(
        max_tokens=9,
        min_tokens=9,
        temperature=0.7,
        top_k=3,
        top_p=0.3,
        min_p=0.5,
        repetition_penalty=2.0,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        logit_bias=((3, 50.0),),
        seed=5,
        stop_token_ids=(4,),
    )
    used, fresh = make_sampler(device=device), make_sampler(device=device)
    seat(used, 0, sequence(everything, 9, 9, prompt=(11, 12)))
    used.rows.logits[:] = 1.0
    used.step(1, SamplingKind.CUT)
    seq = sequence(SamplingParams(max_tokens=5, seed=2), 6)
    for sampler in (used, fresh):
        seat(sampler, 0, seq)
    for left, right in zip(used.state, fresh.state, strict=True):
        assert torch.equal(left[0], right[0])


def test_a_move_takes_all_of_the_state_along(device: torch.device) -> None:
    sampler = make_sampler(device=device)
    params = replace(GREEDY, repetition_penalty=2.0, logit_bias=((3, 2.0),), seed=4)
    seat(sampler, 2, sequence(params, 9))
    sampler.move(2, 0)
    assert all(torch.equal(tensor[0], tensor[2]) for tensor in sampler.state)
    assert int(sampler.output_counts[0, 9]) == 1


@pytest.mark.parametrize("kind", SamplingKind)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_told_and_harms_no_other(
    kind: SamplingKind, bad: float, device: torch.device
) -> None:
    sampler = make_sampler(device=device)
    for slot in range(2):
        seat(sampler, slot, sequence(GREEDY, 5))
    sampler.rows.logits[:] = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    best = int(sampler.rows.logits[1].argmax())
    sampler.rows.logits[0, 3] = bad
    sampler.step(2, kind)
    assert sampler.results[:2].tolist() == [[0, 0], [best, 1]]


def test_no_variate_is_zero_however_the_bits_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero's token would be drawn from under any logits."""
    from skipllm_core.kernels.gpu import noise

    def extremes(*_: object) -> tuple[object, ...]:
        token_ids = tl.arange(0, 1024)
        bits = tl.where(token_ids % 2 == 0, 0, -1).to(tl.uint32, bitcast=True)
        return bits, bits, bits, bits

    monkeypatch.setattr(tl, "philox", extremes)
    out = torch.zeros(1, 2)
    noise.exponentials(out, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
    assert out[0].tolist() == pytest.approx([16.6355, 5.96e-8], rel=1e-3)


@pytest.mark.parametrize("kind", SamplingKind)
def test_a_step_has_nothing_in_it_that_a_capture_forbids(
    monkeypatch: pytest.MonkeyPatch, kind: SamplingKind
) -> None:
    """Operators that wait for the device, or that bring a tensor from the host."""
    monkeypatch.setattr(device_sampler, "exponentials", lambda *_: None)  # a kernel
    sampler = make_sampler()
    with Operators() as found:
        sampler.step(3, kind)
    from_host = {"lift_fresh", "lift_fresh_copy", "scalar_tensor", "_pin_memory"}
    assert found.names >= {"argmax", "scatter_add_"}
    assert not found.names & (WAITING | from_host)
