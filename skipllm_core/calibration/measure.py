"""What skipping does to answers, by passes over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipllm_core.calibration.passes import Group, Pass, Passes
from skipllm_core.model.llama import LlamaModel
from skipllm_core.types import ROWS_PER_NEURON, SkipParams, num_rows_left_out

BATCHES = (1, 4, 8, 16)  # that the weight skip ratio is told for
SLICE_LOGITS = 2**25  # that exist at once of a model: 128 MiB; fewer rows make slow products


@dataclass(frozen=True, slots=True)
class Measurement:
    """Of one setting, over the tokens behind the warm-up."""

    num_tokens: int
    skipped_ffn_share: float
    weight_skip_ratio: dict[int, float]  # by batch size
    top1_agreement: float
    kl: float  # KL(full || skipping) in nats per token
    perplexity_change: float  # of the text: skipping's over the full model's, less 1
    trigger_layers: list[int]  # per layer: tokens whose first skipped layer is the next
    skipped_layers: list[int]  # per layer: tokens that skipped it


def measure(
    passes: Passes,
    groups: Sequence[Group],
    skips: Sequence[SkipParams],
    on_tokens: Callable[[int], None] = lambda count: None,
    *,
    is_together: bool = False,
) -> list[Measurement]:
    """Settings side by side, so that the full model's head is taken once for all of them: they
    have the same warm-up. `on_tokens` hears of tokens that passed. `is_together`: each group is a
    batch whose rows leave neurons out together."""
    run = passes.together if is_together else passes.under
    model = passes.model
    sums = [_Sums(model) for _ in skips]
    for group in groups:
        full = passes.in_full(group)
        found = []
        for skip, of_skip in zip(skips, sums, strict=True):
            found.append(run(group, skip, of_skip.see_neurons))
            of_skip.count(found[-1])
            on_tokens(len(found[-1].rows))
        places = found[0].places
        assert all(torch.equal(places, passed.places) for passed in found), "one warm-up"
        _compare(model, full[places], group.targets[places], [passed.h for passed in found], sums)
    return [of_skip.measurement() for of_skip in sums]


class _Sums:
    """What groups add up to."""

    def __init__(self, model: LlamaModel) -> None:
        config = model.config
        num_layers, self._num_neurons = config.num_layers, config.intermediate_size
        self._num_tokens = 0
        self._trigger_layers = [0] * num_layers
        self._skipped_layers = [0] * num_layers
        self._num_neuron_rows = 0
        # Per layer and neuron: tokens that were without it, before up and before down.
        self._without: list[Tensor | None] = [None] * num_layers
        self.num_agreeing = 0
        self.kl = self.nll = self.full_nll = 0.0

    def see_neurons(self, layer: int, no_up: Tensor, no_down: Tensor) -> None:
        counts = torch.stack((no_up.sum(dim=0), no_down.sum(dim=0)))
        before = self._without[layer]
        self._without[layer] = counts if before is None else before + counts

    def count(self, passed: Pass) -> None:
        self._num_tokens += len(passed.rows)
        for row in passed.rows:
            skipped = passed.gate.skipped_layers[row]
            if skipped and skipped[0]:
                self._trigger_layers[skipped[0] - 1] += 1
            for layer in skipped:
                self._skipped_layers[layer] += 1
            self._num_neuron_rows += num_rows_left_out(tuple(passed.gate.neurons.counts[row]))

    def measurement(self) -> Measurement:
        num_tokens = max(1, self._num_tokens)
        block_rows = ROWS_PER_NEURON * self._num_neurons
        all_rows = num_tokens * len(self._skipped_layers) * block_rows
        skipped_rows = sum(self._skipped_layers) * block_rows + self._num_neuron_rows
        return Measurement(
            num_tokens=self._num_tokens,
            skipped_ffn_share=skipped_rows / all_rows,
            weight_skip_ratio={batch: self._weight_skip_ratio(batch) for batch in BATCHES},
            top1_agreement=self.num_agreeing / num_tokens,
            kl=self.kl / num_tokens,
            perplexity_change=math.expm1((self.nll - self.full_nll) / num_tokens),
            trigger_layers=self._trigger_layers,
            skipped_layers=self._skipped_layers,
        )

    def _weight_skip_ratio(self, batch: int) -> float:
        """Share of FFN weight reads that `batch` rows avoid which skip independently of each other:
        what a token does without with probability p, all of them do without with p ** batch. Of
        neurons, up's and down's rows have each a probability of their own."""
        num_tokens = max(1, self._num_tokens)
        avoided = 0.0
        for skipped, without in zip(self._skipped_layers, self._without, strict=True):
            avoided += (skipped / num_tokens) ** batch
            if without is not None:
                shares = without.double() / num_tokens
                avoided += float((shares**batch).sum()) / (ROWS_PER_NEURON * self._num_neurons)
        return avoided / len(self._skipped_layers)


def _compare(
    model: LlamaModel, full: Tensor, targets: Tensor, found: Sequence[Tensor], sums: Sequence[_Sums]
) -> None:
    """Takes the heads of residuals [num_tokens, hidden] slice by slice, and adds up what the
    distributions differ in. Logits of all tokens never exist."""
    for part in _slices(len(targets), max(1, SLICE_LOGITS // model.config.vocab_size)):
        text = targets[part, None]
        log_p = model.head(full[part])
        log_p -= log_p.logsumexp(dim=-1, keepdim=True)
        best = log_p.argmax(dim=-1)
        full_nll = -float(log_p.gather(1, text).double().sum())
        p = log_p.exp()
        entropy = -_dot(p, log_p)
        del log_p
        for h, of_skip in zip(found, sums, strict=True):
            logits = model.head(h[part])
            total = logits.logsumexp(dim=-1)
            of_skip.kl += float((total - entropy - _dot(p, logits)).double().sum())
            of_skip.num_agreeing += int((logits.argmax(dim=-1) == best).sum())
            of_skip.nll += float((total - logits.gather(1, text)[:, 0]).double().sum())
            of_skip.full_nll += full_nll


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each row of a and b [num_rows, size], without a product of that size."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]
