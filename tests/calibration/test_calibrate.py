"""Calibration end to end, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skipllm_core.calibration.calibrate import BATCHES, TARGET_RATIOS, calibrate
from skipllm_core.calibration.measure import Measurement, forced_kl, measure, record
from skipllm_core.calibration.probe import Probe
from skipllm_core.calibration.regions import max_reachable_ratio
from skipllm_core.calibration.work import Options, Work
from skipllm_core.errors import ConfigError
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, resolve_skip
from skipllm_core.types import SamplingParams, SkipParams
from tests.model.checkpoints import make_oracle
from tests.runner.tiny import engine_config, generate, write_config

NUM_LAYERS = 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    return write_config(path, num_hidden_layers=NUM_LAYERS, eos_token_id=None)


@pytest.fixture(scope="module")
def runner(model_dir: Path) -> TorchModelRunner:
    return TorchModelRunner(engine_config(model_dir))


def prompts(count: int, seed: int) -> list[list[int]]:
    ids = torch.randint(3, 96, (count, 9), generator=torch.Generator().manual_seed(seed))
    return [row[: 3 + n % 7].tolist() for n, row in enumerate(ids)]


@pytest.fixture(scope="module")
def profile(runner: TorchModelRunner) -> SkipProfile:
    return calibrate(
        runner,
        prompts(8, seed=1),
        prompts(6, seed=2),
        Options(max_tokens=16, warmup_tokens=2),
        fingerprint="abc",
        max_num_seqs=12,
    )


def test_calibration_tells_what_skipping_does_to_the_model(profile: SkipProfile) -> None:
    assert profile.num_layers == NUM_LAYERS
    assert profile.num_tokens == 8 * 15
    assert profile.warmup_tokens == 2
    assert len(profile.ffn_skip) >= 3
    for point in profile.ffn_skip:
        assert point.num_tokens == 6 * 14
        assert sum(point.trigger_layers) <= point.num_tokens
        assert point.skipped_ffn_share == pytest.approx(point.target_ratio, abs=0.1)
        assert 0 < point.top1_agreement < 1  # a random model is no robust one
        assert point.kl > 0
        assert point.target_ratio <= max_reachable_ratio(point.region, NUM_LAYERS)
        ratios = [point.weight_skip_ratio[batch] for batch in BATCHES]
        assert ratios[0] == point.skipped_ffn_share
        assert ratios == sorted(ratios, reverse=True)
    assert profile.ffn_skip[-1].target_ratio >= 0.45
    assert TARGET_RATIOS[-1] == 0.5
    (at_a_quarter,) = (p for p in profile.ffn_skip if p.target_ratio == 0.25)
    assert (profile.cold_start, profile.cold_end) == at_a_quarter.region
    assert profile.ffn_skip[-1].perplexity_change > 0
    assert all(layer.p05 <= layer.p50 <= layer.p95 for layer in profile.similarity)


def test_a_profile_can_be_saved_loaded_and_served(
    profile: SkipProfile, runner: TorchModelRunner, model_dir: Path, tmp_path: Path
) -> None:
    profile.save(tmp_path / "skip.yaml")
    loaded = SkipProfile.load(tmp_path / "skip.yaml")
    ratio = loaded.ffn_skip[1].skipped_ffn_share
    skip = resolve_skip(SkipDefaults(), loaded, SkipOptions(ratio=ratio))
    params = SamplingParams(max_tokens=16, temperature=0, skip=skip)
    requests = [(prompt, params) for prompt in prompts(6, seed=2)]
    outputs = generate(runner, engine_config(model_dir), requests)
    usages = [row[-1].skip_usage for row in outputs]
    # The held-out prompts again, so what was measured comes out: over the 14 of 15 decoded tokens
    # that follow the warm-up.
    skipped = sum(usage.skipped_ffn_blocks for usage in usages)
    assert skipped / (6 * 14 * NUM_LAYERS) == pytest.approx(ratio, abs=1e-4)


def test_never_skipping_agrees_with_itself(runner: TorchModelRunner) -> None:
    skip = SkipParams(policy="ffn_skip", threshold=2.0, cold_end=NUM_LAYERS, warmup_tokens=0)
    result = measure(Probe(runner, max_tokens=8, max_num_seqs=9), prompts(4, seed=3), skip, Work())
    assert result.token_skip_ratio == 0
    assert result.top1_agreement == 1
    assert result.kl == pytest.approx(0, abs=1e-5)
    assert result.perplexity_change == pytest.approx(0, abs=1e-5)


def test_the_kl_on_the_full_models_text_does_not_need_the_free_one(
    profile: SkipProfile, runner: TorchModelRunner
) -> None:
    skip = resolve_skip(SkipDefaults(), profile, SkipOptions(ratio=0.2))
    probe = Probe(runner, max_tokens=8, max_num_seqs=12)
    whole = measure(probe, prompts(4, seed=3), skip, Work())
    assert forced_kl(probe, prompts(4, seed=3), skip, Work()) == pytest.approx(whole.kl, rel=1e-3)


def test_groups_do_not_change_what_is_measured(
    profile: SkipProfile, runner: TorchModelRunner
) -> None:
    skip = resolve_skip(SkipDefaults(), profile, SkipOptions(ratio=0.2))
    all_at_once, one_by_one = (
        measure(Probe(runner, max_tokens=8, max_num_seqs=limit), prompts(4, seed=3), skip, Work())
        for limit in (12, 3)
    )
    assert one_by_one.trigger_layers == all_at_once.trigger_layers
    assert one_by_one.skipped_layers == all_at_once.skipped_layers
    assert sum(all_at_once.skipped_layers) > 0
    assert one_by_one.sum_kl == pytest.approx(all_at_once.sum_kl, rel=1e-3)


def test_weight_reads_are_avoided_where_all_rows_of_a_batch_skip() -> None:
    # Of 10 tokens, 4 skip layer 2, 8 layer 3 and 10 layer 4.
    found = Measurement([0, 4, 4, 2, 0], [0, 0, 4, 8, 10], num_free_tokens=10)
    assert found.token_skip_ratio == pytest.approx((0.4 + 0.8 + 1) / 5)
    assert found.weight_skip_ratio(1) == found.token_skip_ratio
    assert found.weight_skip_ratio(4) == pytest.approx((0.4**4 + 0.8**4 + 1) / 5)


def run(runner: TorchModelRunner, work: Work | None = None, **options: int) -> SkipProfile:
    chosen = Options(**{"max_tokens": 4, "warmup_tokens": 0} | options)
    return calibrate(
        runner, prompts(4, seed=1), prompts(1, seed=2), chosen, fingerprint="abc", work=work
    )


def test_progress_is_told(runner: TorchModelRunner) -> None:
    told: list[tuple[float, float]] = []
    run(runner, Work(on_progress=lambda what, done, total: told.append((done, total))))
    done, totals = zip(*told, strict=True)
    assert done[0] == 0 < totals[0]
    assert list(done) == sorted(done)
    assert len(told) > 20, "a bar that hardly moves"
    assert told[-1][0] == told[-1][1] > 0


class InterruptedHereError(Exception):
    pass


def test_an_interrupted_calibration_goes_on_where_it_was(
    runner: TorchModelRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, file = run(runner), tmp_path / "skip.yaml.partial"
    counts: list[int] = []
    probe_prefill = Probe.prefill

    def prefill(self: Probe, *args: object) -> object:
        counts[-1] += 1
        if counts == [9]:
            raise InterruptedHereError
        return probe_prefill(self, *args)

    monkeypatch.setattr(Probe, "prefill", prefill)
    counts.append(0)
    with pytest.raises(InterruptedHereError):
        run(runner, Work(file, {"model": "a"}))
    with file.open("ab") as cut_off:
        cut_off.write(b'["measure 1 5 0.')
    counts.append(0)
    assert run(runner, Work(file, {"model": "a"})) == whole
    counts.append(0)
    assert run(runner, Work(file, {"model": "a"})) == whole
    assert counts[2] == 0, "all of it was done"
    counts.append(0)
    run(runner)
    assert counts[1] <= counts[3] - 8, "what was done is done again"


def test_what_another_calibration_has_done_is_not_taken(
    runner: TorchModelRunner, tmp_path: Path
) -> None:
    file = tmp_path / "skip.yaml.partial"
    first = Work(file, {"model": "a"})
    first.do("record 0", 1, lambda: 7, int)
    assert Work(file, {"model": "a"}).num_kept == 1
    assert Work(file, {"model": "b"}).num_kept == 0
    assert Work(file, {"model": "a"}).num_kept == 0, "the file is the other's now"


def test_cold_regions_can_be_given(runner: TorchModelRunner) -> None:
    given = run(runner, cold_start=2, cold_end=6)
    assert (given.cold_start, given.cold_end) == (2, 6)
    assert {point.region for point in given.ffn_skip} == {(2, 6)}
    assert given.ffn_skip[-1].target_ratio <= 0.25, "three of twelve is what it reaches"
    assert run(runner, cold_start=3).cold_start == 3
    for wrong in ({"cold_start": 5, "cold_end": 6}, {"cold_end": NUM_LAYERS}):
        with pytest.raises(ConfigError, match="between them"):
            run(runner, **wrong)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_num_seqs": 2}, "side by side"),
        ({"warmup_tokens": 99}, "within the warm-up"),
    ],
)
def test_calibration_that_cannot_work_is_refused(
    runner: TorchModelRunner, changes: dict[str, int], says: str
) -> None:
    settings = {"warmup_tokens": 0, "max_num_seqs": 8} | changes
    options = Options(max_tokens=6, warmup_tokens=settings["warmup_tokens"])
    with pytest.raises(ConfigError, match=says):
        calibrate(
            runner,
            prompts(2, 1),
            prompts(2, 2),
            options,
            fingerprint="abc",
            max_num_seqs=settings["max_num_seqs"],
        )


def test_a_measurement_of_nothing_is_no_profile(runner: TorchModelRunner) -> None:
    beyond = [[1] * (runner.max_model_len - 2)]  # one token is decoded, in the warm-up
    options = Options(max_tokens=6, warmup_tokens=2)
    with pytest.raises(ConfigError, match="1 held-out prompts are too short"):
        calibrate(runner, prompts(2, 1), beyond, options, fingerprint="abc")


@torch.inference_mode()
def test_an_answer_ends_where_the_context_does(runner: TorchModelRunner) -> None:
    """The first token comes with the prompt, the last takes the last place: two are decoded."""
    probe = Probe(runner, max_tokens=10**6, max_num_seqs=2)
    seen = record(probe, [[1] * (runner.max_model_len - 3)], Work())
    assert len(seen.similarities) == len(seen.generated) == seen.num_tokens == 2
    with pytest.raises(ConfigError, match="leaves no room"):
        record(probe, [[1] * (runner.max_model_len - 1)], Work())


@torch.inference_mode()
def test_many_tokens_are_thinned_out_and_all_of_them_counted(
    runner: TorchModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Probe(runner, max_tokens=16, max_num_seqs=2)
    every = record(probe, prompts(4, seed=1), Work())
    monkeypatch.setattr("skipllm_core.calibration.measure.MAX_RECORDED_TOKENS", 25)  # of 64
    third = record(probe, prompts(4, seed=1), Work())
    assert third.num_tokens == every.num_tokens == 60
    assert third.block_influence == every.block_influence
    # Each group of two prompts has 30 tokens, of which it keeps the first and every third.
    assert torch.equal(third.similarities, every.similarities[::3])
    assert torch.equal(third.generated, every.generated[::3])


@torch.inference_mode()
def test_similarities_and_influences_are_those_of_transformers_hidden_states(
    tmp_path: Path,
) -> None:
    oracle = make_oracle("llama3", num_hidden_layers=4)
    oracle.save_pretrained(tmp_path)
    runner = TorchModelRunner(engine_config(tmp_path, load_format="auto"))
    prompt = prompts(3, seed=4)[2]
    seen = record(Probe(runner, max_tokens=9, max_num_seqs=1), [prompt], Work())
    whole = oracle.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)
    attended: list[torch.Tensor] = []
    for layer in oracle.model.layers:  # what the FFN's norm gets is the residual before the FFN
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args: attended.append(args[0])
        )
    # hidden_states[l] is what goes into layer l; the last one is normed, so it is left out.
    states = oracle(whole, output_hidden_states=True).hidden_states
    decoded = slice(len(prompt), len(prompt) + seen.num_tokens)
    for layer in range(3):
        before, after = states[layer][0, decoded], states[layer + 1][0, decoded]
        cosines = torch.cosine_similarity(attended[layer][0, decoded], after, dim=-1)
        assert torch.allclose(seen.similarities[:, layer], cosines, atol=1e-5)
        influence = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
        assert seen.block_influence[layer] == pytest.approx(float(influence), abs=1e-5)


def test_the_region_of_the_lowest_kl_is_taken(
    runner: TorchModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, the one whose size is nearest to 5: the costs are made up."""

    def cost(probe: Probe, of: object, skip: SkipParams, work: Work) -> float:
        return abs(skip.cold_end - skip.cold_start - 5)

    monkeypatch.setattr("skipllm_core.calibration.calibrate.forced_kl", cost)
    points = run(runner, max_tokens=16).ffn_skip
    sizes = {p.target_ratio: p.region[1] - p.region[0] for p in points}
    compared = {0.05: (2, 3, 4), 0.15: (3, 4, 5), 0.25: (4, 5, 6), 0.5: (7, 8, 9)}
    known = sizes.keys() & compared.keys()
    assert len(known) >= 2
    for target in known:
        nearest = min(abs(size - 5) for size in compared[target])
        assert abs(sizes[target] - 5) == nearest
