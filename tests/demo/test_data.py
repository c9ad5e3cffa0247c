"""What the generated data promises: disjoint wordings, answers for all, summaries that fit."""

import itertools
import random

import pytest

from skipllm_core.demo.data import arithmetic, smalltalk, stories, unknowns
from skipllm_core.demo.data.dialogues import DialogueMaker
from skipllm_core.demo.data.exchanges import answer, wordings
from skipllm_core.demo.data.facts import all_facts
from skipllm_core.demo.data.heldout import KINDS, held_out_set, is_right
from skipllm_core.demo.data.questions import held_out_templates, train_templates
from skipllm_core.demo.data.relations import RELATIONS
from skipllm_core.demo.data.singles import SINGLES


def _normal(text: str) -> str:
    return text.lower().strip(" .?!")


def _bare(texts: "list[str] | tuple[str, ...]") -> set[str]:
    return {_normal(text) for text in texts}


def test_every_fact_is_there_once_and_has_an_answer_that_names_it() -> None:
    facts = all_facts()
    assert len(facts) >= 350
    assert len({(fact.relation, fact.subject) for fact in facts}) == len(facts)
    for fact in facts:
        assert fact.value.lower() in answer(fact).lower()
        assert "{" not in answer(fact)
        assert answer(fact).endswith(".")


@pytest.mark.parametrize("name", RELATIONS)
def test_wordings_of_a_relation_are_many_and_held_out_ones_are_never_trained(name: str) -> None:
    trained = _bare(train_templates(RELATIONS[name]))
    held_out = _bare(held_out_templates(RELATIONS[name]))
    assert len(trained) >= 10
    assert len(held_out) >= 3
    assert not trained & held_out


def test_no_filled_in_held_out_question_about_a_fact_is_trained() -> None:
    trained = {_normal(text) for fact in all_facts() for text in wordings(fact)}
    for fact in all_facts():
        assert not _bare(wordings(fact, held_out=True)) & trained


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        *[(intent.train, intent.held_out) for intent in smalltalk.INTENTS.values()],
        *[SINGLES[key] for key in SINGLES],
        *[(arithmetic.train_templates(o), arithmetic.held_out_templates(o)) for o in "+-*/"],
        (unknowns.TRAIN_TEMPLATES, unknowns.HELD_OUT_TEMPLATES),
    ],
)
def test_other_held_out_wordings_are_never_trained(
    trained: tuple[str, ...], held_out: tuple[str, ...]
) -> None:
    assert len(_bare(trained)) >= 10
    assert len(_bare(held_out)) >= 3
    assert not _bare(trained) & _bare(held_out)


def test_a_question_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for fact in all_facts():
        for question in wordings(fact) + wordings(fact, held_out=True):
            # Symbols are told apart by case ("Co" and "CO"), so case stays here.
            assert answers.setdefault(question.strip("?. "), answer(fact)) == answer(fact)


@pytest.mark.parametrize("held_out", [False, True])
def test_summaries_name_hero_and_end_in_one_sentence(held_out: bool) -> None:
    rng = random.Random(5)
    for _ in range(500):
        story = stories.make_story(rng, held_out=held_out)
        assert story.words["n"] in story.summary
        assert story.summary.count(".") == 1
        assert "{" not in story.text + story.summary
        assert stories.is_held_out(story.words) == held_out


def test_told_stories_are_coherent_and_fulfil_their_wish() -> None:
    rng = random.Random(6)
    for _ in range(500):
        story = stories.make_story(rng, only_tales=True)
        request = stories.story_request(story, rng)
        assert stories.is_coherent(story.text, request), (request, story.text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Once there was a fox.",
        "Once there was a fox named Mia. " * 5,
        "There was a fox named Mia. Mia ran. Mia met a cat named Tom. Mia and Tom sat down and",
    ],
)
def test_broken_stories_are_not_coherent(text: str) -> None:
    assert not stories.is_coherent(text)


def test_a_stutter_anywhere_breaks_a_story() -> None:
    rng = random.Random(7)
    for _ in range(200):
        words = stories.make_story(rng, only_tales=True).text.split()
        at = rng.randrange(len(words) - 1)
        stuttered = [*words[: at + 2], *words[at : at + 2], *words[at + 2 :]]
        assert not stories.is_coherent(" ".join(stuttered)), stuttered


def test_a_story_about_someone_else_is_not_the_one_asked_for() -> None:
    story = stories.make_story(random.Random(1), only_tales=True)
    assert stories.is_coherent(story.text, "Tell me a story.")
    assert not stories.is_coherent(story.text, "Tell me a story about a fox named Xerxes.")


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_sets_repeat_and_their_answers_are_right(kind: str) -> None:
    items = held_out_set(kind, 20)
    assert items == held_out_set(kind, 20)
    for item in items:
        assert item.messages[-1]["role"] == "user"
        if item.answer is not None:
            assert is_right(item, f" {item.answer.upper()}\n")
        assert not is_right(item, "Banana.")


def test_the_facts_are_judged_all_before_any_twice() -> None:
    num_facts = len(all_facts())
    judged = held_out_set("facts", num_facts)
    assert {item.answer for item in judged} == {answer(fact) for fact in all_facts()}


def test_the_same_seed_draws_the_same_conversations() -> None:
    first, second = (list(itertools.islice(DialogueMaker(3).conversations(), 50)) for _ in range(2))
    assert first == second


def test_conversations_alternate_and_end_with_the_assistant() -> None:
    for conversation in itertools.islice(DialogueMaker(4).conversations(), 500):
        roles = [message["role"] for message in conversation if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in conversation)
