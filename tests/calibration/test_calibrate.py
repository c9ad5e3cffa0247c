"""Calibration end to end, on a tiny random model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from skipllm_core.calibration import calibrate as calibration
from skipllm_core.calibration.answers import Answer
from skipllm_core.calibration.calibrate import TARGET_RATIOS, calibrate
from skipllm_core.calibration.measure import BATCHES
from skipllm_core.calibration.passes import Passes
from skipllm_core.calibration.work import Options, Work
from skipllm_core.config import EngineConfig
from skipllm_core.engine.engine import Engine
from skipllm_core.errors import ConfigError
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.skip.profile import MEASURED_POLICIES, SkipProfile
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, resolve_skip
from skipllm_core.types import SamplingParams
from tests.runner.tiny import engine_config, generate, write_config

NUM_LAYERS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = tmp_path_factory.mktemp("tiny")
    return engine_config(write_config(path, num_hidden_layers=NUM_LAYERS, eos_token_id=None))


@pytest.fixture(scope="module")
def runner(config: EngineConfig) -> TorchModelRunner:
    return TorchModelRunner(config)


@pytest.fixture
def few_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TARGET_RATIOS", (0.1, 0.25))


def prompts(count: int, seed: int = 1) -> list[Answer]:
    ids = torch.randint(3, 96, (count, 9), generator=torch.Generator().manual_seed(seed))
    return [Answer(row[: 3 + n % 7].tolist(), []) for n, row in enumerate(ids)]


def run(
    runner: TorchModelRunner,
    config: EngineConfig,
    answers: Sequence[Answer] | None = None,
    work: Work | None = None,
    **options: Any,
) -> SkipProfile:
    chosen = Options(**{"max_tokens": 5, "warmup_tokens": 0} | options)
    answers = prompts(8) if answers is None else answers
    return calibrate(runner, config, answers, chosen, fingerprint="abc", work=work)


@pytest.fixture(scope="module")
def profile(runner: TorchModelRunner, config: EngineConfig) -> SkipProfile:
    return run(runner, config, prompts(16), max_tokens=16, warmup_tokens=2)


def test_calibration_tells_what_each_policy_costs(profile: SkipProfile) -> None:
    assert profile.num_layers == NUM_LAYERS
    assert profile.num_prompts == 12
    assert profile.num_tokens == 12 * 15
    assert profile.warmup_tokens == 2
    assert all(layer.p05 <= layer.p50 <= layer.p95 for layer in profile.similarity)
    for policy in MEASURED_POLICIES:
        points = profile.points(policy)
        assert len(points) >= 3
        assert points[-1].skipped_ffn_share > 0.35
        for point in points:
            assert point.target_ratio in TARGET_RATIOS
            # Under the last two there is no warm-up.
            has_warmup = policy not in ("layer_drop", "early_exit")
            assert point.num_tokens == 4 * (14 if has_warmup else 15)
            # A random model is no robust one, and has few layers to choose from.
            assert point.skipped_ffn_share == pytest.approx(point.target_ratio, abs=0.1)
            assert 0 <= point.top1_agreement <= 1
            assert point.kl > 0
            ratios = [point.weight_skip_ratio[batch] for batch in BATCHES]
            assert ratios[0] == pytest.approx(point.skipped_ffn_share, abs=1e-5)
            assert ratios == sorted(ratios, reverse=True)
            is_known_beforehand = policy not in ("ffn_skip", "neurons")
            assert (point.free_ffn_share is None) == is_known_beforehand
    for point in profile.ffn_skip:
        assert sum(point.trigger_layers) <= point.num_tokens
    (at_a_quarter,) = (p for p in profile.ffn_skip if p.target_ratio == 0.25)
    assert (profile.cold_start, profile.cold_end) == at_a_quarter.region


def test_neurons_leave_out_the_share_that_was_asked_for(profile: SkipProfile) -> None:
    assert [point.target_ratio for point in profile.neurons] == list(TARGET_RATIOS)
    for point in profile.neurons:
        assert point.skipped_ffn_share == pytest.approx(point.target_ratio, abs=0.03)
        assert point.free_ffn_share == pytest.approx(point.target_ratio, abs=0.05)


def test_a_profile_can_be_saved_loaded_and_served(
    profile: SkipProfile, runner: TorchModelRunner, config: EngineConfig, tmp_path: Path
) -> None:
    profile.save(tmp_path / "skip.yaml")
    loaded = SkipProfile.load(tmp_path / "skip.yaml")
    assert loaded == profile
    for policy in MEASURED_POLICIES:
        point = loaded.points(policy)[-2]
        wish = SkipOptions(policy=policy, ratio=point.skipped_ffn_share)
        skip = resolve_skip(SkipDefaults(), loaded, wish)
        params = SamplingParams(max_tokens=16, temperature=0, skip=skip)
        requests = [(answer.prompt_ids, params) for answer in prompts(16)[::4]]
        usages = [row[-1].skip_usage for row in generate(runner, config, requests)]
        # Of 15 decoded tokens, the first is in the warm-up.
        share = sum(usage.skipped_ffn_rows for usage in usages if usage is not None)
        share /= sum(usage.total_ffn_rows for usage in usages if usage is not None)
        assert share == pytest.approx(point.skipped_ffn_share, abs=0.06)


def test_policies_can_be_chosen(
    profile: SkipProfile, runner: TorchModelRunner, config: EngineConfig
) -> None:
    policies = ("neurons", "random")
    chosen = run(runner, config, prompts(16), max_tokens=16, warmup_tokens=2, policies=policies)
    assert chosen.neurons == profile.neurons
    assert chosen.random
    for policy in set(MEASURED_POLICIES) - set(policies):
        assert not chosen.points(policy)
    assert chosen.similarity == profile.similarity


# Answers -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_targets")
def test_finished_answers_are_taken_as_they_are(
    runner: TorchModelRunner, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = run(runner, config, policies=("static",))
    requests = [(a.prompt_ids, SamplingParams(max_tokens=5, temperature=0)) for a in prompts(8)]
    texts = [
        [token_id for output in row for token_id in output.token_ids]
        for row in generate(runner, config, requests)
    ]
    finished = [
        Answer(prompt.prompt_ids, [*text, 7, 7])
        for prompt, text in zip(prompts(8), texts, strict=True)
    ]
    assert run(runner, config, [*prompts(1), *finished[1:]], policies=("static",)) == generated
    monkeypatch.delattr(Engine, "step")  # nothing is generated
    assert run(runner, config, finished, policies=("static",)) == generated, "cut to 5 tokens"


@pytest.mark.usefixtures("few_targets")
def test_an_answer_ends_where_the_context_does(
    runner: TorchModelRunner, config: EngineConfig
) -> None:
    """The first token comes with the prompt, the last takes the last place: two are decoded."""
    long = [Answer([3] * (runner.max_model_len - 3), []) for _ in range(2)]
    profile = run(runner, config, long, max_tokens=10**6, policies=("static",))
    assert profile.num_tokens == 2
    long[0] = Answer([3] * (runner.max_model_len - 1), [])
    with pytest.raises(ConfigError, match="leaves no room"):
        run(runner, config, long)


@pytest.mark.usefixtures("few_targets")
@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([Answer([3], [4] * 9)] * 2 + [Answer([3], [4] * 2)], None),
        ([Answer([3], [4] * 2)] + [Answer([3], [4] * 9)] * 3, "all 1 held-out answers end within"),
        ([Answer([3], [4] * 9)] + [Answer([3], [4] * 2)] * 3, "all 3 calibration answers end"),
    ],
)
def test_answers_that_end_within_the_warmup_are_told_at_once(
    answers: list[Answer],
    says: str | None,
    runner: TorchModelRunner,
    config: EngineConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"max_tokens": 9, "warmup_tokens": 3, "policies": ("static",)}
    if says is None:
        with caplog.at_level(logging.WARNING):
            run(runner, config, answers, **options)
        assert "have 6 tokens behind the warm-up" in caplog.text
        return
    monkeypatch.delattr(Passes, "in_full")  # nothing is measured before
    with pytest.raises(ConfigError, match=says):
        run(runner, config, answers, **options)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Answer([], []), "a prompt has no tokens"),
        (Answer([3], [4, 96]), "token id 96, the model's vocabulary 96 entries"),
        (Answer([96], []), "token id 96"),
    ],
)
def test_ids_that_the_model_cannot_read_are_refused(
    wrong: Answer, says: str, runner: TorchModelRunner, config: EngineConfig
) -> None:
    with pytest.raises(ConfigError, match=says):
        run(runner, config, [*prompts(3), wrong])


# Regions -----------------------------------------------------------------------------------------


def test_cold_regions_can_be_given(runner: TorchModelRunner, config: EngineConfig) -> None:
    given = run(runner, config, cold_start=2, cold_end=6, policies=("ffn_skip",))
    assert (given.cold_start, given.cold_end) == (2, 6)
    assert {point.region for point in given.ffn_skip} == {(2, 6)}
    assert given.ffn_skip[-1].target_ratio <= 0.25, "three of twelve is what it reaches"
    assert run(runner, config, cold_start=3, policies=("random",)).cold_start == 3
    for wrong in ({"cold_start": 5, "cold_end": 6}, {"cold_end": NUM_LAYERS}):
        with pytest.raises(ConfigError, match="between them"):
            run(runner, config, **wrong)


# Progress and interruptions ----------------------------------------------------------------------


@pytest.mark.usefixtures("few_targets")
def test_progress_moves_on_one_clock(runner: TorchModelRunner, config: EngineConfig) -> None:
    told: list[tuple[str, float, float]] = []
    run(runner, config, work=Work(on_progress=lambda *args: told.append(args)))
    done = [done for _, done, _ in told]
    assert done == sorted(done)
    assert len(set(done)) > 50, "a bar that hardly moves"
    shares = [done / total for _, done, total in told]
    assert shares[0] == 0
    assert shares[-1] == 1
    steps = [after - before for before, after in pairwise(shares)]
    assert max(steps) < 0.2, "it leaps at its end"
    assert min(steps) > -0.1, "it falls back"
    assert sum(share > 0.97 for share in shares[:-1]) < 0.2 * len(shares), "it waits at its end"


class InterruptedHereError(Exception):
    pass


@pytest.mark.usefixtures("few_targets")
@pytest.mark.parametrize("at", [("generate", 2), ("under", 5), ("under", 14)])
def test_an_interrupted_calibration_goes_on_where_it_was(
    at: tuple[str, int],
    runner: TorchModelRunner,
    config: EngineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, file = run(runner, config), tmp_path / "skip.yaml.partial"
    counts = {"generate": 0, "under": 0}
    limits: list[tuple[str, int]] = [at]
    engine_step, under = Engine.step, Passes.under

    def count(what: str) -> None:
        counts[what] += 1
        if (what, counts[what]) in limits:
            limits.clear()
            raise InterruptedHereError

    def counted_step(self: Engine) -> Any:
        output = engine_step(self)
        assert output is not None
        for _ in output.outputs:
            count("generate")
        return output

    def counted_under(self: Passes, *args: Any) -> Any:
        count("under")
        return under(self, *args)

    monkeypatch.setattr(Engine, "step", counted_step)
    monkeypatch.setattr(Passes, "under", counted_under)
    with pytest.raises(InterruptedHereError):
        run(runner, config, work=Work(file, {"model": "a"}))
    with file.open("ab") as cut_off:
        cut_off.write(b'["search 1 5 0.')
    interrupted, counts = counts, {"generate": 0, "under": 0}
    assert run(runner, config, work=Work(file, {"model": "a"})) == whole
    resumed, counts = counts, {"generate": 0, "under": 0}
    assert run(runner, config, work=Work(file, {"model": "a"})) == whole
    assert counts == {"generate": 0, "under": 0}, "all of it was done"
    run(runner, config)
    if at[0] == "under":
        assert resumed["generate"] < counts["generate"], "answers are made once"
        lost = resumed["under"] + interrupted["under"] - counts["under"]
        assert lost <= calibration.SIDE_BY_SIDE, "what was done is done again"


def test_what_another_calibration_has_done_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "skip.yaml.partial"
    first = Work(file, {"model": "a"})
    first.do("record", 1, lambda: 7, int)
    assert Work(file, {"model": "a"}).num_kept == 1
    assert Work(file, {"model": "b"}).num_kept == 0
    assert Work(file, {"model": "a"}).num_kept == 0, "the file is the other's now"
