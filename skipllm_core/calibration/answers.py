"""Answers that calibration reads: the model's own, or finished ones that it is given.

No torch here: the command line reads them from files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from skipllm_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids of a prompt and of what was answered; no answer: the model is to give it."""

    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def num_decoded_tokens(self) -> int:
        """Tokens that decoding computes one by one: the last is generated and not computed on."""
        return max(0, len(self.answer_ids) - 1)


def check_answers(answers: Sequence[Answer], max_model_len: int, vocab_size: int) -> None:
    """Raises ConfigError for empty prompts, for ids that the model has no embedding of, and where a
    prompt leaves no room for an answer of two tokens: one is generated with the prompt, and one
    decoded."""
    if not all(answer.prompt_ids for answer in answers):
        raise ConfigError("a prompt has no tokens")
    largest = max(max(answer.prompt_ids + answer.answer_ids) for answer in answers)
    if largest >= vocab_size:
        raise ConfigError(
            f"an answer or its prompt has the token id {largest}, the model's vocabulary "
            f"{vocab_size} entries"
        )
    longest = max(len(answer.prompt_ids) for answer in answers)
    if longest > max_model_len - 2:
        raise ConfigError(
            f"a prompt of {longest} tokens leaves no room for an answer in a context of "
            f"{max_model_len}"
        )


def cut(answer: Answer, max_tokens: int, max_model_len: int) -> Answer:
    """No more of the answer than would have been generated."""
    room = min(max_tokens, max_model_len - len(answer.prompt_ids))
    return replace(answer, answer_ids=answer.answer_ids[:room])
