"""`skipllm bench decode` and `prefill`: what is measured is what is said. No timings here."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from server.cli.app import app
from skipllm_core.bench import setup
from skipllm_core.bench.cases import Case, make_cases
from skipllm_core.bench.decode import DecodeBench
from skipllm_core.bench.measurement import DecodeMeasurement
from skipllm_core.bench.prefill import bench_prefill
from skipllm_core.bench.prompts import random_prompts
from skipllm_core.bench.setup import loaded
from skipllm_core.errors import ConfigError
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.types import SamplingParams, SkipParams
from tests.cli.test_app import skipllm
from tests.runner.tiny import NUM_LAYERS, VOCAB, engine_config, generate, text, write_config

PROMISED = {
    *("model", "device", "dtype", "policy", "forced_skip", "batch", "context", "ms_per_step"),
    *("tokens_per_s", "ceiling_share", "speedup_vs_never", "skipped_ffn_share", "token_skip_ratio"),
    *("weight_skip_ratio", "speedup_vs_transformers"),
}
CONTEXT, STEPS = 21, 10


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def measure(
    runner: TorchModelRunner, cases: list[Case], rounds: int = 1
) -> list[DecodeMeasurement]:
    prompts = random_prompts(max(case.batch for case in cases), CONTEXT, VOCAB, seed=0)
    return DecodeBench(runner, cases, prompts, steps=STEPS, rounds=rounds).run(1e9)


def test_a_forced_mask_skips_exactly_that_many_blocks_of_every_row(model_dir: Path) -> None:
    runner = TorchModelRunner(engine_config(model_dir, max_num_seqs=32))
    counts = [0, 2, 5, NUM_LAYERS]
    cases = make_cases(NUM_LAYERS, batches=[1, 3], policies=["forced"], forced_skips=counts)
    for found in measure(runner, cases, rounds=2):
        expected = (found.forced_skip or 0) / NUM_LAYERS
        assert found.token_skip_ratio == found.weight_skip_ratio == expected
        assert found.samples == 2 * STEPS
        assert found.ms_per_step_p10 <= found.ms_per_step <= found.ms_per_step_p90


def test_rows_that_disagree_avoid_no_weight_reads(model_dir: Path) -> None:
    runner = TorchModelRunner(engine_config(model_dir, max_num_seqs=32))
    cases = make_cases(NUM_LAYERS, batches=[1, 4], policies=["never"], has_mixed=True)
    *_, mixed = measure(runner, cases)
    assert mixed.policy == "mixed"
    assert mixed.token_skip_ratio == pytest.approx((0 + 1 + 2 + 3) / 4 / NUM_LAYERS)
    assert mixed.weight_skip_ratio == 0
    assert mixed.ideal_speedup == 1


def test_the_gate_alone_skips_nothing_and_an_adaptive_case_does(model_dir: Path) -> None:
    runner = TorchModelRunner(engine_config(model_dir, max_num_seqs=32))
    skip = SkipParams(policy="ffn_skip", threshold=0, warmup_tokens=0, cold_start=1, cold_end=5)
    cases = make_cases(NUM_LAYERS, batches=[2], policies=["ffn_skip"], skips=[(0.5, skip)])
    never, gate_only, adaptive = measure(runner, cases)
    assert never.gate_cost is None
    assert gate_only.gate_cost is not None
    assert gate_only.token_skip_ratio == 0
    assert adaptive.gate_cost is None
    assert adaptive.token_skip_ratio == 3 / NUM_LAYERS  # the first watched layer triggers
    assert adaptive.skip_ratio_asked == 0.5


def test_neurons_left_out_are_told_as_a_share_of_the_weights(model_dir: Path) -> None:
    runner = TorchModelRunner(engine_config(model_dir, max_num_seqs=32))
    most = (1e9,) * NUM_LAYERS
    skip = SkipParams(policy="neurons", up_thresholds=most, down_thresholds=most, warmup_tokens=0)
    cases = make_cases(NUM_LAYERS, batches=[2], policies=["neurons"], neurons=[(0.5, skip)])
    never, neurons = measure(runner, cases)
    assert never.skipped_ffn_share == never.token_skip_ratio == 0
    assert neurons.label == "neurons 50%"
    assert neurons.token_skip_ratio == 0
    assert neurons.skipped_ffn_share == pytest.approx(2 / 3), "gate is read"
    assert neurons.weight_skip_ratio == pytest.approx(2 / 3)
    assert neurons.ideal_speedup is not None
    assert neurons.ideal_speedup > 1


def test_neurons_are_left_out_at_the_share_that_is_forced(model_dir: Path) -> None:
    runner = TorchModelRunner(engine_config(model_dir, max_num_seqs=32))
    cases = make_cases(NUM_LAYERS, batches=[1, 4], policies=[], neuron_shares=[0.3])
    _, alone, _, each, together = measure(runner, cases)
    assert [one.label for one in (alone, each, together)] == [
        *("forced neurons 30%", "forced neurons 30%", "joint neurons 30%")
    ]
    for found in (alone, each, together):
        assert found.skipped_ffn_share == pytest.approx(0.3, abs=0.05)
    assert alone.weight_skip_ratio == pytest.approx(alone.skipped_ffn_share)
    assert together.weight_skip_ratio == pytest.approx(together.skipped_ffn_share)
    assert each.weight_skip_ratio < each.skipped_ffn_share / 2


def test_taking_turns_changes_no_text(model_dir: Path) -> None:
    config = engine_config(model_dir, max_num_seqs=32)
    skip = SkipParams(policy="ffn_skip", threshold=0, warmup_tokens=0, cold_start=1, cold_end=5)
    cases = [*make_cases(NUM_LAYERS, batches=[1, 3], skips=[(0.5, skip)])]
    prompts = random_prompts(3, CONTEXT, VOCAB, seed=0)
    runner = TorchModelRunner(config)
    bench = DecodeBench(runner, cases, prompts, steps=STEPS, rounds=2)
    bench.run(1e9)
    for case in cases:
        if case.policy in ("never", "ffn_skip"):
            params = SamplingParams(max_tokens=STEPS + 1, temperature=0, skip=case.skip)
            requests = [(prompt, params) for prompt in prompts[: case.batch]]
            expected = [text(outputs) for outputs in generate(runner, config, requests)]
            assert bench.tokens_of(case) == expected, case.label


def test_a_cache_that_is_too_small_is_told(model_dir: Path) -> None:
    runner = TorchModelRunner(engine_config(model_dir, max_num_seqs=1, max_model_len=64))
    cases = make_cases(NUM_LAYERS, batches=[2])
    with pytest.raises(ConfigError, match="lower --batch or --context"):
        measure(runner, cases)


def test_transformers_gives_the_same_tokens_from_the_same_weights(model_dir: Path) -> None:
    config = engine_config(model_dir, max_num_seqs=32)
    cases = make_cases(NUM_LAYERS, batches=[1, 3], policies=["never"], compare=True)
    prompts = random_prompts(3, CONTEXT, VOCAB, seed=0)
    with loaded(config, compare=True) as (runner, theirs):
        bench = DecodeBench(
            runner, cases, prompts, steps=STEPS, rounds=1, transformers_model=theirs
        )
        found = bench.run(1e9)
        prefills = bench_prefill(
            runner, prompts, rounds=1, chunk_tokens=8, transformers_model=theirs
        )
    for ours, peer in zip(found[::2], found[1::2], strict=True):
        assert (ours.engine, peer.engine) == ("skipllm", "transformers")
        assert ours.tokens_equal_transformers == 1
        assert ours.samples == peer.samples == STEPS
        assert ours.speedup_vs_transformers == pytest.approx(peer.ms_per_step / ours.ms_per_step)
        assert ours.bytes_per_step == peer.bytes_per_step
    assert [prefill.engine for prefill in prefills] == ["skipllm", "transformers"] * 3
    assert all(prefill.token_equals_transformers for prefill in prefills)


def test_random_weights_without_a_peer_need_no_checkpoint(model_dir: Path) -> None:
    with loaded(engine_config(model_dir), compare=False) as (runner, theirs):
        assert theirs is None
        (found,) = bench_prefill(runner, [[1, 2, 3]], rounds=2, chunk_tokens=2)
    assert found.speedup_vs_transformers is None
    assert found.tokens_per_s == pytest.approx(3000 / found.ms_per_prefill)


# The command -------------------------------------------------------------------------------------


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading memory takes its time, and is tested on its own."""
    measure_all = setup.measure_read_bandwidth

    def measure_little(device: torch.device) -> object:
        return measure_all(device, 2**20)

    monkeypatch.setattr(setup, "measure_read_bandwidth", measure_little)


