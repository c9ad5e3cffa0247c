"""Runs prompts through the model for calibration: what the full model sees, what skipping does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipllm_core.engine.runner import ScheduledSeq
from skipllm_core.errors import ConfigError
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence as Seq
from skipllm_core.skip.policy import NeverGate, SkipGate, gate_for, skip_at
from skipllm_core.types import SamplingParams, SkipParams

FULL = SkipParams(policy="never")


class Probe:
    """Drives the runner with sequences of its own: each has the blocks for its prompt and answer
    from the start, and all of a group take their steps together."""

    def __init__(self, runner: TorchModelRunner, *, max_tokens: int, max_num_seqs: int) -> None:
        self.runner = runner
        self._max_tokens = max_tokens
        self._max_num_seqs = max_num_seqs
        self._eos_token_ids = runner.model.config.eos_token_ids

    def groups(self, prompts: list[list[int]], rows_per_prompt: int) -> list[list[list[int]]]:
        """The prompts in groups that fit into the cache at once, `rows_per_prompt` times each."""
        longest = max(map(len, prompts))
        if longest > self.runner.max_model_len - 2:  # one token is sampled, one decoded
            raise ConfigError(
                f"a prompt of {longest} tokens leaves no room for an answer in a context of "
                f"{self.runner.max_model_len}"
            )
        num_fitting = self.runner.num_kv_blocks // self._num_blocks(longest)
        size = min(num_fitting, self._max_num_seqs) // rows_per_prompt
        if not size:
            raise ConfigError(
                f"calibration runs {rows_per_prompt} sequences of {self._max_len(longest)} "
                "tokens side by side: raise --kv-cache-memory or --max-num-seqs"
            )
        return [prompts[n : n + size] for n in range(0, len(prompts), size)]

    def prefill(self, prompts: list[list[int]], *skips: SkipParams) -> list[list[Seq]]:
        """One list of sequences per skip setting, each with its prompt in the cache and the first
        token generated."""
        num_blocks = self._num_blocks(max(map(len, prompts)))
        columns: list[list[Seq]] = []
        for skip in skips:
            columns.append([])
            for prompt in prompts:
                seq = Seq(0, prompt, SamplingParams(max_tokens=self._max_tokens, skip=skip))
                first_block = num_blocks * sum(map(len, columns))
                seq.block_table = list(range(first_block, first_block + num_blocks))
                row = ScheduledSeq(seq, seq.num_tokens)
                extend(seq, int(self.runner.logits([row], NeverGate(seq.num_tokens)).argmax()))
                columns[-1].append(seq)
        return columns

    def decode(self, seqs: list[Seq], gate: SkipGate) -> Tensor:
        """The next logits [num_seqs, vocab] of sequences that `extend` gave their newest token."""
        return self.runner.logits([ScheduledSeq(seq, 1) for seq in seqs], gate)

    def has_ended(self, seq: Seq) -> bool:
        is_full = seq.num_tokens >= self._max_len(seq.num_prompt_tokens)
        return is_full or seq.token_ids[-1] in self._eos_token_ids

    def _max_len(self, num_prompt_tokens: int) -> int:
        return min(num_prompt_tokens + self._max_tokens, self.runner.max_model_len)

    def _num_blocks(self, num_prompt_tokens: int) -> int:
        return -(-self._max_len(num_prompt_tokens) // self.runner.block_size)


def extend(seq: Seq, token_id: int) -> None:
    """Everything before the new token is in the cache."""
    seq.num_computed_tokens = seq.num_tokens
    seq.token_ids.append(token_id)


class SimilarityRecorder(NeverGate):
    """Skips nothing and keeps what it is shown."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(num_rows)
        self._layers: list[Sequence[float]] = []

    def watches(self, layer: int) -> bool:
        return True

    def observe(self, layer: int, similarities: Sequence[float]) -> None:
        self._layers.append(similarities)

    @property
    def similarities(self) -> Tensor:
        """[num_rows, num_layers], on the CPU."""
        return torch.tensor(self._layers).T


