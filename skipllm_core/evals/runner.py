"""Leads every item's conversation under every setting, skipping what the journal already has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, get_args

from skipllm_core.chat_template import Message
from skipllm_core.errors import ConfigError, InvalidRequestError
from skipllm_core.evals.records import FULL, Journal, Record, Setting, Timing, mean_answer_tokens
from skipllm_core.evals.tasks import Item
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, resolve_skip
from skipllm_core.types import SkipPolicyName


class Backend(Protocol):
    """Answers items of one task under one setting, yielding each as it is done, the timing last.
    `budget_tokens` is told for the policy `early_exit` alone."""

    def lead(
        self, items: Sequence[Item], setting: Setting, budget_tokens: int | None = None
    ) -> Iterator[Record | Timing]: ...


def grid(
    policies: Sequence[str], ratios: Sequence[float], profile: SkipProfile | None = None
) -> list[Setting]:
    """The full model first: the others are compared with it. The policy `all` stands for every one
    of the build's, at the ratios that the profile, where it is known, has it reach. Raises
    ConfigError."""
    known = ("auto", *get_args(SkipPolicyName))
    is_all = "all" in policies
    if is_all:
        policies = [*get_args(SkipPolicyName), *(name for name in policies if name == "auto")]
    if unknown := [policy for policy in policies if policy not in known]:
        raise ConfigError(f"this build has no policy {unknown[0]!r}; it has: {', '.join(known)}")
    return [FULL] + [
        Setting(policy=policy, ratio=ratio)
        for policy in policies
        for ratio in ratios
        if policy != "never" and ratio > 0
        if not is_all or profile is None or _is_reached(profile, policy, ratio)
    ]


def _is_reached(profile: SkipProfile, policy: Any, ratio: float) -> bool:
    try:
        resolve_skip(SkipDefaults(), profile, SkipOptions(policy=policy, ratio=ratio))
    except InvalidRequestError:
        return False
    return True


def run(
    backend: Backend,
    plan: Sequence[tuple[Setting, Sequence[Item]]],
    journal: Journal,
    on_answer: Callable[[], None] = lambda: None,
) -> None:
    """`on_answer` is called once per item and setting, those that the journal had included."""
    for setting, items in plan:
        missing = []
        for item in items:
            if (setting, item.task, item.id) in journal.records:
                on_answer()
            else:
                missing.append(item)
        if not missing:
            continue
        budget_tokens = None
        if setting.policy == "early_exit":
            budget_tokens = mean_answer_tokens(journal.records.values(), items[0].task)
        for entry in backend.lead(missing, setting, budget_tokens):
            journal.append(entry)
            if isinstance(entry, Record):
                on_answer()


def skip_wish(setting: Setting, budget_tokens: int | None) -> dict[str, Any]:
    """A request's `skip` object."""
    if setting.policy == "never":
        return {"policy": "off"}
    named = {"warmup_tokens": setting.warmup_tokens, "budget_tokens": budget_tokens}
    told = {name: value for name, value in named.items() if value is not None}
    return {"policy": setting.policy, "ratio": setting.ratio, **told}


def seed_of(seed: int, item_id: str, turn: int) -> int:
    """Differs between items and turns, and is the same in every run."""
    digest = hashlib.sha256(f"{seed}:{turn}:{item_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def messages_of(item: Item, answers: Sequence[str]) -> list[Message]:
    """The conversation up to the turn behind the given answers."""
    found: list[Message] = list(item.history)
    for at, turn in enumerate(item.turns[: len(answers) + 1]):
        found.append({"role": "user", "content": turn})
        if at < len(answers):
            found.append({"role": "assistant", "content": answers[at]})
    return found