@pytest.mark.usefixtures("small_buffer")
def test_decode_writes_a_table_json_lines_and_a_plot(tmp_path: Path, model_dir: Path) -> None:
    json_file, plot = tmp_path / "found.jsonl", tmp_path / "plot.png"
    args = ["bench", "decode", str(model_dir), "--load-format", "dummy", "--batch", "1,4"]
    args += ["--context", "20", "--steps", "3", "--rounds", "2", "--forced-skip", "0,3"]
    args += ["--mixed-triggers", "--json", str(json_file), "--plot", str(plot)]
    args += ["--compare", "transformers"]
    run = CliRunner().invoke(app, args, env={"COLUMNS": "80"})
    assert run.exit_code == 0, run.output
    lines = run.stdout.splitlines()
    assert lines[0].startswith("device ")
    assert lines[1].startswith("bandwidth  reads ")
    assert "0.1343M parameters, random weights, float32 on cpu" in lines[2]
    found = [json.loads(line) for line in json_file.read_text().splitlines()]
    assert [(one["batch"], one["label"]) for one in found] == [
        (1, "never"),
        (1, "gate only"),
        (1, "forced 0"),
        (1, "forced 3"),
        (1, "transformers"),
        (4, "never"),
        (4, "gate only"),
        (4, "forced 0"),
        (4, "forced 3"),
        (4, "mixed 0-3"),
        (4, "transformers"),
    ]
    for one in found:
        assert one.keys() >= PROMISED
        assert (one["model"], one["device"], one["dtype"]) == (str(model_dir), "cpu", "float32")
        assert one["context"] == 20
        assert one["ms_per_step"] > 0
        assert one["tokens_per_s"] == pytest.approx(1000 * one["batch"] / one["ms_per_step"])
        assert one["ceiling_share"] > 0
        assert one["read_bandwidth_bytes_per_s"] > 0
    assert [one["token_skip_ratio"] for one in found[:4]] == [0, 0, 0, 0.5]
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.usefixtures("small_buffer")
def test_prefill_writes_json_lines(tmp_path: Path, model_dir: Path) -> None:
    json_file = tmp_path / "found.jsonl"
    args = ["bench", "prefill", str(model_dir), "--load-format", "dummy", "--tokens", "5,20"]
    run = CliRunner().invoke(app, [*args, "--rounds", "2", "--json", str(json_file)])
    assert run.exit_code == 0, run.output
    found = [json.loads(line) for line in json_file.read_text().splitlines()]
    assert [(one["num_tokens"], one["engine"]) for one in found] == [
        (5, "skipllm"),
        (20, "skipllm"),
    ]
    assert all(one["ms_per_prefill"] > 0 for one in found)


