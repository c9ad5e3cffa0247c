"""Cached equals uncached, on a real model: the same tokens, and the same layers skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.types import SamplingParams, SeqOutput, SkipParams
from tests.runner.tiny import (
    BLOCK_BYTES,
    NUM_LAYERS,
    VOCAB,
    engine_config,
    generate,
    skipped,
    text,
    write_config,
)

PROMPT = [(7 * i * i + 3 * i + 5) % VOCAB for i in range(40)]
PLAIN = SamplingParams(max_tokens=40, temperature=0)
SKIPPING = SkipParams(
    policy="ffn_skip",
    threshold=0.86,  # which its tokens reach at different layers
    warmup_tokens=2,
    cold_start=1,
    cold_end=NUM_LAYERS - 1,
    trace=True,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runner(model_dir: Path) -> TorchModelRunner:
    return TorchModelRunner(engine_config(model_dir))


def cached(outputs: list[SeqOutput]) -> int | None:
    return outputs[0].num_cached_tokens


@pytest.mark.parametrize("limits", [{"max_num_seqs": 1}, {"max_num_batched_tokens": 24}])
@pytest.mark.parametrize("skip", [SkipParams(trace=True), SKIPPING])
def test_cached_equals_uncached(
    runner: TorchModelRunner, model_dir: Path, skip: SkipParams, limits: dict[str, int]
) -> None:
    params = replace(PLAIN, skip=skip)
    first_answer = text(generate(runner, engine_config(model_dir), [(PROMPT, params)])[0])
    second_turn = PROMPT + first_answer + [9, 8, 7]
    requests = [
        (prompt_ids, params)
        for prompt_ids in (
            PROMPT,
            second_turn,
            PROMPT,
            PROMPT[:33] + [4] * 20,
            second_turn,
            PROMPT[:32],  # all of its blocks are cached; its last is computed for its last token
            [2, *PROMPT],
        )
    ]
    results = {}
    for is_on in (True, False):
        config = engine_config(model_dir, enable_prefix_caching=is_on, **limits)
        results[is_on] = generate(runner, config, requests)
    assert [text(outputs) for outputs in results[True]] == [text(out) for out in results[False]]
    assert [skipped(out) for out in results[True]] == [skipped(out) for out in results[False]]
    assert all(cached(outputs) == 0 for outputs in results[False])
    if limits == {"max_num_seqs": 1}:  # one after the other
        found = [cached(outputs) for outputs in results[True]]
        assert found == [0, 32, 32, 32, 80, 16, 0]
    if skip is SKIPPING:
        assert len(set(skipped(results[True][1]))) > 2, "it hardly skips"


def test_what_a_skipping_neighbour_decoded_is_not_read_as_a_prompt(
    runner: TorchModelRunner, model_dir: Path
) -> None:
    always = replace(SKIPPING, threshold=-1.0, warmup_tokens=0)
    neighbour = (PROMPT, replace(PLAIN, skip=always))
    config = engine_config(model_dir, max_num_seqs=1)
    answer = text(generate(runner, config, [neighbour])[0])
    follow_up = (PROMPT + answer, PLAIN)
    alone = generate(runner, config, [follow_up])[0]
    outputs = generate(runner, config, [neighbour, follow_up])[1]
    assert cached(outputs) == 32
    assert text(outputs) == text(alone)


def test_preempted_requests_that_share_a_prefix_get_the_tokens_they_would_have_got(
    runner: TorchModelRunner, model_dir: Path
) -> None:
    requests = [
        ([*PROMPT[: 20 + 4 * i], i], replace(PLAIN, max_tokens=50, skip=skip))
        for i, skip in enumerate([SKIPPING, SkipParams(), SKIPPING, SkipParams(), SKIPPING])
    ]
    off = engine_config(model_dir, enable_prefix_caching=False)
    expected = generate(runner, off, requests)
    tight = engine_config(
        model_dir,
        max_num_batched_tokens=16,
        kv_cache_memory_bytes=8 * BLOCK_BYTES,
        max_model_len=8 * 16,
    )
    outputs = generate(TorchModelRunner(tight), tight, requests)
    assert sum(row[-1].num_preemptions for row in outputs) >= 2
    assert any(cached(row) for row in outputs)
    assert [text(row) for row in outputs] == [text(row) for row in expected]
    assert [skipped(row) for row in outputs] == [skipped(row) for row in expected]
