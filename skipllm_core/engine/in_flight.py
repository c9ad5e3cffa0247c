"""Steps whose results are not read yet.

A runner that computes on a device of its own (`LateModelRunner`) has two steps in flight: step n+1
is launched before the tokens of step n are read, so the device need not wait for Python. What
this asks for:

- A row of step n+1 whose token of step n ends it (a stop token, an error) or that is aborted has
  been computed in vain: its result is dropped when it comes. Ends that are known beforehand
  (max_tokens, the context) are not overrun: such a row is not scheduled again.
- Blocks of such a row are lent anew at once, though step n+1 still writes to one of them. Nothing
  is broken: steps run in the order of their launches, and whoever gets the block writes its slots
  in a later step, before any later step reads them. Published blocks are written by nobody: they
  hold prompt tokens, and step n+1 writes behind the prompt.
- A row preempted in flight keeps the token of step n; it is not admitted before that is read.
- A row under a grammar is launched only when the token before is read and the mask made of it:
  other rows go ahead without it, and it misses the steps between.
- Nothing is launched behind a prefill until that is read: its blocks are published only when it
  is known to have succeeded, and its first tokens are on their way to the client soonest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skipllm_core.engine.runner import Batch, LateModelRunner, ModelRunner, StepResult
from skipllm_core.sequence import SeqStatus


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was launched, and what the scheduler counted for it."""

    batch: Batch
    read: Callable[[], StepResult]  # raises if the step failed, its launch included
    start_s: float
    host_s: float  # from the start of its scheduling to the end of its launch
    num_preemptions: int
    num_prefix_cache_queries: int
    num_prefix_cache_hits: int

    @property
    def is_dropped(self) -> bool:
        """Whether all its rows have ended meanwhile, so that nobody waits for its results."""
        return all(row.seq.status is SeqStatus.FINISHED for row in self.batch.rows)


def launch(runner: ModelRunner, batch: Batch) -> Callable[[], StepResult]:
    """Launches the step; a runner that does not read late computes it. What is returned gives the
    results, or raises what the launch or the step did: in its turn, after the steps before it."""
    try:
        if isinstance(runner, LateModelRunner):
            return runner.launch(batch)
        result = runner.run(batch)
    except Exception as error:
        failure = error

        def fail() -> StepResult:
            raise failure

        return fail
    return lambda: result