@pytest.mark.usefixtures("small_buffer")
def test_the_embedded_model_skips_by_its_own_profile(tmp_path: Path) -> None:
    json_file = tmp_path / "found.jsonl"
    args = ["bench", "decode", "skipllm-demo", "--batch", "2", "--steps", "24", "--rounds", "1"]
    args += ["--policies", "ffn_skip", "--skip-ratio", "0.15,0.3", "--json", str(json_file)]
    run = CliRunner().invoke(app, args)
    assert run.exit_code == 0, run.output
    never, gate_only, some, more = map(json.loads, json_file.read_text().splitlines())
    assert never["token_skip_ratio"] == gate_only["token_skip_ratio"] == 0
    assert 0 < some["token_skip_ratio"] < more["token_skip_ratio"] < 0.5
    assert (some["skip_ratio_asked"], more["skip_ratio_asked"]) == (0.15, 0.3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "x"], "--batch: must be whole numbers of at least 1"),
        (["--batch", "0"], "--batch: must be whole numbers of at least 1"),
        (["--forced-skip", "99"], "--forced-skip 99: the model has only 30 FFN blocks"),
        (["--policies", "static"], "--policies: must be of never, ffn_skip, forced"),
        (["--shape", "3b"], "--shape: must be one of 163m, "),
        (["skipllm-demo", "--shape", "163m"], "give a MODEL or --shape, not both"),
        (["--neuron-share", "0.7"], "--neuron-share: must be above 0, and 0.66 at most"),
        (["--skip-ratio", "0.2"], "random weights have no skip profile"),
        (["--policies", "neurons"], "--policies neurons needs the model's skip profile"),
        (["skipllm-demo", "--skip-ratio", "0.9"], "--skip-ratio: skip.ratio 0.9 is out of reach"),
        (["skipllm-demo", "--skip-ratio", "nan"], "--skip-ratio: must be numbers of at least 0"),
        (["skipllm-demo", "--skip-ratio", "0"], "--skip-ratio: 0 is the policy never"),
        (["--context", "4090"], "needs 4155 positions and the model was made for 4096"),
        (["--json", "/nowhere/at/all"], "/nowhere/at is not a directory"),
        (["--plot", "/"], "cannot write /: it is a directory"),
        (["/nowhere/at/all"], "/nowhere/at/all: no such directory"),
        (["--dtype", "int4"], "--dtype: must be "),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(args: list[str], message: str) -> None:
    run = CliRunner().invoke(app, ["bench", "decode", *args])
    assert run.exit_code in (1, 2)
    assert run.stdout == ""
    assert run.stderr.startswith("error: ")
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for args in (["--plot", "plot.png"], ["--compare", "transformers"]):
        run = CliRunner().invoke(app, ["bench", "decode", *args])
        assert run.exit_code == 1
        assert "pip install 'skipllm[bench]'" in run.stderr


def test_help_fits_a_narrow_terminal() -> None:
    for command in ("decode", "prefill"):
        run = skipllm("bench", command, "--help", COLUMNS="80")
        assert run.returncode == 0, run.stderr
        assert max(map(len, run.stdout.splitlines())) <= 80
