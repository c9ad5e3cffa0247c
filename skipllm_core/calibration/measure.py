"""Runs prompts through the model for calibration: what the full model sees, what skipping does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from skipllm_core.calibration.probe import Probe, Prompts, extend
from skipllm_core.calibration.work import Work
from skipllm_core.errors import ConfigError
from skipllm_core.model.attention import ContextRow
from skipllm_core.sequence import Sequence as Seq
from skipllm_core.skip.policy import NeverGate, gate_for, similarity, skip_at
from skipllm_core.types import SkipParams

FULL = SkipParams(policy="never")
MAX_RECORDED_TOKENS = 2**16  # the similarities of more are not kept: every n-th token's are


# What the full model sees ------------------------------------------------------------------------


@dataclass(slots=True)
class Recording:
    """The full model's greedy answers, seen from inside.

    Of the tokens kept: the similarity of each layer [num_kept, num_layers], and how many tokens
    their answers had before them [num_kept]. Of all of them: the layers' Block Influence.
    """

    similarities: Tensor
    generated: Tensor
    block_influence: list[float]
    num_tokens: int


@dataclass(slots=True)
class _Seen:
    """A group's share of a `Recording`; the sums of cos(layer in, layer out) are by layer."""

    similarities: bytes  # float32
    generated: list[int]
    layer_cosines: list[float]
    num_tokens: int


def record(probe: Probe, prompts: Prompts, work: Work) -> Recording:
    longest_answer = min(probe.max_tokens, probe.runner.max_model_len)
    every = math.ceil(len(prompts) * longest_answer / MAX_RECORDED_TOKENS)
    seen = [
        work.do(
            f"record {number}",
            len(group),
            partial(_record_group, probe, group, every),
            _Seen,
        )
        for number, group in enumerate(probe.groups(prompts, rows_per_prompt=1))
    ]
    num_tokens = sum(one.num_tokens for one in seen)
    if not num_tokens:
        raise ConfigError("every answer of the model is a single token: nothing is decoded")
    data = bytearray().join(one.similarities for one in seen)
    sums = [sum(layer) for layer in zip(*(one.layer_cosines for one in seen), strict=True)]
    return Recording(
        torch.frombuffer(data, dtype=torch.float32).view(-1, probe.runner.num_layers),
        torch.tensor([count for one in seen for count in one.generated]),
        [1.0 - cosine / num_tokens for cosine in sums],
        num_tokens,
    )


def _record_group(probe: Probe, prompts: Prompts, every: int) -> _Seen:
    (all_seqs,) = probe.prefill(prompts, FULL)
    seqs = all_seqs
    while seqs := [seq for seq in seqs if not probe.has_ended(seq)]:
        tokens = probe.decode(seqs, NeverGate(len(seqs))).argmax(dim=-1).tolist()
        for seq, token_id in zip(seqs, tokens, strict=True):
            extend(seq, token_id)
    num_layers = probe.runner.num_layers
    seen = _Seen(b"", [], [0.0] * num_layers, 0)
    parts = []
    for seq in all_seqs:
        if seq.num_output_tokens < 2:
            continue  # its only token came with the prompt
        ffns, layers = _look_inside(probe, seq)
        kept = torch.arange((-seen.num_tokens) % every, len(ffns), every)
        parts.append(ffns[kept])
        seen.generated += (kept + 1).tolist()
        seen.num_tokens += len(ffns)
        of_seq = layers.double().sum(dim=0).tolist()
        seen.layer_cosines = [a + b for a, b in zip(seen.layer_cosines, of_seq, strict=True)]
    if parts:
        seen.similarities = torch.cat(parts).numpy().tobytes()
    return seen


def _look_inside(probe: Probe, seq: Seq) -> tuple[Tensor, Tensor]:
    """Cosines before and after each layer's FFN, and before and after each layer, of the tokens of
    an answer that were decoded: [num_tokens, num_layers] float32 each, on the CPU. The answer is
    run again in one piece, behind its prompt, which the cache has."""
    runner = probe.runner
    start, num_tokens = seq.num_prompt_tokens, seq.num_output_tokens - 1
    row = ContextRow(start, num_tokens, seq.block_table)
    ctx = runner.model.context([row], runner.kv_cache)
    token_ids = seq.token_ids[start : start + num_tokens]
    h = runner.model.embed(torch.tensor(token_ids, device=runner.kv_cache.device))
    ffns, layers = [], []
    for block in runner.model.blocks:
        attended = block.attend(h, ctx)
        after = block.feed_forward(attended)
        ffns.append(similarity(attended, after))
        layers.append(similarity(h, after))
        h = after
    return torch.stack(ffns, dim=-1).cpu(), torch.stack(layers, dim=-1).cpu()


# What skipping does ------------------------------------------------------------------------------


