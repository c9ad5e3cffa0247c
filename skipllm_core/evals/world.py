"""Questions about the world for real models: the embedded model's facts, asked in plain words."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from skipllm_core.demo.data.facts import ALIASES, Fact, all_facts

NUM_CHOICES = 4
_WORDINGS = {
    "capital": "What is the capital of {s}?",
    "capital_of": "Which country has {s} as its capital?",
    "currency": "What is the currency of {s}?",
    "language": "What is the main language of {s}?",
    "continent": "On which continent is {s}?",
    "symbol": "What is the chemical symbol of {s}?",
    "symbol_of": "Which chemical element has the symbol {s}?",
    "author": "Who wrote {s}?",
    "inventor": "Who invented {s}?",
    "planet": "What is the {s} planet from the Sun?",
}
# What people, and models, call the values besides.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "Brasilia": ("Brasília",),
    "Bogota": ("Bogotá",),
    "Kyiv": ("Kiev",),
    "Turkey": ("Türkiye",),
    "krona": ("króna", "kronur", "kronor"),
    "krone": ("kroner",),
    "koruna": ("crown",),
    "lira": ("lire",),
    "peso": ("pesos",),
    "pound": ("sterling",),
    "ruble": ("rouble",),
    "yuan": ("renminbi",),
    "zloty": ("złoty",),
    "Fyodor Dostoevsky": ("Dostoyevsky",),
    "the Wright brothers": ("Orville Wright", "Wilbur Wright", "Orville and Wilbur Wright"),
}


@dataclass(frozen=True, slots=True)
class WorldQuestion:
    """`answers` are all names of what is right; `choices` begin with the right one, and are none
    where the facts have too few values of the kind to choose from."""

    relation: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]


def world_questions(limit: int, seed: int = 1) -> list[WorldQuestion]:
    """At most `limit`, of each kind in turn; the same arguments give the same ones."""
    rng = random.Random(f"world:{seed}")  # noqa: S311 - no secret depends on it
    by_relation: dict[str, list[Fact]] = {}
    for fact in all_facts():
        if fact.relation in _WORDINGS:
            by_relation.setdefault(fact.relation, []).append(fact)
    queues = [rng.sample(facts, len(facts)) for facts in by_relation.values()]
    in_turn = [
        queue[at] for at in range(max(map(len, queues))) for queue in queues if at < len(queue)
    ]
    return [_question(fact, by_relation[fact.relation], rng) for fact in in_turn[:limit]]


def _question(fact: Fact, kind: Iterable[Fact], rng: random.Random) -> WorldQuestion:
    others = sorted({other.value for other in kind} - {fact.value})
    few = len(others) < NUM_CHOICES - 1
    choices = () if few else (fact.value, *rng.sample(others, NUM_CHOICES - 1))
    question = _WORDINGS[fact.relation].format(s=fact.subject)
    return WorldQuestion(fact.relation, question, _names(fact), choices)


def _names(fact: Fact) -> tuple[str, ...]:
    value = fact.value
    names = [value, *ALIASES.get(value, ()), *_OTHER_NAMES.get(value, ())]
    if fact.relation == "currency":
        names.append(f"{value}s")
    if fact.relation in ("author", "inventor"):
        names.append(value.split()[-1])  # the family name
    return tuple(dict.fromkeys(names))
