"""What is asked: items of the tasks, and the sets for the embedded model and for real ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from skipllm_core.chat_template import Message
from skipllm_core.demo.data.heldout import held_out_set
from skipllm_core.errors import ConfigError
from skipllm_core.evals.loaders import load_factoid_qa, load_multi_turn, load_summaries
from skipllm_core.evals.texts import articles, conversations
from skipllm_core.evals.world import world_questions

TaskName = Literal["factoid_qa", "multi_turn", "summarization", "multiple_choice"]
TASKS: tuple[TaskName, ...] = ("factoid_qa", "multi_turn", "summarization", "multiple_choice")

__all__ = ["TASKS", "Item", "TaskName", "bundled", "load", "of_world"]

_NAME_ALONE = "Answer with the name alone."
_SUMMARIZE = "Summarize this article in three sentences.\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One conversation to lead. `turns` are what the user says, one after the other, behind
    `history`; the model answers each. `accepted` bears the right answers of the last turn (none:
    the answer is judged by the full model's alone, but for a story). With `choices` nothing is
    generated: the answer is the one that the model finds likeliest behind the only turn."""

    task: TaskName
    id: str
    group: str  # category, or length group
    turns: tuple[str, ...]
    history: tuple[Message, ...] = ()
    accepted: tuple[str, ...] = ()
    is_short_answer: bool = False  # a name, which chat models like to wrap into a sentence
    is_story: bool = False  # any coherent story that the last turn asks for is right
    choices: tuple[str, ...] = ()


# The embedded model's conversations, in categories of what it can do. The model answers the first
# turn itself, but where the second is about a story: there the story is given as its own. Stories
# suffer most of all held-out kinds; questions about them, not at all up to 35 %, and are left out.
_CATEGORIES = (
    "follow_ups",
    "names",
    "stories",
    "own_summaries",
    "arithmetic",
    "small_talk",
    "unknowns",
    "informal_facts",
)


def bundled(task: TaskName, limit: int) -> list[Item]:
    """At most `limit` items for the embedded model, of prompts that training never showed."""
    match task:
        case "factoid_qa":
            return _single_turns(task, "facts", limit, group="facts")
        case "multi_turn":
            return _dialogues(limit)
        case "summarization":
            return by_terciles(_single_turns(task, "summaries", limit, group=""))
        case "multiple_choice":
            return of_world(task, limit)


def of_world(task: TaskName, limit: int) -> list[Item]:
    """At most `limit` items for real models, with nothing to fetch."""
    match task:
        case "factoid_qa":
            return [
                Item(
                    task=task,
                    id=f"world-{n}",
                    group=q.relation,
                    turns=(f"{q.question}\n{_NAME_ALONE}",),
                    accepted=q.answers,
                    is_short_answer=True,
                )
                for n, q in enumerate(world_questions(limit))
            ]
        case "multi_turn":
            return [
                Item(task=task, id=f"talk-{n}", group="all", turns=turns)
                for n, turns in enumerate(conversations()[:limit])
            ]
        case "summarization":
            return [
                Item(task=task, id=f"article-{n}", group="all", turns=(_SUMMARIZE + text,))
                for n, text in enumerate(articles()[:limit])
            ]
        case "multiple_choice":
            asked = [q for q in world_questions(2 * limit) if q.choices][:limit]
            return [
                Item(
                    task=task,
                    id=f"choice-{n}",
                    group=q.relation,
                    turns=(q.question,),
                    accepted=q.choices[:1],
                    choices=q.choices,
                )
                for n, q in enumerate(asked)
            ]


def _single_turns(task: TaskName, kind: str, limit: int, *, group: str) -> list[Item]:
    return [
        Item(
            task=task,
            id=f"{kind}-{n}",
            group=group,
            turns=(one.messages[-1]["content"],),
            accepted=(one.answer or "",),
        )
        for n, one in enumerate(held_out_set(kind, limit))
    ]


def by_terciles(items: list[Item]) -> list[Item]:
    """Groups by length in words, a third of the items in each: texts too short for the paper's."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].turns[-1].split()))
    third = {at: 3 * rank // len(order) for rank, at in enumerate(order)}
    names = ("short", "medium", "long")
    grouped = [replace(item, group=names[third[at]]) for at, item in enumerate(items)]
    return sorted(grouped, key=lambda item: names.index(item.group))


def _dialogues(limit: int) -> list[Item]:
    items = []
    for at, kind in enumerate(_CATEGORIES):
        num = limit // len(_CATEGORIES) + (at < limit % len(_CATEGORIES))
        # A conversation of one turn is led on with a second one of its kind.
        asked = held_out_set(kind, 2 * num)
        for n in range(num):
            one, other = asked[n], asked[n + num]
            if len(one.messages) > 1:
                turns = tuple(m["content"] for m in one.messages if m["role"] == "user")
                # A story that the model tells itself is another than the one the set expects.
                history: tuple[Message, ...] = ()
                if kind == "own_summaries":
                    history, turns = tuple(one.messages[:-1]), turns[-1:]
                judged = one
            else:
                turns = (one.messages[0]["content"], other.messages[0]["content"])
                history, judged = (), other
            items.append(
                Item(
                    task="multi_turn",
                    id=f"{kind}-{n}",
                    group=kind,
                    turns=turns,
                    history=history,
                    accepted=() if judged.answer is None else (judged.answer,),
                    is_story=judged.answer is None,
                )
            )
    return items


def load(task: TaskName, path: str, limit: int) -> list[Item]:
    """Items of a file, or of a hub id as `hub:NAME`. Raises ConfigError."""
    match task:
        case "factoid_qa":
            return [
                Item(
                    task=task,
                    id=q.id,
                    group="all",
                    turns=(f"{q.question}\n{_NAME_ALONE}",),
                    accepted=q.answers,
                    is_short_answer=True,
                )
                for q in load_factoid_qa(path)[:limit]
            ]
        case "multi_turn":
            return [
                Item(task=task, id=q.id, group=q.category, turns=q.turns)
                for q in load_multi_turn(path)[:limit]
            ]
        case "summarization":
            return [
                Item(
                    task=task,
                    id=a.id,
                    group=length_group(a.article),
                    turns=(_SUMMARIZE + a.article,),
                    accepted=(a.highlights,),
                )
                for a in load_summaries(path)[:limit]
            ]
        case "multiple_choice":
            raise ConfigError("multiple_choice has items of its own, and none of a file")


def length_group(article: str) -> str:
    """The paper's three groups, by words."""
    num_words = len(article.split())
    if num_words < 470:
        return "< 470"
    return "470-790" if num_words <= 790 else "> 790"
