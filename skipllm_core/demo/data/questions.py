"""Wordings of the questions about facts, those for training apart from those held out."""

from skipllm_core.demo.data.facts import Fact
from skipllm_core.demo.data.relations import Relation
from skipllm_core.demo.data.words import with_article

# Frames around a noun phrase {p} ("the capital of France").
_TRAIN_FRAMES = (
    "What is {p}?",
    "What is {p}?",
    "What's {p}?",
    "Whats {p}",
    "Tell me {p}.",
    "Do you know {p}?",
    "Can you tell me {p}?",
    "Can you tell me what {p} is?",
    "Could you tell me {p}?",
    "Please tell me what {p} is.",
    "Do you know what {p} is?",
    "I want to know {p}.",
    "I'd like to know {p}.",
    "I am looking for {p}.",
    "Name {p}.",
    "{p}?",
    "{p}",
    "{p} is what?",
    "Could you please tell me {p}?",
    "May I ask what {p} is?",
    "I forgot {p}.",
    "Remind me, what is {p}?",
    "What was {p} again?",
    "Give me {p}.",
    "Do you happen to know {p}?",
    "I need to know what {p} is.",
    "Please give me {p}.",
    "Would you please say what {p} is?",
    "Please say {p}.",
    "Can you name {p}?",
    "{p} is",
)
_HELD_OUT_FRAMES = (
    "I would like to know what {p} is.",
    "Would you tell me {p}?",
    "Please name {p}.",
    "Could you tell me what {p} is?",
)


def fields(fact: Fact) -> dict[str, str]:
    """The template fields of one fact."""
    subject, _, whole = fact.subject.partition("|")
    return {
        "s": subject,
        "v": fact.value,
        "w": whole,
        "as": with_article(subject),
        "av": with_article(fact.value),
    }


def _framed(frames: tuple[str, ...], phrases: tuple[str, ...]) -> list[str]:
    return [f.replace("{p}", p) for p in phrases for f in frames]


def train_templates(relation: Relation) -> list[str]:
    return [*relation.train, *_framed(_TRAIN_FRAMES, relation.phrases)]


def held_out_templates(relation: Relation) -> list[str]:
    return [*relation.held_out, *_framed(_HELD_OUT_FRAMES, relation.phrases[:1])]
