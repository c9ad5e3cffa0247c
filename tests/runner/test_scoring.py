"""Log-probabilities of prompts: what transformers' own model says of the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from skipllm_core.runner import prompts
from skipllm_core.runner.gpu_runner import GpuModelRunner
from skipllm_core.runner.graphs import direct
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.types import SamplingParams, SeqOutput, TokenLogprobs
from tests.model.checkpoints import VOCAB_SIZE, make_oracle
from tests.runner.reference_decoder import ReferenceDecoder
from tests.runner.tiny import engine_config, generate, text

PROMPTS = [[(7 * i * i + n) % VOCAB_SIZE for i in range(length)] for n, length in ((1, 90), (2, 9))]
PROMPTS += [[5], [9, 9]]
NUM_TOP = 3


@pytest.fixture(scope="module")
def oracle() -> PreTrainedModel:
    return make_oracle("llama3", num_hidden_layers=4)


@pytest.fixture(scope="module")
def model_dir(oracle: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("oracle")
    oracle.save_pretrained(directory)
    return directory


@torch.inference_mode()
def expected(oracle: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """[len(prompt) - 1, vocab]: of every token behind the first."""
    return oracle(torch.tensor([prompt])).logits[0, :-1].log_softmax(dim=-1)


def told(outputs: list[SeqOutput]) -> list[TokenLogprobs]:
    return [found for output in outputs for found in output.prompt_logprobs]


def scored(
    model_dir: Path, max_tokens: int, runner: TorchModelRunner | None = None, **settings: Any
) -> list[list[SeqOutput]]:
    config = engine_config(model_dir, load_format="auto", **settings)
    params = SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=NUM_TOP)
    requests = [(prompt, params) for prompt in PROMPTS]
    return generate(runner or TorchModelRunner(config), config, requests)


def assert_right(oracle: PreTrainedModel, outputs: list[list[SeqOutput]]) -> None:
    for prompt, out in zip(PROMPTS, outputs, strict=True):
        logprobs = expected(oracle, prompt)
        found = told(out)
        assert len(found) == len(prompt) - 1
        for token_id, row, record in zip(prompt[1:], logprobs, found, strict=True):
            assert record.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
            top = row.topk(NUM_TOP)
            assert list(record.top_logprobs) == pytest.approx(top.values.tolist(), abs=1e-4)
            assert list(record.top_ids) == top.indices.tolist()
            assert record.rank == int((row > row[token_id]).sum()) + 1


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("num_batched", [2048, 24, 8])  # pieces of 24 are the CPU kernels' own
@pytest.mark.parametrize("slice_logits", [2**23, 7 * VOCAB_SIZE])
def test_a_prompts_log_probabilities_are_transformers_own(
    oracle: PreTrainedModel,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    enforce_eager: bool,
    num_batched: int,
    slice_logits: int,
) -> None:
    monkeypatch.setattr(prompts, "SLICE_LOGITS", slice_logits)
    limits = {"enforce_eager": enforce_eager, "max_num_batched_tokens": num_batched}
    assert_right(oracle, scored(model_dir, 0, **limits))


def test_on_a_devices_runner_too(oracle: PreTrainedModel, model_dir: Path) -> None:
    config = engine_config(model_dir, load_format="auto", enforce_eager=True)
    runner = GpuModelRunner(config, ReferenceDecoder, lambda: direct)
    outputs = scored(model_dir, 4, runner, max_num_batched_tokens=24)
    assert_right(oracle, outputs)
    assert all(len(text(out)) == 4 for out in outputs)


def test_scoring_changes_nothing_of_the_answer(model_dir: Path) -> None:
    config = engine_config(model_dir, load_format="auto")
    params = SamplingParams(max_tokens=12, temperature=0)
    plain = generate(TorchModelRunner(config), config, [(prompt, params) for prompt in PROMPTS])
    assert list(map(text, scored(model_dir, 12))) == list(map(text, plain))


def test_logits_of_a_slice_exist_at_once_and_no_more(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "SLICE_LOGITS", 7 * VOCAB_SIZE)
    config = engine_config(model_dir, load_format="auto")
    runner = TorchModelRunner(config)
    num_rows = []
    head = runner.model.head

    def counting(h: torch.Tensor) -> torch.Tensor:
        num_rows.append(h.shape[0])
        return head(h)

    monkeypatch.setattr(runner.model, "head", counting)
    scored(model_dir, 0, runner)
    assert sum(num_rows) == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert max(num_rows) == 7


def test_a_prompt_whose_logits_are_not_finite_ends_alone(model_dir: Path) -> None:
    config = engine_config(model_dir, load_format="auto", enforce_eager=True)
    runner = TorchModelRunner(config)
    with torch.inference_mode():
        runner.model.embedding.data[8] = float("nan")
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    broken, whole = generate(runner, config, [([5, 8, 7], params), ([5, 6, 7], params)])
    assert (broken[-1].finish_reason, broken[-1].error) == (
        "error",
        "the model's output was not finite",
    )
    assert broken[-1].prompt_logprobs == ()
    assert whole[-1].finish_reason == "length"
    assert len(told(whole)) == 2


def test_a_request_takes_no_more_than_it_asks_for_beside_others(model_dir: Path) -> None:
    config = engine_config(model_dir, load_format="auto")
    requests = [
        (PROMPTS[1], SamplingParams(max_tokens=0, prompt_logprobs=count)) for count in (None, 0, 2)
    ]
    outputs = generate(TorchModelRunner(config), config, requests)
    assert told(outputs[0]) == []
    assert {found.top_ids for found in told(outputs[1])} == {()}
    assert {len(found.top_ids) for found in told(outputs[2])} == {2}
