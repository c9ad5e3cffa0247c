"""Steps of sequences outside the engine: what calibration measures is driven from here."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from skipllm_core.engine.runner import ScheduledSeq
from skipllm_core.errors import ConfigError
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence as Seq
from skipllm_core.skip.policy import NeverGate, SkipGate
from skipllm_core.types import SamplingParams, SkipParams

Prompts: TypeAlias = list[list[int]]  # token ids


class Probe:
    """Drives the runner with sequences of its own: each has the blocks for its prompt and answer
    from the start, and all of a group take their steps together."""

    def __init__(self, runner: TorchModelRunner, *, max_tokens: int, max_num_seqs: int) -> None:
        self.runner = runner
        self.max_tokens = max_tokens
        self._max_num_seqs = max_num_seqs
        self._eos_token_ids = runner.model.config.eos_token_ids

    def groups(self, prompts: Prompts, rows_per_prompt: int) -> list[Prompts]:
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

    def prefill(self, prompts: Prompts, *skips: SkipParams) -> list[list[Seq]]:
        """One list of sequences per skip setting, each with its prompt in the cache and the first
        token generated."""
        num_blocks = self._num_blocks(max(map(len, prompts)))
        columns: list[list[Seq]] = []
        for skip in skips:
            columns.append([])
            for prompt in prompts:
                seq = Seq(0, prompt, SamplingParams(max_tokens=self.max_tokens, skip=skip))
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
        return min(num_prompt_tokens + self.max_tokens, self.runner.max_model_len)

    def _num_blocks(self, num_prompt_tokens: int) -> int:
        return -(-self._max_len(num_prompt_tokens) // self.runner.block_size)


def extend(seq: Seq, token_id: int) -> None:
    """Everything before the new token is in the cache."""
    seq.num_computed_tokens = seq.num_tokens
    seq.token_ids.append(token_id)
