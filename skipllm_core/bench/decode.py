"""Decode steps of the engine's runner, timed: every case in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from skipllm_core.bench.bandwidth import synchronize
from skipllm_core.bench.cases import Case, forced_layers
from skipllm_core.bench.measurement import DecodeMeasurement, Tally, measurement
from skipllm_core.bench.neurons import neuron_rule
from skipllm_core.bench.roofline import StepBytes, WeightBytes, weight_bytes
from skipllm_core.bench.sequences import SequencePool, append, sampled
from skipllm_core.engine.runner import Batch, ScheduledSeq, StepResult
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence as Seq
from skipllm_core.skip.policy import ForcedGate, RowGate, SkipGate

if TYPE_CHECKING:
    from skipllm_core.bench.compare import TransformersModel

SCORED_TOKENS = 64  # of a prompt, from which thresholds of neurons are taken
TURN_STEPS = 8  # short turns: what else the machine does for a while then hits all cases alike

OnProgress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


def no_progress(what: str, done: int, total: int) -> None:
    pass


class DecodeBench:
    """Lets the cases take turns on one runner, and on transformers' model where a case wants it.

    A round takes every case from its prompts through `steps` decode steps, a few at a time:

        case A: 8 steps | case B: 8 steps | .. | case A: the next 8 | .. | transformers: all of them

    transformers' `generate` cannot be interrupted, and so has its turn at the end of the round.
    """

    def __init__(
        self,
        runner: TorchModelRunner,
        cases: Sequence[Case],
        prompts: Sequence[list[int]],
        *,
        steps: int,
        rounds: int,
        chunk_tokens: int = 512,
        transformers_model: TransformersModel | None = None,
    ) -> None:
        """One prompt per row of the largest batch, all of one length; each batch size has its case
        `never`. Computes the prompts. Raises ConfigError."""
        self._runner = runner
        self._device = torch.device(runner.device)
        self._transformers = transformers_model
        self._prompts = prompts
        self._context = len(prompts[0])
        assert all(len(prompt) == self._context for prompt in prompts)
        self._steps = steps
        self._rounds = rounds
        self._cases = cases
        self._ours = [case for case in cases if case.engine == "skipllm"]
        self._theirs = [case for case in cases if case.engine == "transformers"]
        self._tallies = {case: Tally() for case in cases}
        self._pool = SequencePool(
            runner, prompts, self._ours, max_tokens=steps + 1, chunk_tokens=chunk_tokens
        )
        self._neuron_rules = {
            share: neuron_rule(runner.model, prompts[0][:SCORED_TOKENS], share)
            for share in {case.neuron_share for case in cases}
            if share is not None
        }

    def run(
        self, read_bytes_per_s: float, on_progress: OnProgress = no_progress
    ) -> list[DecodeMeasurement]:
        """A measurement of every case, in their order."""
        total = self._rounds * self._steps * len(self._cases)
        done = 0
        rng = random.Random(0)  # noqa: S311 - no secret depends on it
        for number in range(self._rounds):
            rows = {case: self._pool.start(case, number) for case in self._ours}
            for start in range(0, self._steps, TURN_STEPS):
                num_steps = min(TURN_STEPS, self._steps - start)
                # At random, so that none always follows the same one.
                for case in rng.sample(self._ours, len(self._ours)):
                    on_progress(f"{case.label}, batch {case.batch}", done, total)
                    self._turn(case, rows[case], num_steps)
                    done += num_steps
            for case in self._ours:
                self._tallies[case].tokens = [seq.output_ids for seq in rows[case]]
            for case in self._theirs:
                on_progress(f"{case.label}, batch {case.batch}", done, total)
                self._their_turn(case)
                done += self._steps
        return [
            measurement(
                case,
                self._cases,
                self._tallies,
                self._step_bytes(case),
                num_layers=self._runner.num_layers,
                num_neurons=self._runner.num_neurons,
                context=self._context,
                steps=self._steps,
                rounds=self._rounds,
                read_bytes_per_s=read_bytes_per_s,
            )
            for case in self._cases
        ]

    def tokens_of(self, case: Case) -> list[list[int]]:
        """What each row of a case generated in the last round."""
        return self._tallies[case].tokens

    def _turn(self, case: Case, seqs: Sequence[Seq], num_steps: int) -> None:
        # Not counted: what the case before it left in the caches is gone.
        self._step(seqs, self._gate(case))
        for _ in range(num_steps):
            result, step_s = self._step(seqs, self._gate(case))
            for seq, row in zip(seqs, result.rows, strict=True):
                append(seq, sampled(row.token_id))
            self._tallies[case].count(result, step_s)

    def _gate(self, case: Case) -> SkipGate | None:
        """Of one step; None: the one that the sequences' settings give."""
        if case.neuron_share is not None:
            rules = [self._neuron_rules[case.neuron_share]] * case.batch
            return RowGate(rules, leaves_out_together=case.is_joint)
        mask = _mask(case, self._runner.num_layers)
        return None if mask is None else ForcedGate(mask)

    def _step(self, seqs: Sequence[Seq], gate: SkipGate | None) -> tuple[StepResult, float]:
        """Decodes the newest tokens; repeated, it writes the same K/V again."""
        batch = Batch("decode", tuple(ScheduledSeq(seq, 1) for seq in seqs))
        synchronize(self._device)
        start = time.perf_counter()
        result = self._runner.run(batch, gate)
        return result, time.perf_counter() - start  # the tokens are on the host: all is done

    def _their_turn(self, case: Case) -> None:
        assert self._transformers is not None
        tally = self._tallies[case]
        prompts = self._prompts[: case.batch]
        step_s, tally.tokens = self._transformers.decode(prompts, self._steps + 1)
        tally.step_s += step_s

    def _step_bytes(self, case: Case) -> StepBytes:
        itemsize = None
        if case.engine == "transformers":
            assert self._transformers is not None
            itemsize = self._transformers.itemsize
        return step_bytes(
            self._runner,
            batch=case.batch,
            context=self._context,
            steps=self._steps,
            unquantized_itemsize=itemsize,
        )


def step_bytes(
    runner: TorchModelRunner,
    *,
    batch: int,
    context: int,
    steps: int,
    unquantized_itemsize: int | None = None,
) -> StepBytes:
    """Of the weights as the runner holds them, or as they would be unquantized."""
    config = runner.model.config
    itemsize = getattr(torch, runner.dtype).itemsize
    weights = runner_weight_bytes(runner)
    if unquantized_itemsize is not None:
        itemsize = unquantized_itemsize
        weights = weight_bytes(config, itemsize)
    return StepBytes.of(weights, config, itemsize, batch=batch, context=context, steps=steps)


def runner_weight_bytes(runner: TorchModelRunner) -> WeightBytes:
    """Of the weights as the model holds them: int8 ones with their scales."""
    model = runner.model
    block = model.blocks[0]
    return WeightBytes(
        total=sum(map(_num_bytes, [*model.blocks, model.norm, model.lm_head])),
        ffn_block=_num_bytes(block.norm2) + _num_bytes(block.ffn),
    )


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def _mask(case: Case, num_layers: int) -> list[list[bool]] | None:
    if not case.forced_skips:
        return None
    return [
        [layer in forced_layers(count, num_layers) for layer in range(num_layers)]
        for count in case.forced_skips
    ]
