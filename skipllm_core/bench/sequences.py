"""The sequences of a benchmark, and where they lie in the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from skipllm_core.bench.cases import Case
from skipllm_core.engine.runner import Batch, ScheduledSeq
from skipllm_core.errors import ConfigError
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence as Seq
from skipllm_core.types import SamplingParams, SkipParams


class SequencePool:
    """Sequences for every case, each of which decodes its own text from the same prompts.

        row 0:  [ blocks full of prompt ][ rest of the prompt, tokens of case A ]
                                        [ rest of the prompt, tokens of case B ]

    The full blocks of a row's prompt are computed once and are shared, what follows is each case's
    own: so cases can take turns after every few steps. From round to round, cases of one batch size
    change places: where K/V lie can cost some percent, and must not look like a case's cost.
    """

    def __init__(
        self,
        runner: TorchModelRunner,
        prompts: Sequence[list[int]],
        cases: Sequence[Case],
        *,
        max_tokens: int,
        chunk_tokens: int,
    ) -> None:
        """One prompt per row of the largest batch. Computes the prompts; raises ConfigError."""
        self._runner = runner
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._seq_ids = count()
        size = runner.block_size
        num_full = [len(prompt) // size for prompt in prompts]
        num_all = [-(-(len(prompt) + max_tokens) // size) for prompt in prompts]
        blocks = iter(range(runner.num_kv_blocks))
        try:
            full = [[next(blocks) for _ in range(n)] for n in num_full]
            self._tables = {
                case: [
                    full[row] + [next(blocks) for _ in range(num_all[row] - num_full[row])]
                    for row in range(case.batch)
                ]
                for case in cases
            }
        except StopIteration:
            raise ConfigError(
                "the sequences do not fit into the KV cache: lower --batch or --context, or "
                "measure fewer cases at once"
            ) from None
        self._first_tokens = [-1] * len(prompts)
        self._is_computed = [False] * len(prompts)
        for case in cases:
            for row in range(case.batch):
                self._prefill(row, self._tables[case][row], num_full[row] * size, chunk_tokens)

    def start(self, case: Case, round_number: int) -> list[Seq]:
        """The rows of a case as they are after the prefill: the token that it gave is there, and
        not yet decoded."""
        mates = [mate for mate in self._tables if mate.batch == case.batch]
        tables = self._tables[mates[(mates.index(case) + round_number) % len(mates)]]
        seqs = [self._seq(row, tables[row], case.skip) for row in range(case.batch)]
        for seq, token_id in zip(seqs, self._first_tokens, strict=False):
            append(seq, token_id)
        return seqs

    def _prefill(self, row: int, table: list[int], num_shared: int, chunk_tokens: int) -> None:
        """The row's prompt; if it has been computed for another case, what is not shared of it."""
        seq = self._seq(row, table)
        if not self._is_computed[row]:
            self._first_tokens[row] = prefill(self._runner, seq, chunk_tokens)
            self._is_computed[row] = True
        elif num_shared < seq.num_tokens:
            seq.num_computed_tokens = num_shared
            prefill(self._runner, seq, chunk_tokens)

    def _seq(self, row: int, table: list[int], skip: SkipParams | None = None) -> Seq:
        params = SamplingParams(
            max_tokens=self._max_tokens, temperature=0.0, skip=skip or SkipParams()
        )
        seq = Seq(next(self._seq_ids), self._prompts[row], params)
        seq.block_table = list(table)
        return seq


def prefill(runner: TorchModelRunner, seq: Seq, chunk_tokens: int) -> int:
    """Computes the prompt in steps of `chunk_tokens`; returns the first token of the answer."""
    result = None
    while seq.num_computed_tokens < seq.num_tokens:
        num_tokens = min(chunk_tokens, seq.num_tokens - seq.num_computed_tokens)
        result = runner.run(Batch("prefill", (ScheduledSeq(seq, num_tokens),)))
        seq.num_computed_tokens += num_tokens
    assert result is not None, "a prompt has at least one token"
    return sampled(result.rows[0].token_id)


def append(seq: Seq, token_id: int) -> None:
    """Everything before the new token is in the cache."""
    seq.num_computed_tokens = seq.num_tokens
    seq.token_ids.append(token_id)


def sampled(token_id: int | None) -> int:
    if token_id is None:
        raise ConfigError("the model's output is not finite: try --dtype float32")
    return token_id