def record(probe: Probe, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The full model's greedy answers, seen from inside. Per decoded token: the similarity of each
    layer [num_tokens, num_layers], and how many tokens its answer had before it [num_tokens].
    """
    similarities: list[Tensor] = []
    generated: list[int] = []
    for group in probe.groups(prompts, rows_per_prompt=1):
        (seqs,) = probe.prefill(group, FULL)
        while seqs := [seq for seq in seqs if not probe.has_ended(seq)]:
            gate = SimilarityRecorder(len(seqs))
            tokens = probe.decode(seqs, gate).argmax(dim=-1).tolist()
            similarities.append(gate.similarities)
            generated += [seq.num_output_tokens for seq in seqs]
            for seq, token_id in zip(seqs, tokens, strict=True):
                extend(seq, token_id)
    if not similarities:
        raise ConfigError("every answer of the model is a single token: nothing is decoded")
    return torch.cat(similarities), torch.tensor(generated)


@dataclass(slots=True)
class Measurement:
    """Sums over the tokens decoded after the warm-up.

    `free`: the skipping model reads its own text; `forced`: it reads the full model's.
    """

    trigger_layers: list[int]  # per layer, over the free tokens
    num_free_tokens: int = 0
    num_skipped: int = 0
    num_forced_tokens: int = 0
    num_agreeing: int = 0
    sum_kl: float = 0.0

    @property
    def token_skip_ratio(self) -> float:
        return self.num_skipped / max(1, self.num_free_tokens * len(self.trigger_layers))

    @property
    def top1_agreement(self) -> float:
        return self.num_agreeing / max(1, self.num_forced_tokens)

    @property
    def kl(self) -> float:
        """KL(full || skipping) in nats per token."""
        return self.sum_kl / max(1, self.num_forced_tokens)


def measure(probe: Probe, prompts: list[list[int]], skip: SkipParams) -> Measurement:
    """Each prompt three times side by side: in full, skipping on the full one's text, and skipping
    freely. All greedy."""
    result = Measurement(trigger_layers=[0] * probe.runner.num_layers)
    for group in probe.groups(prompts, rows_per_prompt=3):
        full, forced, free = probe.prefill(group, FULL, skip, skip)
        while True:
            going = [n for n, seq in enumerate(full) if not probe.has_ended(seq)]
            full, forced = [full[n] for n in going], [forced[n] for n in going]
            free = [seq for seq in free if not probe.has_ended(seq)]
            if not full and not free:
                break
            seqs = full + forced + free
            gate = gate_for([skip_at(seq, seq.num_tokens - 1) for seq in seqs])
            logits = probe.decode(seqs, gate)
            n = len(full)
            _count_forced(result, forced, logits[:n], logits[n : 2 * n])
            _count_free(result, free, gate.skipped_layers[2 * n :])
            tokens = logits.argmax(dim=-1).tolist()
            for seq, token_id in zip(seqs, tokens[:n] + tokens[:n] + tokens[2 * n :], strict=True):
                extend(seq, token_id)
    return result


def free_skip_ratio(probe: Probe, prompts: list[list[int]], skip: SkipParams) -> float:
    """The token_skip_ratio of greedy answers after the warm-up, and nothing else."""
    result = Measurement(trigger_layers=[0] * probe.runner.num_layers)
    for group in probe.groups(prompts, rows_per_prompt=1):
        (seqs,) = probe.prefill(group, skip)
        while seqs := [seq for seq in seqs if not probe.has_ended(seq)]:
            gate = gate_for([skip_at(seq, seq.num_tokens - 1) for seq in seqs])
            tokens = probe.decode(seqs, gate).argmax(dim=-1).tolist()
            _count_free(result, seqs, gate.skipped_layers)
            for seq, token_id in zip(seqs, tokens, strict=True):
                extend(seq, token_id)
    return result.token_skip_ratio


def _count_forced(result: Measurement, seqs: list[Seq], full: Tensor, skipping: Tensor) -> None:
    rows = [n for n, seq in enumerate(seqs) if not seq.is_warming_up]
    full, skipping = full[rows].log_softmax(dim=-1), skipping[rows].log_softmax(dim=-1)
    result.num_forced_tokens += len(rows)
    result.num_agreeing += int((full.argmax(dim=-1) == skipping.argmax(dim=-1)).sum())
    result.sum_kl += float((full.exp() * (full - skipping)).sum())


def _count_free(
    result: Measurement, seqs: list[Seq], skipped_layers: Sequence[Sequence[int]]
) -> None:
    for seq, skipped in zip(seqs, skipped_layers, strict=True):
        if seq.is_warming_up:
            continue
        result.num_free_tokens += 1
        result.num_skipped += len(skipped)
        if skipped:
            result.trigger_layers[skipped[0] - 1] += 1
