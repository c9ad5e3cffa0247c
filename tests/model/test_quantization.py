"""Weights of 8 bits: one scale per output, and answers that hardly change."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipllm_core import demo
from skipllm_core.config import EngineConfig, Quantization
from skipllm_core.demo.data.prompts import prompts
from skipllm_core.engine.runner import ScheduledSeq
from skipllm_core.errors import ConfigError
from skipllm_core.kernels import cpu
from skipllm_core.model.layers import Linear, Place, quantize
from skipllm_core.model.loader import load_model
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence
from skipllm_core.skip.policy import NeverGate
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SamplingParams
from tests.model.checkpoints import save_checkpoint
from tests.runner.tiny import engine_config, generate, text, write_config

CPU = torch.device("cpu")
EMBEDDED = Path(demo.__file__).parent / "model"
NUM_PROMPTS = 40  # with some 800 tokens of answers


def test_a_weight_is_its_integer_times_the_scale_of_its_output() -> None:
    # The largest magnitude of an output becomes 127, whatever its sign.
    integers, scale = quantize(torch.tensor([[12.7, -6.35, 0.04], [0.0, 0.0, 0.0], [1.0, -2.0, 0]]))
    assert integers.tolist() == [[127, -64, 0], [0, 0, 0], [64, -127, 0]]
    assert scale.tolist() == pytest.approx([0.1, 0.0, 2 / 127])


def test_a_linear_multiplies_rounded_inputs_with_rounded_weights() -> None:
    linear = Linear(2, 1, bias=True, place=Place(torch.float32, CPU, "int8"))
    assert linear.scale is not None
    assert linear.bias is not None
    linear.weight.copy_(torch.tensor([[127, -64]]))
    linear.scale.fill_(0.1)
    linear.bias.fill_(1.0)
    # 2047 is kept, 0.4 rounds to 0: 2047 * 12.7 + 1
    assert linear(torch.tensor([[2047.0, 0.4]])).item() == pytest.approx(2047 * 12.7 + 1)


@pytest.mark.parametrize("name", ["llama3", "llama3_tied", "qwen3_window", "llama_biases"])
def test_every_linear_of_a_checkpoint_is_within_half_a_step_of_what_it_was(
    name: str, tmp_path: Path
) -> None:
    model_dir = save_checkpoint(tmp_path, name)
    full = load_model(model_dir, device=CPU, dtype=torch.float32)
    quantized = load_model(model_dir, device=CPU, dtype=torch.float32, quantization="int8")
    assert quantized.num_parameters == full.num_parameters
    linears = [module for module in quantized.modules() if isinstance(module, Linear)]
    originals = [module for module in full.modules() if isinstance(module, Linear)]
    assert len(linears) == 4 * full.config.num_layers + 1
    for linear, original in zip(linears, originals, strict=True):
        assert linear.weight.dtype == torch.int8
        assert linear.scale is not None
        restored = linear.weight.float() * linear.scale[:, None]
        error = (restored - original.weight).abs()
        assert (error <= linear.scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("name", ["llama3", "llama3_tied"])
def test_linears_take_a_quarter_of_the_memory_and_embeddings_stay(
    name: str, tmp_path: Path
) -> None:
    model_dir = save_checkpoint(tmp_path, name)
    full = load_model(model_dir, device=CPU, dtype=torch.float32)
    quantized = load_model(model_dir, device=CPU, dtype=torch.float32, quantization="int8")
    assert torch.equal(quantized.embedding, full.embedding)
    sizes = [
        sum(p.nbytes for m in model.modules() if isinstance(m, Linear) for p in m.parameters())
        for model in (quantized, full)
    ]
    assert sizes[0] / sizes[1] < 0.25 + 1 / 48  # the scales: one for 48 inputs or more


@torch.inference_mode()
def teacher_forced(runner: TorchModelRunner, prompt: list[int], answer: list[int]) -> Tensor:
    """The choice at every token of the answer, [num_tokens], decoded one by one."""
    seq = Sequence(0, prompt, SamplingParams(max_tokens=200))
    seq.block_table = list(range(-(-(len(prompt) + len(answer)) // runner.block_size)))
    choices = [runner.logits([ScheduledSeq(seq, seq.num_tokens)], NeverGate(len(prompt)))[0]]
    for token_id in answer[:-1]:
        seq.num_computed_tokens = seq.num_tokens
        seq.token_ids.append(token_id)
        choices.append(runner.logits([ScheduledSeq(seq, 1)], NeverGate(1))[0])
    return torch.stack(choices).argmax(dim=-1)


def embedded(quantization: Quantization = "none") -> TorchModelRunner:
    config = EngineConfig(
        model_dir=EMBEDDED, device="cpu", quantization=quantization, kv_cache_memory_bytes=2**26
    )
    return TorchModelRunner(config)


def test_the_embedded_models_choices_agree_in_99_of_100_tokens() -> None:
    tokenizer = HFTokenizer(EMBEDDED)
    full, quantized = embedded(), embedded("int8")
    num_tokens = num_equal = 0
    config = EngineConfig(model_dir=EMBEDDED, device="cpu")
    eos = full.model.config.eos_token_ids
    params = SamplingParams(max_tokens=120, temperature=0, stop_token_ids=tuple(eos))
    for messages in islice(prompts(), NUM_PROMPTS):
        prompt = tokenizer.encode_chat(messages)
        (outputs,) = generate(full, config, [(prompt, params)])
        answer = text(outputs)
        equal = teacher_forced(quantized, prompt, answer) == torch.tensor(answer)
        num_tokens += len(answer)
        num_equal += int(equal.sum())
    assert num_tokens > 500
    assert num_equal / num_tokens >= 0.99, f"{num_equal} of {num_tokens}"


def test_torch_and_the_kernels_agree_on_int8(tmp_path: Path) -> None:
    config = engine_config(write_config(tmp_path), quantization="int8")
    eager = engine_config(tmp_path, quantization="int8", enforce_eager=True)
    requests = [([5, 9, 11, 40], SamplingParams(max_tokens=30, temperature=0))] * 2
    by_kernels = generate(TorchModelRunner(config), config, requests)
    by_torch = generate(TorchModelRunner(eager), eager, requests)
    assert list(map(text, by_kernels)) == list(map(text, by_torch))


def test_fp8_needs_a_cuda_device(tmp_path: Path) -> None:
    config = engine_config(write_config(tmp_path), quantization="fp8")
    with pytest.raises(ConfigError, match="use int8"):
        TorchModelRunner(config)


def test_only_the_cpu_rounds_the_inputs_of_int8_weights() -> None:
    # Elsewhere nothing is multiplied in integers, so nothing is lost for it.
    def rounds_inputs(device: str, quantization: Quantization) -> bool:
        place = Place(torch.bfloat16, torch.device(device), quantization)
        return Linear(2, 1, bias=False, place=place).rounds_inputs

    assert rounds_inputs("cpu", "int8")
    assert not rounds_inputs("meta", "int8")
    assert not rounds_inputs("cpu", "fp8")


def test_an_fp8_weight_is_the_nearest_of_e4m3_times_the_scale_of_its_output() -> None:
    # The largest magnitude becomes 448. By hand, with 3 bits of mantissa: 100 lies between 96 and
    # 104, nearest is 96 at a tie of mantissas 4 and 5 (to even); 3.3 between 3.25 and 3.5.
    weights = torch.tensor([[448.0, 100.0, -3.3], [0.0, 0.0, 0.0], [-1.0, 0.5, 0.0]])
    values, scale = quantize(weights, torch.float8_e4m3fn)
    assert values.float().tolist() == [[448, 96, -3.25], [0, 0, 0], [-448, 224, 0]]
    assert scale.tolist() == pytest.approx([1.0, 0.0, 1 / 448])


@pytest.mark.parametrize("name", ["llama3_tied", "llama_biases"])
def test_in_fp8_every_linear_is_within_a_sixteenth_of_what_it_was(
    name: str, tmp_path: Path
) -> None:
    model_dir = save_checkpoint(tmp_path, name)
    full = load_model(model_dir, device=CPU, dtype=torch.float32)
    quantized = load_model(model_dir, device=CPU, dtype=torch.float32, quantization="fp8")
    for linear, original in zip(quantized.modules(), full.modules(), strict=True):
        if isinstance(linear, Linear) and isinstance(original, Linear):
            assert linear.weight.dtype == torch.float8_e4m3fn
            assert linear.scale is not None
            identity = torch.eye(linear.weight.shape[1])
            bias = 0 if linear.bias is None else linear.bias
            restored = (linear(identity) - bias).T  # through the eager path
            error = (restored - original.weight).abs()
            smallest = linear.scale[:, None] * 2**-10  # half a subnormal step
            assert (error <= (original.weight.abs() / 16).maximum(smallest) * 1.001).all()


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_random_weights_are_quantized_ones(quantization: Quantization, tmp_path: Path) -> None:
    models = [
        load_model(
            write_config(tmp_path),
            device=CPU,
            dtype=torch.float32,
            load_format="dummy",
            quantization=kind,
        )
        for kind in (quantization, "none")
    ]
    found, expected = (
        model.blocks[0].ffn.gate_up(torch.ones(1, model.config.hidden_size)) for model in models
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2)


def test_without_the_kernels_torch_decodes_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = engine_config(write_config(tmp_path))
    requests = [([5, 9, 11, 40], SamplingParams(max_tokens=20, temperature=0))]
    expected = generate(TorchModelRunner(config), config, requests)
    assert not caplog.messages
    monkeypatch.setattr(cpu, "_native", None)
    found = generate(TorchModelRunner(config), config, requests)
    assert list(map(text, found)) == list(map(text, expected))
    (message,) = caplog.messages
    assert "C compiler" in message
