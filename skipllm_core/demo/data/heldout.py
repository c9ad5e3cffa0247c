"""The held-out prompts that judge the model: wordings and combinations training never shows."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from skipllm_core.demo.data import arithmetic, smalltalk, stories, unknowns
from skipllm_core.demo.data.dialogues import Message, assistant, user
from skipllm_core.demo.data.exchanges import FactBook, answer, ask, follow_up, has_follow_ups


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One judged prompt; ``answer`` is None where any coherent story is right."""

    kind: str
    messages: tuple[Message, ...]
    answer: str | None


def held_out_set(kind: str, limit: int = 200, seed: int = 1) -> list[HeldOut]:
    """``limit`` judged prompts of one of ``KINDS``; the same arguments give the same set.

    The kinds about facts go through every fact once before any comes twice.
    """
    return _Judge(kind, seed).draw(limit)


def is_right(item: HeldOut, reply: str) -> bool:
    """Whether ``reply`` is the expected answer, spaces and case aside."""
    if item.answer is None:
        return stories.is_coherent(reply, item.messages[-1]["content"])
    return " ".join(reply.lower().split()) == " ".join(item.answer.lower().split())


class _Judge:
    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        self._rng = random.Random(f"{kind}:{seed}")  # noqa: S311 - no secret depends on it
        self._book = FactBook()
        self._facts = self._rng.sample(self._book.facts, len(self._book.facts))
        self._num_asked = 0

    def draw(self, limit: int) -> list[HeldOut]:
        return [self._item(*_MAKERS[self._kind](self)) for _ in range(limit)]

    def _item(self, texts: list[str], expected: str | None) -> HeldOut:
        speakers = (user, assistant)
        messages = tuple(speakers[i % 2](text) for i, text in enumerate(texts))
        return HeldOut(self._kind, messages, expected)

    def _fact(self, *, informal: bool = False) -> tuple[list[str], str]:
        fact = self._facts[self._num_asked % len(self._facts)]
        self._num_asked += 1
        question, reply = ask(fact, self._rng, held_out=True, informal=informal)
        return [question], reply

    def _informal_fact(self) -> tuple[list[str], str]:
        return self._fact(informal=True)

    def _follow_up(self) -> tuple[list[str], str]:
        while not has_follow_ups(fact := self._rng.choice(self._book.facts)):
            pass
        first, first_reply = ask(fact, self._rng, informal=False)
        question, asked = follow_up(fact, self._book, self._rng, held_out=True)
        return [first, first_reply, question], answer(asked) if asked else unknowns.ANSWER

    def _arithmetic(self) -> tuple[list[str], str]:
        question, reply = arithmetic.arithmetic_exchange(self._rng, held_out=True)
        return [question], reply

    def _small_talk(self) -> tuple[list[str], str]:
        question, reply = smalltalk.small_talk(self._rng, held_out=True)
        return [question], reply

    def _names(self) -> tuple[list[str], str]:
        said, reply, name = smalltalk.name_told(self._rng, held_out=True)
        question, expected = smalltalk.name_asked(self._rng, name, held_out=True)
        return [said, reply, question], expected

    def _unknown(self) -> tuple[list[str], str]:
        return [unknowns.unknown_question(self._rng, held_out=True)], unknowns.ANSWER

    def _summary(self) -> tuple[list[str], str]:
        story = stories.make_story(self._rng, held_out=True)
        return [stories.summary_request(story.text, self._rng, held_out=True)], story.summary

    def _told(self) -> tuple[stories.Story, list[str]]:
        story = stories.make_story(self._rng, held_out=True, only_tales=True)
        return story, [stories.story_request(story, self._rng, held_out=True), story.text]

    def _own_summary(self) -> tuple[list[str], str]:
        story, texts = self._told()
        return [*texts, self._rng.choice(stories.SUMMARIZE_AGAIN_HELD_OUT)], story.summary

    def _story_question(self) -> tuple[list[str], str]:
        while True:
            story, texts = self._told()
            if asked := stories.story_question(story, self._rng, held_out=True):
                return [*texts, asked[0]], asked[1]

    def _story(self) -> tuple[list[str], None]:
        return self._told()[1][:1], None


_MAKERS: dict[str, Callable[[_Judge], tuple[list[str], str | None]]] = {
    "facts": _Judge._fact,
    "informal_facts": _Judge._informal_fact,
    "arithmetic": _Judge._arithmetic,
    "follow_ups": _Judge._follow_up,
    "small_talk": _Judge._small_talk,
    "names": _Judge._names,
    "unknowns": _Judge._unknown,
    "summaries": _Judge._summary,
    "own_summaries": _Judge._own_summary,
    "story_questions": _Judge._story_question,
    "stories": _Judge._story,
}
KINDS = tuple(_MAKERS)
