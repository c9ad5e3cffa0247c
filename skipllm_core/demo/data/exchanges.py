"""Question-answer pairs about facts: first questions and follow-ups."""

import random
from dataclasses import dataclass, field, replace

from skipllm_core.demo.data import unknowns
from skipllm_core.demo.data.facts import ALIASES, Fact, all_facts
from skipllm_core.demo.data.questions import (
    fields,
    held_out_templates,
    train_templates,
)
from skipllm_core.demo.data.relations import RELATIONS
from skipllm_core.demo.data.singles import SINGLES
from skipllm_core.demo.data.surface import vary
from skipllm_core.demo.data.words import capitalised

Exchange = tuple[str, str]
"""(what the user says, what the assistant answers)."""

_CASED = frozenset({"symbol_of"})  # "C" and "c" are not the same there

# The same question about another subject.
_SAME = (
    "And of {s}?", "And {s}?", "What about {s}?", "And what about {s}?", "And for {s}?", "Now {s}.",
    "{s}?", "and {s}", "And now {s}?", "The same for {s}?", "and of {s}", "What about {s} then?",
    "OK, and {s}?", "And that of {s}?", "{s}", "Also {s}?", "How about {s}?",
    "And how about {s}?", "What is it for {s}?", "OK, now {s}.",
    "And with {s}?", "Same question for {s}.", "And what is it for {s}?",
    "Tell me that of {s} too.",
    "Then {s}?", "OK, how about {s}?",
)  # fmt: skip
_SAME_HELD_OUT = ("Then what about {s}?", "OK, what about {s}?", "And the same for {s}?")
# Another question about the same country.
_OTHER = {
    "capital": (
        ("And its capital?", "What is its capital?", "And the capital?",
         "Which city is its capital?",
         "What is the capital there?", "its capital?", "And what is its capital?",
         "What's the capital of that country?", "And the capital city?",
         "Do you know its capital?",
         "Can you tell me its capital?", "Name its capital.", "And which city is its capital?"),
        ("And what is the capital?", "Which city is the capital there?",
         "Can you name its capital?"),
    ),
    "currency": (
        ("And its currency?", "What is its currency?", "And the currency?", "And the money?",
         "Which currency do they use there?", "What money do they use there?", "its currency?",
         "And what is its currency?", "Which currency does it use?", "How do people pay there?",
         "What currency is used there?", "Tell me its currency.", "And what money do they have?"),
        ("And what is the currency?", "Which currency is used there?",
         "What currency does it have?"),
    ),
    "continent": (
        ("And its continent?", "Where is it?", "On which continent is it?",
         "Which continent is it on?",
         "And where is it?", "And the continent?", "Where is that?", "What continent is it in?",
         "On which continent is that?", "Where is that country?",
         "In which part of the world does it lie?", "Where can I find it?",
         "And where does that lie?"),
        ("And on which continent is it?", "On what continent is that?", "Where does it lie?"),
    ),
    "language": (
        ("And its language?", "What language do they speak there?", "And the language?",
         "Which language is spoken there?", "What do people speak there?", "its language?",
         "And what language do they speak?", "Which language do people speak there?",
         "What is its language?", "And which language is spoken?",
         "What language is used there?", "Tell me its language.", "And what do they speak?"),
        ("And what is the language?", "What language is spoken there?",
         "Which language do they speak?"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FactBook:
    """All facts, and an index by relation and subject."""

    facts: tuple[Fact, ...] = field(default_factory=lambda: tuple(all_facts()))
    by_key: dict[tuple[str, str], Fact] = field(init=False)
    by_relation: dict[str, list[Fact]] = field(init=False)

    def __post_init__(self) -> None:
        by_relation: dict[str, list[Fact]] = {}
        for fact in self.facts:
            by_relation.setdefault(fact.relation, []).append(fact)
        object.__setattr__(self, "by_relation", by_relation)
        object.__setattr__(self, "by_key", {(f.relation, f.subject): f for f in self.facts})


def answer(fact: Fact) -> str:
    """The one sentence that answers a question about ``fact``."""
    if fact.relation == "single":
        return fact.value
    return capitalised(RELATIONS[fact.relation].answer.format(**fields(fact)))


def wordings(fact: Fact, *, held_out: bool = False) -> list[str]:
    """Every clean wording of the question about ``fact``."""
    if fact.relation == "single":
        return list(SINGLES[fact.subject][held_out])
    make = held_out_templates if held_out else train_templates
    values = fields(fact)
    return [capitalised(t.format(**values)) for t in make(RELATIONS[fact.relation])]


def ask(
    fact: Fact, rng: random.Random, *, held_out: bool = False, informal: bool = True
) -> Exchange:
    asked = fact if held_out else _alias(fact, rng)
    question = rng.choice(wordings(asked, held_out=held_out))
    if informal:
        question = typed(question, asked, rng)
    return question, answer(fact)


def _alias(fact: Fact, rng: random.Random) -> Fact:
    """``fact`` with its subject called by another of its names, now and then."""
    first, bar, whole = fact.subject.partition("|")
    if first not in ALIASES or rng.random() < 0.5:
        return fact
    return replace(fact, subject=rng.choice(ALIASES[first]) + bar + whole)


def typed(question: str, fact: Fact, rng: random.Random) -> str:
    """``question`` as a stranger might type it; the fact's own words stay spelled right."""
    keep = "" if fact.relation == "single" else fact.subject.replace("|", " ")
    return vary(question, rng, keep=keep, keep_case=fact.relation in _CASED)


def _without_article(subject: str) -> str:
    return subject.partition("|")[0]


def follow_up(
    fact: Fact, book: FactBook, rng: random.Random, *, held_out: bool = False
) -> tuple[str, Fact | None]:
    """A question that only makes sense after one about ``fact``, and the fact it asks for.

    None: it asks for something the model does not know.
    """
    related = [r for r in _OTHER if r != fact.relation and (r, fact.subject) in book.by_key]
    if fact.relation == "capital_of":
        country = book.by_key["capital", fact.value].subject
        related = [r for r in _OTHER if r != "capital" and (r, country) in book.by_key]
    if related and rng.random() < 0.45:
        relation = rng.choice(related)
        country = fact.value if fact.relation == "capital_of" else fact.subject
        return rng.choice(_OTHER[relation][held_out]), book.by_key[relation, country]
    frame = rng.choice(_SAME_HELD_OUT if held_out else _SAME)
    if fact.relation in ("capital", "currency", "language", "symbol", "young", "author") and (
        rng.random() < 0.12
    ):
        stranger = unknowns.far_subject(fact.relation, rng, held_out=held_out)
        return capitalised(frame.format(s=stranger)), None
    other = rng.choice(book.by_relation[fact.relation])
    return capitalised(frame.format(s=_without_article(other.subject))), other


def has_follow_ups(fact: Fact) -> bool:
    """Whether "And of X?" can be understood after a question about ``fact``."""
    return fact.relation not in ("single", "unit", "planet", "month", "animal_that", "young_of")
