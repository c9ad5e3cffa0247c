"""What becomes of answers: rows, the report and its figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from skipllm_core.demo.data.heldout import held_out_set
from skipllm_core.evals.figures import draw
from skipllm_core.evals.records import FULL, Journal, Setting
from skipllm_core.evals.report import markdown
from skipllm_core.evals.runner import run
from skipllm_core.evals.summary import (
    Row,
    Score,
    at_weight_bytes,
    item_scores,
    skipped_share,
    summarise,
)
from skipllm_core.evals.tasks import Item, bundled
from skipllm_core.model.config import ModelConfig, RopeConfig
from tests.evals.scripted import ITEMS, PLAN, SKIPPING, Scripted

LLAMA2 = ModelConfig(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32,
    num_heads=32, num_kv_heads=32, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=4096,
    rope=RopeConfig(theta=10000, type="default"), windows=(None,) * 32, qkv_bias=False,
    o_bias=False, mlp_bias=False, qk_norm=False, tie_word_embeddings=False, eos_token_ids=(2,),
    dtype="float16",
)  # fmt: skip


def test_rows_are_what_was_counted(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a", {})
    run(Scripted(), PLAN, journal)
    full, skipping = summarise(ITEMS, [FULL, SKIPPING], journal.records, journal.timings, LLAMA2)
    assert full.scores["exact"].mean == 1
    assert skipping.scores["exact"].mean == skipping.scores["agreement"].mean == 0.5
    assert skipping.skipped_ffn_share == 0.25
    assert skipping.weight_bytes_ratio == pytest.approx(0.167, abs=1e-3)
    assert skipping.weight_skip_ratio == 0.1
    assert skipping.tokens_per_s == 5


def test_a_setting_without_all_its_answers_has_no_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a", {})
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(fails_after=6), PLAN, journal)
    rows = summarise(ITEMS, [FULL, SKIPPING], journal.records, journal.timings, None)
    assert [row.setting for row in rows] == [FULL]


@pytest.mark.parametrize(
    ("model", "has_paper"), [("skipllm-demo", False), ("meta-llama/Llama-2-7b-chat-hf", True)]
)
def test_the_papers_numbers_stand_beside_its_own_model_alone(
    tmp_path: Path, model: str, has_paper: bool
) -> None:
    journal = Journal(tmp_path / "a", {})
    run(Scripted(), PLAN, journal)
    rows = summarise(ITEMS, [FULL, SKIPPING], journal.records, journal.timings, None)
    text = markdown({"model": model}, rows)
    assert ("79.02" in text) is has_paper
    assert "| ffn_skip | 25% | default | 0.250 |" in text


@pytest.mark.parametrize(
    ("policy", "of_layer"),
    # FFN 135.3M, q and o 33.6M, k and v 33.6M weights: 202.4M.
    [("ffn_skip", 0.668), ("static", 0.668), ("random", 0.668), ("early_exit", 0.834)],
)
def test_a_skip_saves_its_share_of_llama_2_s_layer(policy: str, of_layer: float) -> None:
    assert skipped_share(LLAMA2, policy) == pytest.approx(of_layer, abs=5e-4)


def test_a_fifth_of_the_layers_saves_more_than_a_fifth_of_the_ffns() -> None:
    assert 0.2 * skipped_share(LLAMA2, "ffn_skip") == pytest.approx(0.13, abs=5e-3)
    assert 0.2 * skipped_share(LLAMA2, "layer_drop") == 0.2


def test_grouped_heads_leave_early_exit_less_to_compute() -> None:
    # Llama-3-8B: FFN 176.2M, q and o 33.6M, k and v 8.4M.
    llama3 = replace(LLAMA2, intermediate_size=14336, num_kv_heads=8)
    assert skipped_share(llama3, "early_exit") == pytest.approx(209.8 / 218.1, abs=1e-3)


def row(policy: str, asked: float, weight_bytes: float | None, score: float) -> Row:
    return Row(
        setting=Setting(policy=policy, ratio=asked),
        task="factoid_qa",
        scores={"exact": Score(score, score, score, 4)},
        groups={},
        skipped_ffn_share=asked,
        weight_bytes_ratio=weight_bytes,
        weight_skip_ratio=None,
        tokens_per_s=9.0 if policy in ("never", "ffn_skip") else None,
    )


ROWS = [
    row("never", 0, 0.0, 1.0),
    row("ffn_skip", 0.25, 0.16, 0.9),
    row("layer_drop", 0.1, 0.1, 0.8),
    row("layer_drop", 0.3, 0.3, 0.2),
    row("static", 0.2, 0.13, 0.7),
]


def test_scores_at_equal_weight_bytes_lie_between_the_measured() -> None:
    full, _, low, high, _ = ROWS
    assert at_weight_bytes([high, full, low], 0.16) == pytest.approx(0.8 - 0.6 * 0.3)
    assert at_weight_bytes([high, full, low], 0.05) == pytest.approx(0.9)
    assert at_weight_bytes([high, full, low], 0.3) == pytest.approx(0.2)
    assert at_weight_bytes([high, full, low], 0.31) is None
    assert at_weight_bytes([full], 0.1) is None


def test_the_report_compares_policies_at_equal_weight_bytes() -> None:
    lines = markdown({"model": "m"}, ROWS).split("\n")
    at = lines.index("## At equal weight bytes")
    assert "| weight bytes | 0.160 |" in lines[at:]
    assert "| ffn_skip | 90.0 |" in lines[at:]
    assert "| layer_drop | 62.0 |" in lines[at:]
    assert "| static | - |" in lines[at:]  # measured up to 0.13
    without = markdown({"model": "m"}, [row("never", 0, None, 1.0), row("ffn_skip", 0.25, None, 0)])
    assert "## At equal weight bytes" not in without


def test_figures_compare_by_weight_bytes_where_they_are_known(tmp_path: Path) -> None:
    sizes = []
    for known in (True, False):
        draw(tmp_path, "m", [r if known else replace(r, weight_bytes_ratio=None) for r in ROWS])
        assert (tmp_path / "throughput.png").exists()
        sizes.append((tmp_path / "accuracy.png").read_bytes()[20:24])  # the height
    assert int.from_bytes(sizes[0], "big") == 2 * int.from_bytes(sizes[1], "big")


def test_slow_policies_have_no_speed_and_early_exit_tells_its_budget(tmp_path: Path) -> None:
    exiting = Setting(policy="early_exit", ratio=0.25)
    journal, backend = Journal(tmp_path / "a", {}), Scripted()
    run(backend, [*PLAN, (exiting, ITEMS)], journal)
    # Answers of 5, 6, 7 and 8 tokens.
    assert backend.budgets == {"never": None, "ffn_skip": None, "early_exit": 7}
    settings = [FULL, SKIPPING, exiting]
    rows = summarise(ITEMS, settings, journal.records, journal.timings, LLAMA2)
    assert [r.tokens_per_s for r in rows] == [5, 5, None]
    assert [r.budget_tokens for r in rows] == [None, None, 7]
    assert "its last layer at 7 generated tokens" in markdown({"model": "m"}, rows)


def test_a_story_is_right_where_it_is_coherent() -> None:
    (story,) = [item for item in bundled("multi_turn", 8) if item.is_story]
    assert (story.group, len(story.turns), story.accepted) == ("stories", 2, ())
    others = [item for item in bundled("multi_turn", 8) if not item.is_story]
    assert all(item.accepted for item in others)
    (told,) = held_out_set("own_summaries", 1)
    request, text = (message["content"] for message in told.messages[:2])
    asked = replace(story, turns=("A story, please.", request))
    assert item_scores(asked, ["any", text], ["any", "other"])["fact"] == 1
    assert item_scores(asked, ["any", text.replace(" a ", " the the ")], ["", ""])["fact"] == 0


def test_a_plain_conversation_without_right_answers_has_no_fact() -> None:
    item = Item(task="multi_turn", id="t", group="g", turns=("one?", "two?"))
    assert "fact" not in item_scores(item, ["a", "b"], ["a", "b"])
