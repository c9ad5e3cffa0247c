"""The bookkeeping of decode steps on the device, without one: graphs are direct calls."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skipllm_core.config import Consensus, EngineConfig
from skipllm_core.engine.runner import LateModelRunner
from skipllm_core.errors import ConfigError
from skipllm_core.kernels.gpu.rows import Variant
from skipllm_core.runner import device_sampler, gpu_runner
from skipllm_core.runner.gpu_runner import GpuModelRunner
from skipllm_core.runner.graphs import Launch, buckets, direct
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.runner.slots import Slots
from skipllm_core.sequence import Sequence
from skipllm_core.types import SamplingParams, SeqOutput, SkipParams
from tests.runner.operators import WAITING, Operators
from tests.runner.reference_decoder import ReferenceDecoder
from tests.runner.tiny import (
    BLOCK_BYTES,
    NUM_LAYERS,
    engine_config,
    generate,
    left_out,
    skipped,
    text,
    write_config,
)

NEURONS = SkipParams(
    policy="neurons",
    up_thresholds=(0.09, 0.12, 0.0, 0.15, 0.11, 0.08),
    down_thresholds=(0.05, 0.04, 0.06, 0.0, 0.05, 0.07),
    warmup_tokens=2,
)
SKIPS = [
    SkipParams(),
    SkipParams(policy="ffn_skip", threshold=-1.0, warmup_tokens=3, cold_start=1, cold_end=5),
    SkipParams(policy="ffn_skip", threshold=0.9, warmup_tokens=0, cold_start=0, cold_end=6),
    SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=1, cold_end=6, max_skips=2),
    SkipParams(policy="static", layers=(2, 4), warmup_tokens=2),
    SkipParams(policy="random", probability=0.5, warmup_tokens=0, cold_start=1, cold_end=5),
    NEURONS,
]


def requests(num_requests: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(0)
    return [
        (
            [rng.randrange(3, 96) for _ in range(rng.randint(1, 30))],
            SamplingParams(
                max_tokens=rng.randint(1, 40),
                temperature=0.0,
                repetition_penalty=rng.choice([1.0, 1.3]),
                logprobs=rng.choice([None, None, 2]),
                stop_token_ids=(2, 50),
                skip=replace(SKIPS[i % len(SKIPS)], trace=True),
            ),
        )
        for i in range(num_requests)
    ]


@pytest.mark.parametrize("num_blocks", [100, 6])
def test_texts_and_skipped_layers_equal_the_eager_runners(tmp_path: Path, num_blocks: int) -> None:
    config = engine_config(
        write_config(tmp_path),
        enforce_eager=True,
        max_num_seqs=6,
        max_model_len=80,
        kv_cache_memory_bytes=num_blocks * BLOCK_BYTES,
    )
    runner = GpuModelRunner(config, ReferenceDecoder, lambda: direct)
    assert isinstance(runner, LateModelRunner)
    found = generate(runner, config, requests(16))
    expected = generate(TorchModelRunner(config), config, requests(16))
    for left, right in zip(found, expected, strict=True):
        assert text(left) == text(right)
        assert skipped(left) == skipped(right)
        assert left_out(left) == left_out(right)
        assert left[-1].skip_usage == right[-1].skip_usage
        assert left[-1].finish_reason == right[-1].finish_reason
        for mine, theirs in zip(left, right, strict=True):
            for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
                assert a.top_ids == b.top_ids
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert any(neurons for outputs in found for neurons in left_out(outputs))
    if num_blocks == 6:
        assert sum(outputs[-1].num_preemptions for outputs in found) > 0
    assert any(layers for outputs in found for layers in skipped(outputs))


def test_a_seeded_text_is_the_same_alone_in_a_batch_and_when_preempted(tmp_path: Path) -> None:
    def serve(num_requests: int, num_blocks: int) -> list[list[int]]:
        config = engine_config(
            write_config(tmp_path),
            enforce_eager=True,
            max_model_len=80,
            kv_cache_memory_bytes=num_blocks * BLOCK_BYTES,
        )
        runner = GpuModelRunner(config, ReferenceDecoder, lambda: direct)
        params = SamplingParams(max_tokens=50, temperature=2.0, seed=11)
        wanted = [([7 + i, 8], params) for i in range(num_requests)]
        return [text(outputs) for outputs in generate(runner, config, wanted)]

    alone = serve(1, 40)[0]
    assert serve(6, 40)[0] == alone
    assert serve(6, 8) == serve(6, 40)


@pytest.mark.parametrize(("skip", "variant"), [(SKIPS[1], "skip"), (NEURONS, "neurons")])
def test_steps_without_a_row_that_can_skip_are_stock_ones_and_padded_to_a_bucket(
    skip: SkipParams, variant: Variant, tmp_path: Path
) -> None:
    config = engine_config(write_config(tmp_path), enforce_eager=True, max_num_seqs=8)
    decoders: list[ReferenceDecoder] = []

    def make(*parts: object) -> ReferenceDecoder:
        decoders.append(ReferenceDecoder(*parts))  # type: ignore[arg-type]
        return decoders[-1]

    runner = GpuModelRunner(config, make, lambda: direct)
    rule = replace(skip, warmup_tokens=3, trace=True)
    params = SamplingParams(max_tokens=6, temperature=0.0, skip=rule)
    outputs = generate(runner, config, [([5 + i], params) for i in range(3)])
    assert {num_rows for num_rows, _ in decoders[0].steps} == {4}
    assert [variant for _, variant in decoders[0].steps] == ["stock"] * 2 + [variant] * 3
    told = skipped if variant == "skip" else left_out
    assert all(told_of_token for out in outputs for told_of_token in told(out)[3:])


def test_thresholds_of_neurons_move_with_their_row(tmp_path: Path) -> None:
    config = engine_config(write_config(tmp_path), enforce_eager=True, max_num_seqs=4)
    wanted = []
    for n in range(4):  # those of the last slots last longest
        thresholds = tuple(0.05 * (n + 1) for _ in range(NUM_LAYERS))
        skip = replace(NEURONS, up_thresholds=thresholds, warmup_tokens=0, trace=True)
        wanted.append(([5 + n], SamplingParams(max_tokens=3 + 3 * n, temperature=0.0, skip=skip)))
    runner = GpuModelRunner(config, ReferenceDecoder, lambda: direct)
    found = generate(runner, config, wanted)
    expected = generate(TorchModelRunner(config), config, wanted)
    assert list(map(left_out, found)) == list(map(left_out, expected))
    shares = [out[-1].skip_usage.skipped_ffn_share for out in found if out[-1].skip_usage]
    assert shares == sorted(shares)
    assert len(set(shares)) == 4


def test_every_variant_is_captured_before_the_first_request(tmp_path: Path) -> None:
    captured: list[Launch] = []

    def capture(launch: Launch) -> Launch:
        captured.append(launch)
        launch()  # as a capture does: on padded rows
        return launch

    config = engine_config(write_config(tmp_path), enforce_eager=True, max_num_seqs=4)
    runner = GpuModelRunner(config, ReferenceDecoder, lambda: capture)
    assert len(captured) == 3 * (3 + 3)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    assert len(text(generate(runner, config, [([5], params)])[0])) == 4
    assert len(captured) == 3 * (3 + 3)


def test_memory_that_runs_out_is_told_with_what_to_lower(tmp_path: Path) -> None:
    def make(*parts: object) -> ReferenceDecoder:
        raise torch.OutOfMemoryError("tried to allocate 7 GiB\nmore")

    config = engine_config(write_config(tmp_path), enforce_eager=True)
    with pytest.raises(ConfigError, match=r"--max-num-seqs \(8\).*7 GiB$"):
        GpuModelRunner(config, make, lambda: direct)


def test_no_launch_waits_for_the_device_whoever_comes_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NullDecoder(ReferenceDecoder):
        def step(self, num_rows: int, variant: Variant) -> None:
            self.rows.logits.zero_()

    config = engine_config(write_config(tmp_path), enforce_eager=True, max_num_seqs=4)
    runner = GpuModelRunner(config, NullDecoder, lambda: direct)
    # In Triton's interpreter a kernel is no operator of the device.
    monkeypatch.setattr(device_sampler, "exponentials", lambda *_: None)
    found: set[str] = set()
    launch = runner._launch_decode

    def watch(batch: Any) -> Any:
        with Operators() as operators:
            read = launch(batch)
        found.update(operators.names)
        return read

    monkeypatch.setattr(runner, "_launch_decode", watch)
    outputs = generate(runner, config, requests(12))  # more than rows: they take turns
    assert all(out[-1].finish_reason in ("length", "stop") for out in outputs)
    assert found >= {"index_copy_", "copy_", "argmax"}
    assert not found & WAITING


def test_a_launch_that_fails_leaves_no_row_behind(tmp_path: Path) -> None:
    config = engine_config(write_config(tmp_path), enforce_eager=True)
    runner = GpuModelRunner(config, ReferenceDecoder, lambda: direct)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    wanted = [([5 + i], params) for i in range(5)]
    expected = [text(outputs) for outputs in generate(runner, config, wanted)]
    launch, num_launches = runner.graphs.launch, 0

    def fail_once(num_rows: int, *variant: Any) -> None:
        nonlocal num_launches
        num_launches += 1
        if num_launches == 4:
            raise RuntimeError("out of luck")
        launch(num_rows, *variant)

    runner.graphs.launch = fail_once  # type: ignore[method-assign]
    failed = generate(runner, config, wanted)
    assert [outputs[-1].finish_reason for outputs in failed] == ["error"] * 5
    one = [text(outputs) for outputs in generate(runner, config, wanted[:1])]
    assert one == expected[:1]
    assert int((runner.rows.positions >= 0).sum()) == 1
    assert [text(outputs) for outputs in generate(runner, config, wanted)] == expected


def test_a_mask_that_could_not_be_written_is_written_by_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(write_config(tmp_path), enforce_eager=True)
    runner = GpuModelRunner(config, ReferenceDecoder, lambda: direct)
    skip = SkipParams(policy="static", layers=(2, 4), warmup_tokens=0, trace=True)
    wanted = [([5], SamplingParams(max_tokens=4, temperature=0.0, skip=skip))]
    to_device, failures = gpu_runner._to_device, ["out of luck"]

    def fail_at_the_first_mask(tensor: torch.Tensor, rows: Any) -> torch.Tensor:
        if tensor.shape[-1] == NUM_LAYERS + 1 and failures:
            raise RuntimeError(failures.pop())
        return to_device(tensor, rows)

    monkeypatch.setattr(gpu_runner, "_to_device", fail_at_the_first_mask)
    assert generate(runner, config, wanted)[0][-1].finish_reason == "error"
    assert skipped(generate(runner, config, wanted)[0]) == [(), (2, 4), (2, 4), (2, 4)]


def test_buckets_end_at_the_largest_batch() -> None:
    assert buckets(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert buckets(5) == (1, 2, 4, 5)
    assert buckets(1) == (1,)
    assert buckets(200)[-3:] == (128, 192, 200)


@pytest.mark.parametrize("seed", range(20))
def test_slots_stay_dense_and_a_state_follows_its_sequence(seed: int) -> None:
    rng = random.Random(seed)
    slots = Slots()
    device: dict[int, Sequence] = {}
    pool = [Sequence(i, [1], SamplingParams(max_tokens=1)) for i in range(12)]
    for _ in range(60):
        seqs = rng.sample(pool, rng.randint(1, 8))
        before = {id(seq) for seq in device.values()}
        changes = slots.change(seqs)
        for source, slot in changes.moved:
            device[slot] = device.pop(source)
        for slot, seq in changes.new:
            assert id(seq) not in before
            device[slot] = seq
        if changes.is_padding_stale:
            device = {slot: seq for slot, seq in device.items() if slot < len(seqs)}
        assert sorted(device) == list(range(len(seqs)))
        assert all(device[s] is q for s, q in zip(slots.slot_of(seqs), seqs, strict=True))


def short_requests() -> list[tuple[list[int], SamplingParams]]:
    """As `requests`, but the interpreter takes a second for a step."""
    return [
        (
            prompt[:6],
            replace(params, max_tokens=4 + n % 3, skip=replace(params.skip, warmup_tokens=n % 3)),
        )
        for n, (prompt, params) in enumerate(requests(len(SKIPS)))
    ]


def serve_with_kernels(config: EngineConfig) -> list[list[SeqOutput]]:
    """Through the engine and the Triton decoder, in its interpreter, large tiles and no graphs."""
    kernels = pytest.importorskip("skipllm_core.kernels.gpu.decoder")
    linear = pytest.importorskip("skipllm_core.kernels.gpu.linear")

    def tiles(num_rows: int, num_outputs: int, num_inputs: int) -> Any:
        return linear.Tile(block_n=128, block_k=64)

    def make_decoder(*args: Any) -> Any:
        return kernels.GpuDecoder(*args, consensus=config.consensus is not None, tiles=tiles)

    runner = GpuModelRunner(config, make_decoder, lambda: direct)
    return generate(runner, config, short_requests())


@pytest.mark.slow
@pytest.mark.parametrize("consensus", [None, Consensus(share=0.5, slack=2.0)])
def test_the_engine_over_the_kernels_says_and_skips_what_the_eager_runner_does(
    tmp_path: Path, consensus: Consensus | None
) -> None:
    config = engine_config(
        write_config(tmp_path),
        enforce_eager=True,
        max_num_seqs=3,
        max_model_len=32,
        kv_cache_memory_bytes=100 * BLOCK_BYTES,
        consensus=consensus,
    )
    found = serve_with_kernels(config)
    expected = generate(TorchModelRunner(config), config, short_requests())
    assert list(map(text, found)) == list(map(text, expected))
    assert list(map(skipped, found)) == list(map(skipped, expected))
    assert list(map(left_out, found)) == list(map(left_out, expected))
    assert any(neurons for outputs in found for neurons in left_out(outputs))
    assert any(layers for outputs in found for layers in skipped(outputs))