@dataclass(slots=True)
class Measurement:
    """Sums over the tokens decoded after the warm-up.

    `free`: the skipping model reads its own text; `forced`: it reads the full model's.
    """

    trigger_layers: list[int]  # per layer: free tokens that triggered there,
    skipped_layers: list[int]  # and that skipped it
    num_free_tokens: int = 0
    num_forced_tokens: int = 0
    num_agreeing: int = 0
    sum_kl: float = 0.0
    sum_nll: float = 0.0  # of the full model's text,
    sum_full_nll: float = 0.0  # and of the same by the full model

    @classmethod
    def none(cls, num_layers: int) -> Measurement:
        return cls(trigger_layers=[0] * num_layers, skipped_layers=[0] * num_layers)

    @property
    def token_skip_ratio(self) -> float:
        return self.weight_skip_ratio(batch=1)

    def weight_skip_ratio(self, batch: int) -> float:
        """Share of FFN weight reads that `batch` rows avoid which skip independently of each other:
        layer l is not read where all of them skip it, with probability P(skips l) ** batch."""
        shares = [count / max(1, self.num_free_tokens) for count in self.skipped_layers]
        return sum(share**batch for share in shares) / len(shares)

    @property
    def top1_agreement(self) -> float:
        return self.num_agreeing / max(1, self.num_forced_tokens)

    @property
    def kl(self) -> float:
        """KL(full || skipping) in nats per token."""
        return self.sum_kl / max(1, self.num_forced_tokens)

    @property
    def perplexity_change(self) -> float:
        """Skipping's perplexity over the full model's, less 1."""
        return math.expm1((self.sum_nll - self.sum_full_nll) / max(1, self.num_forced_tokens))

    def add(self, other: Measurement) -> None:
        for name in ("trigger_layers", "skipped_layers"):
            pairs = zip(getattr(self, name), getattr(other, name), strict=True)
            setattr(self, name, [a + b for a, b in pairs])
        for name in (
            "num_free_tokens", "num_forced_tokens", "num_agreeing",
            "sum_kl", "sum_nll", "sum_full_nll",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))


def measure(probe: Probe, prompts: Prompts, skip: SkipParams, work: Work) -> Measurement:
    """Each prompt three times side by side: in full, skipping on the full one's text, and skipping
    freely. All greedy."""
    return _over_groups(probe, prompts, skip, work, "measure", 3, _measure_group)


def forced_kl(probe: Probe, prompts: Prompts, skip: SkipParams, work: Work) -> float:
    """The KL on the full model's text, and nothing else."""
    of_group = partial(_measure_group, is_free=False)
    return _over_groups(probe, prompts, skip, work, "cost", 2, of_group).kl


def free_skip_ratio(probe: Probe, prompts: Prompts, skip: SkipParams, work: Work) -> float:
    """The token_skip_ratio of greedy answers after the warm-up, and nothing else."""
    return _over_groups(probe, prompts, skip, work, "free", 1, _free_group).token_skip_ratio


def _over_groups(
    probe: Probe,
    prompts: Prompts,
    skip: SkipParams,
    work: Work,
    name: str,
    rows_per_prompt: int,
    of_group: Callable[[Probe, Prompts, SkipParams], Measurement],
) -> Measurement:
    what = f"{name} {skip.cold_start} {skip.cold_end} {skip.threshold!r}"
    result = Measurement.none(probe.runner.num_layers)
    for number, group in enumerate(probe.groups(prompts, rows_per_prompt)):
        compute = partial(of_group, probe, group, skip)
        amount = rows_per_prompt * len(group)
        result.add(work.do(f"{what} {number}", amount, compute, Measurement))
    return result


def _measure_group(
    probe: Probe, prompts: Prompts, skip: SkipParams, *, is_free: bool = True
) -> Measurement:
    result = Measurement.none(probe.runner.num_layers)
    full, forced, *rest = probe.prefill(prompts, FULL, skip, *[skip] * is_free)
    free = rest[0] if rest else []
    while True:
        going = [n for n, seq in enumerate(full) if not probe.has_ended(seq)]
        full, forced = [full[n] for n in going], [forced[n] for n in going]
        free = [seq for seq in free if not probe.has_ended(seq)]
        if not full and not free:
            return result
        seqs = full + forced + free
        gate = gate_for([skip_at(seq, seq.num_tokens - 1) for seq in seqs])
        logits = probe.decode(seqs, gate)
        n = len(full)
        _count_forced(result, forced, logits[:n], logits[n : 2 * n])
        _count_free(result, free, gate.skipped_layers[2 * n :])
        tokens = logits.argmax(dim=-1).tolist()
        for seq, token_id in zip(seqs, tokens[:n] + tokens[:n] + tokens[2 * n :], strict=True):
            extend(seq, token_id)


def _free_group(probe: Probe, prompts: Prompts, skip: SkipParams) -> Measurement:
    result = Measurement.none(probe.runner.num_layers)
    (seqs,) = probe.prefill(prompts, skip)
    while seqs := [seq for seq in seqs if not probe.has_ended(seq)]:
        gate = gate_for([skip_at(seq, seq.num_tokens - 1) for seq in seqs])
        tokens = probe.decode(seqs, gate).argmax(dim=-1).tolist()
        _count_free(result, seqs, gate.skipped_layers)
        for seq, token_id in zip(seqs, tokens, strict=True):
            extend(seq, token_id)
    return result


def _count_forced(result: Measurement, seqs: list[Seq], full: Tensor, skipping: Tensor) -> None:
    rows = [n for n, seq in enumerate(seqs) if not seq.is_warming_up]
    full, skipping = full[rows].log_softmax(dim=-1), skipping[rows].log_softmax(dim=-1)
    text = full.argmax(dim=-1, keepdim=True)  # what the full model goes on with
    result.num_forced_tokens += len(rows)
    result.num_agreeing += int((text[:, 0] == skipping.argmax(dim=-1)).sum())
    result.sum_kl += float((full.exp() * (full - skipping)).sum())
    result.sum_nll -= float(skipping.gather(1, text).sum())
    result.sum_full_nll -= float(full.gather(1, text).sum())


def _count_free(
    result: Measurement, seqs: list[Seq], skipped_layers: Sequence[Sequence[int]]
) -> None:
    for seq, skipped in zip(seqs, skipped_layers, strict=True):
        if seq.is_warming_up:
            continue
        result.num_free_tokens += 1
        if skipped:
            result.trigger_layers[skipped[0] - 1] += 1
        for layer in skipped:
            result.skipped_layers[layer] += 1
