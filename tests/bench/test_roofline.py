"""What has to be read, and by how much skipping can speed that up; and what is measured of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skipllm_core.bench.bandwidth import measure_read_bandwidth
from skipllm_core.bench.cases import NEVER, Case, forced_layers, make_cases, mixed_skips
from skipllm_core.bench.decode import runner_weight_bytes
from skipllm_core.bench.machine import cpu_name, last_level_cache_bytes
from skipllm_core.bench.measurement import Tally, measurement, percentile
from skipllm_core.bench.prompts import joined_prompts, random_prompts
from skipllm_core.bench.roofline import StepBytes, WeightBytes, kv_bytes, weight_bytes
from skipllm_core.bench.shapes import SHAPE_NAMES, write_shape
from skipllm_core.errors import ConfigError
from skipllm_core.model.config import ModelConfig, load_model_config
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SkipParams
from tests.model.checkpoints import save_checkpoint
from tests.runner.tiny import engine_config, write_config

FLOAT32, BFLOAT16 = 4, 2


def shape(name: str, directory: Path) -> ModelConfig:
    write_shape(name, directory)
    return load_model_config(directory)


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_a_shape_is_a_model_with_a_tokenizer(name: str, tmp_path: Path) -> None:
    config = shape(name, tmp_path / "new" / "directory")
    tokenizer = HFTokenizer(tmp_path / "new" / "directory")
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert max(ids) < config.vocab_size
    assert config.eos_token_ids == tuple(tokenizer.eos_token_ids)


def test_the_bytes_of_a_step_by_hand(tmp_path: Path) -> None:
    config = shape("163m", tmp_path)
    weights = weight_bytes(config, FLOAT32)
    ffn = 3 * 576 * 1536 + 576
    attention = 576 * (9 + 3 + 3) * 64 + 9 * 64 * 576 + 576
    head = 49152 * 576 + 576
    assert weights.ffn_block == 4 * ffn
    assert weights.total == 4 * (30 * (ffn + attention) + head) == 538_060_032
    # Three steps find 128, 129 and 130 tokens, and see one more each: 130 on average.
    assert kv_bytes(config, FLOAT32, context=128, steps=3) == 130 * 30 * 2 * 3 * 64 * 4


def test_published_sizes_are_met(tmp_path: Path) -> None:
    llama2 = weight_bytes(shape("llama-2-7b", tmp_path), BFLOAT16)
    assert llama2.total / 1e9 == pytest.approx(13.21, abs=0.01)
    assert llama2.ffn_block / 1e6 == pytest.approx(270.5, abs=0.1)
    llama3 = weight_bytes(shape("llama-3.1-8b", tmp_path), BFLOAT16)
    assert llama3.total / 1e9 == pytest.approx(15.01, abs=0.01)
    # Tied: the embedding table is the head, and so is read whole.
    small = weight_bytes(shape("llama-3.2-1b", tmp_path), BFLOAT16)
    assert small.total / 2 == pytest.approx(1.236e9, rel=1e-3)


@pytest.mark.parametrize("name", ["llama2", "llama_biases", "llama3_tied", "qwen2", "qwen3"])
def test_the_formula_counts_what_the_model_holds(name: str, tmp_path: Path) -> None:
    runner = TorchModelRunner(engine_config(save_checkpoint(tmp_path, name), load_format="auto"))
    assert runner_weight_bytes(runner) == weight_bytes(runner.model.config, FLOAT32)


def test_int8_weights_count_a_byte_each_and_their_scales(tmp_path: Path) -> None:
    runner = TorchModelRunner(engine_config(write_config(tmp_path), quantization="int8"))
    matrices, outputs = 3 * 48 * 96, 96 + 96 + 48
    assert runner_weight_bytes(runner).ffn_block == matrices + 4 * outputs + 4 * 48


def test_a_window_bounds_what_a_row_reads(tmp_path: Path) -> None:
    window = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config = load_model_config(write_config(tmp_path, sliding_window=10, **window))
    assert kv_bytes(config, FLOAT32, context=8, steps=4) == (9 + 10 + 10 + 10) / 4 * 6 * 192


def test_the_ideal_speedup_is_the_ratio_of_bytes() -> None:
    step = StepBytes(full=1000, ffn_block=100)
    assert step.read(2.5) == 750
    assert step.ideal_speedup(2.5) == pytest.approx(4 / 3)
    assert step.ideal_speedup(0) == 1


def test_rows_add_an_embedding_row_and_their_context(tmp_path: Path) -> None:
    config = shape("163m", tmp_path)
    weights = WeightBytes(total=1_000_000, ffn_block=1)
    one, eight = (
        StepBytes.of(weights, config, FLOAT32, batch=batch, context=128, steps=3).full
        for batch in (1, 8)
    )
    per_row = 576 * 4 + 130 * 30 * 2 * 3 * 64 * 4
    assert one == 1_000_000 + per_row
    assert eight == 1_000_000 + 8 * per_row


# Cases -------------------------------------------------------------------------------------------


def test_forced_layers_are_a_suffix_before_a_cold_end() -> None:
    assert list(forced_layers(0, 6)) == []
    assert list(forced_layers(2, 6)) == [3, 4]
    assert list(forced_layers(5, 6)) == [0, 1, 2, 3, 4]
    assert list(forced_layers(6, 6)) == [0, 1, 2, 3, 4, 5]


def test_mixed_rows_skip_a_quarter_on_average_and_the_first_nothing() -> None:
    skips = mixed_skips(8, 30)
    assert (skips[0], skips[-1]) == (0, 15)
    assert sum(skips) / 8 / 30 == pytest.approx(0.25)
    assert len(set(skips)) == 8


def test_never_is_always_measured_and_mixed_rows_need_company() -> None:
    cases = make_cases(6, batches=[1, 4], policies=["forced"], forced_skips=[2], has_mixed=True)
    assert [(case.batch, case.label) for case in cases] == [
        (1, "never"),
        (1, "forced 2"),
        (4, "never"),
        (4, "forced 2"),
        (4, "mixed 0-3"),
    ]


def test_a_profile_adds_its_ratios_and_gives_the_gate_its_region() -> None:
    skip = SkipParams(policy="ffn_skip", threshold=0.9, cold_start=2, cold_end=4)
    never, gate_only, adaptive = make_cases(
        6, batches=[1], policies=["ffn_skip"], skips=[(0.25, skip)]
    )
    assert never.skip == NEVER
    assert (gate_only.skip.cold_start, gate_only.skip.cold_end) == (2, 4)
    assert gate_only.skip.threshold > 1
    assert (adaptive.label, adaptive.skip) == ("ffn_skip 25%", skip)


def test_more_blocks_than_there_are_cannot_be_skipped() -> None:
    with pytest.raises(ConfigError, match="--forced-skip 7: the model has only 6 FFN blocks"):
        make_cases(6, batches=[1], forced_skips=[3, 7])


# Measurements ------------------------------------------------------------------------------------


def test_a_measurement_by_hand() -> None:
    never, forced = Case(batch=2), Case(batch=2, policy="forced", forced_skips=(2, 2))
    theirs = Case(batch=2, engine="transformers")
    cases = [never, forced, theirs]
    tallies = {
        never: Tally([0.010, 0.011, 0.030], num_rows=6, num_steps=3, tokens=[[1, 2], [3, 4]]),
        forced: Tally(
            [0.010, 0.008, 0.007], num_rows=6, num_skipped=12, num_steps=3, num_avoided=6
        ),
        theirs: Tally([0.022], tokens=[[1, 2], [3, 5]]),
    }
    found = {
        case: measurement(
            case,
            cases,
            tallies,
            StepBytes(full=1000, ffn_block=100),
            num_layers=8,
            num_neurons=16,
            context=16,
            steps=3,
            rounds=1,
            read_bytes_per_s=200_000,
        )
        for case in cases
    }
    assert found[forced].ms_per_step == pytest.approx(8)
    assert found[forced].tokens_per_s == pytest.approx(250)
    assert found[forced].speedup_vs_never == pytest.approx(11 / 8)
    assert found[forced].speedup_vs_transformers == pytest.approx(22 / 8)
    assert found[forced].token_skip_ratio == found[forced].weight_skip_ratio == 0.25
    assert found[forced].bytes_per_step == 800
    assert found[forced].ceiling_share == pytest.approx(0.5)
    assert found[forced].ideal_speedup == pytest.approx(1.25)
    assert found[forced].share_of_ideal == pytest.approx(1.1)
    assert found[never].tokens_equal_transformers == 0.75
    assert found[theirs].speedup_vs_never == pytest.approx(0.5)
    assert found[theirs].ideal_speedup is None


def test_percentiles_are_values_that_occurred() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0, 0.1, 0.5, 0.9, 1)] == [1, 1, 3, 5, 5]


def test_prompts_have_one_length_and_end_with_their_own() -> None:
    prompts = [[1, 2, 3], [4, 5], [6]]
    assert joined_prompts(prompts, num_rows=4, num_tokens=4) == [
        [4, 5, 6, 1, 2, 3][-4:],
        [2, 3, 4, 5],
        [3, 4, 5, 6],
        [6, 1, 2, 3],
    ]
    drawn = random_prompts(2, 50, vocab_size=7, seed=3)
    assert drawn == random_prompts(2, 50, vocab_size=7, seed=3)
    assert {token for prompt in drawn for token in prompt} == set(range(7))


# The machine -------------------------------------------------------------------------------------


def test_bandwidth_is_the_best_of_several_ways_to_read() -> None:
    found = measure_read_bandwidth(torch.device("cpu"), 2**22)
    assert found.bytes_per_s > 0
    assert found.buffer_bytes == 2**22
    assert found.kind in ("matrix times vector", "sum", "max")


def test_a_cache_that_cores_share_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [
        ("index0", "1", "Data", "48K", "{cpu}"),
        ("index1", "1", "Instruction", "64K", "{cpu}"),
        ("index2", "3", "Unified", "16384K", "0-1"),
    ]
    for cpu in (0, 1, 2):
        for index, level, kind, size, shared in caches:
            folder = tmp_path / f"cpu{cpu}" / "cache" / index
            folder.mkdir(parents=True)
            (folder / "level").write_text(f"{level}\n")
            (folder / "type").write_text(f"{kind}\n")
            (folder / "size").write_text(f"{size}\n")
            is_third = cpu == 2 and level == "3"
            (folder / "shared_cpu_list").write_text("2\n" if is_third else shared.format(cpu=cpu))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert last_level_cache_bytes(tmp_path) == 2 * 16384 * 1024
    assert last_level_cache_bytes(tmp_path / "elsewhere") is None


def test_the_cpu_has_a_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A  CPU (R)\n")
    assert cpu_name(cpuinfo) == "A CPU (R)"
    assert cpu_name(tmp_path / "none") is not None


def test_what_the_command_line_needs_loads_without_torch() -> None:
    code = (
        "import sys, server.cli.bench.decode\n"
        "import skipllm_core.bench.cases, skipllm_core.bench.machine\n"
        "import skipllm_core.bench.prompts, skipllm_core.bench.roofline\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
