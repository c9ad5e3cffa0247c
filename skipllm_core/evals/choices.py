"""Multiple choice as lm-evaluation-harness scores it: each choice behind the question, in one pass.

Nothing is generated. What the setting skips it skips over question and choice, from their second
token on and with no warm-up, which would cover the most of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from skipllm_core.engine.engine import Engine
from skipllm_core.evals.records import Record, Setting
from skipllm_core.evals.tasks import Item
from skipllm_core.tokenizer import Tokenizer
from skipllm_core.types import SamplingParams, SkipParams


def choose(
    engine: Engine, tokenizer: Tokenizer, items: Sequence[Item], setting: Setting, skip: SkipParams
) -> Iterator[Record]:
    """A record of each item: its answer is the choice whose tokens' log-probabilities have the
    highest sum. All choices are in the engine at once."""
    skip = replace(skip, prompt=True, warmup_tokens=0)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, skip=skip)
    scored: list[_Choice] = []
    for item in items:
        question = f"Question: {item.turns[-1]}\nAnswer:"
        num_given = len(tokenizer.encode(question))
        for text in item.choices:
            # Together, so that the choice's first token is the one that it has in a text.
            ids = tokenizer.encode(f"{question} {text}")
            engine.add(len(scored), ids, params)
            scored.append(_Choice(item.id, text, len(ids), num_given))
    while (step := engine.step()) is not None:
        for output in step.outputs:
            choice = scored[output.seq_id]
            if output.error is not None:
                raise RuntimeError(f"the engine failed on {choice.item_id}: {output.error}")
            choice.logprobs += [found.logprob for found in output.prompt_logprobs]
            if (usage := output.skip_usage) is not None:
                choice.skipped = usage.skipped_ffn_share * usage.total_ffn_blocks
                choice.total = usage.total_ffn_blocks
    for item in items:
        of_item = [choice for choice in scored if choice.item_id == item.id]
        yield Record(
            setting=setting,
            task=item.task,
            item_id=item.id,
            answers=(max(of_item, key=lambda choice: choice.score).text,),
            num_tokens=sum(choice.num_tokens for choice in of_item) // len(of_item),
            skipped_ffn_blocks=sum(choice.skipped for choice in of_item),
            total_ffn_blocks=sum(choice.total for choice in of_item),
        )


class _Choice:
    """One choice under way. `num_given` of its tokens are the question's."""

    def __init__(self, item_id: str, text: str, num_tokens: int, num_given: int) -> None:
        self.item_id = item_id
        self.text = text
        self.num_tokens = num_tokens
        self.logprobs: list[float] = []  # of the tokens behind the first
        self.skipped, self.total = 0.0, 0
        self._num_given = num_given

    @property
    def score(self) -> float:
        return sum(self.logprobs[self._num_given - 1 :])
