"""The training mixture: endless fresh conversations of all kinds."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from skipllm_core.demo.data import arithmetic, smalltalk, stories, unknowns
from skipllm_core.demo.data.exchanges import (
    Exchange,
    FactBook,
    ask,
    follow_up,
    has_follow_ups,
    typed,
)
from skipllm_core.demo.data.exchanges import answer as answer_of
from skipllm_core.demo.data.surface import vary
from skipllm_core.demo.data.words import with_article

Message = dict[str, str]

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful and friendly assistant.",
    "You are a helpful assistant. Answer in one sentence.",
    "Be brief.",
    "You are an AI assistant.",
    "Answer the user's questions.",
    "You are a small chat model. Be polite and honest.",
    "Please answer shortly and politely.",
    "You are a chatbot on a website. Help the user.",
)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Relative weights of the segments that conversations are made of."""

    facts: float = 13
    arithmetic: float = 5
    small_talk: float = 3.5
    unknowns: float = 4
    names: float = 0.8
    told_stories: float = 2.2
    given_stories: float = 3.4


_TRAITS = ("helpful", "friendly", "polite", "small", "honest", "funny", "smart", "kind", "careful")
_BEINGS = ("assistant", "chatbot", "AI", "teacher", "robot", "guide", "pirate", "model", "agent")
_ORDERS = (
    "Answer in one sentence.", "Be brief.", "Help the user.", "Do not make things up.",
    "If you do not know, say so.", "Answer in English.", "Use simple words.", "Be polite.",
    "Answer questions and tell stories.", "Think step by step.", "Never be rude.",
    "Talk to children.",
)  # fmt: skip


def _system_prompt(rng: random.Random) -> str:
    """What operators write there; the model answers as always."""
    if rng.random() < 0.4:
        return rng.choice(SYSTEM_PROMPTS)
    being = with_article(f"{rng.choice(_TRAITS)} {rng.choice(_BEINGS)}")
    return " ".join([f"You are {being}.", *rng.sample(_ORDERS, rng.randint(0, 3))])


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


class DialogueMaker:
    """Draws conversations; the same seed draws the same ones."""

    def __init__(self, seed: int, mixture: Mixture | None = None) -> None:
        self._rng = random.Random(seed)  # noqa: S311 - no secret depends on it
        self._book = FactBook()
        weights = mixture or Mixture()
        self._segments = {
            self._facts: weights.facts,
            self._arithmetic: weights.arithmetic,
            self._small_talk: weights.small_talk,
            self._unknowns: weights.unknowns,
            self._names: weights.names,
            self._told_story: weights.told_stories,
            self._given_story: weights.given_stories,
        }

    def conversations(self) -> Iterator[list[Message]]:
        """Conversations without end, of one to about ten exchanges of mixed kinds."""
        while True:
            yield self._conversation()

    def _conversation(self) -> list[Message]:
        rng = self._rng
        messages: list[Message] = []
        if rng.random() < 0.12:
            messages.append({"role": "system", "content": _system_prompt(rng)})
        num_segments = rng.choices((1, 2, 3, 7), (60, 30, 9, 3))[0]
        for segment in rng.choices(
            tuple(self._segments), tuple(self._segments.values()), k=num_segments
        ):
            for question, reply in segment():
                messages += [user(question), assistant(reply)]
        return messages

    def _facts(self) -> list[Exchange]:
        rng, book = self._rng, self._book
        fact = rng.choice(book.facts)
        exchanges = [ask(fact, rng)]
        while has_follow_ups(fact) and rng.random() < 0.4:
            question, asked = follow_up(fact, book, rng)
            if asked is None:
                exchanges.append((vary(question, rng), unknowns.ANSWER))
                break
            fact = asked
            exchanges.append((typed(question, fact, rng), answer_of(fact)))
        return exchanges

    def _arithmetic(self) -> list[Exchange]:
        rng = self._rng
        if rng.random() < 0.08:
            return [(arithmetic.too_hard(rng), unknowns.ANSWER)]
        question, reply = arithmetic.arithmetic_exchange(rng)
        exchanges = [(vary(question, rng, keep=question), reply)]
        while rng.random() < 0.4:
            exchanges.append(arithmetic.arithmetic_exchange(rng, is_follow_up=True))
        return exchanges

    def _small_talk(self) -> list[Exchange]:
        question, reply = smalltalk.small_talk(self._rng)
        return [(vary(question, self._rng, keep=question), reply)]

    def _unknowns(self) -> list[Exchange]:
        return [(vary(unknowns.unknown_question(self._rng), self._rng), unknowns.ANSWER)]

    def _names(self) -> list[Exchange]:
        rng = self._rng
        if rng.random() < 0.15:
            return [smalltalk.name_asked(rng, "")]
        said, reply, name = smalltalk.name_told(rng)
        between = [self._facts, self._small_talk, self._arithmetic, list]
        middle: list[Exchange] = rng.choice(between)()
        return [(said, reply), *middle, smalltalk.name_asked(rng, name)]

    def _told_story(self) -> list[Exchange]:
        rng = self._rng
        story = stories.make_story(rng, only_tales=True)
        request = vary(stories.story_request(story, rng), rng, keep=" ".join(story.words.values()))
        exchanges = [(request, story.text)]
        if rng.random() < 0.5:
            exchanges.append((rng.choice(stories.SUMMARIZE_AGAIN), story.summary))
        exchanges += self._about(story)
        return exchanges

    def _given_story(self) -> list[Exchange]:
        rng = self._rng
        story = stories.make_story(rng)
        exchanges = [(stories.summary_request(story.text, rng), story.summary)]
        return exchanges + self._about(story)

    def _about(self, story: stories.Story) -> list[Exchange]:
        if not story.text.count("named"):
            return []
        drawn = (stories.story_question(story, self._rng) for _ in range(self._rng.randint(0, 2)))
        return [exchange for exchange in drawn if exchange]
