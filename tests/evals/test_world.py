"""What real models are asked, with nothing to fetch."""

from __future__ import annotations

from skipllm_core.calibration.prompts import BUILT_IN
from skipllm_core.evals.scoring import contains_answer
from skipllm_core.evals.summary import headline_of, item_scores
from skipllm_core.evals.tasks import TASKS, of_world
from skipllm_core.evals.world import NUM_CHOICES, world_questions


def test_the_same_questions_are_asked_again_and_no_two_are_alike() -> None:
    questions = world_questions(200)
    assert questions == world_questions(200)
    assert len({q.question for q in questions}) == 200
    assert world_questions(7) == questions[:7]
    assert len({q.relation for q in questions[:8]}) == 8  # kinds in turn, also where few are asked


def test_answers_in_a_sentence_or_under_another_name_count() -> None:
    by_question = {q.question: q.answers for q in world_questions(1000)}
    sweden = by_question["What is the currency of Sweden?"]
    assert contains_answer("Sweden pays with the Swedish krona (SEK).", sweden)
    assert contains_answer("In kronor.", sweden)
    assert not contains_answer("The euro.", sweden)
    assert contains_answer("Tolstoy", by_question["Who wrote War and Peace?"])
    assert contains_answer("The USA.", by_question["Which country has Washington as its capital?"])


def test_choices_are_different_and_one_is_right() -> None:
    for q in world_questions(1000):
        if q.choices:
            assert len(set(q.choices)) == NUM_CHOICES
            assert [choice for choice in q.choices if choice in q.answers] == [q.choices[0]]


def test_every_task_has_items_that_calibration_does_not_know() -> None:
    for task in TASKS:
        items = of_world(task, 8)
        assert len(items) == len({item.id for item in items}) == 8
        assert not {turn for item in items for turn in item.turns} & set(BUILT_IN)
        assert all(bool(item.choices) == (task == "multiple_choice") for item in items)


def test_texts_without_right_answers_are_held_against_the_full_models() -> None:
    for task in ("multi_turn", "summarization"):
        item = of_world(task, 1)[0]
        answers = ["the bridge is closed to cars"] * len(item.turns)
        same = item_scores(item, answers, answers)
        assert headline_of(task, same) == "rougeL_full"
        assert same["rougeL_full"] == 1
        assert item_scores(item, answers, ["no word of it"] * len(answers))["rougeL_full"] == 0
