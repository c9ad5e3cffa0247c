"""What is measured of passes, against torch's own functions and transformers' hidden states."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from skipllm_core.calibration import measure as measuring
from skipllm_core.calibration import record as recording
from skipllm_core.calibration.measure import measure
from skipllm_core.calibration.passes import Group, Passes
from skipllm_core.calibration.record import record
from skipllm_core.model.llama import Block
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.runner.neurons import feed_forward_neurons
from skipllm_core.types import SkipParams
from tests.calibration.test_passes import answers
from tests.model.checkpoints import make_oracle
from tests.runner.tiny import engine_config

NUM_LAYERS = 6
TEXTS = answers((5, 30), (40, 21), (1, 1), (17, 9))
ADAPTIVE = SkipParams(policy="ffn_skip", threshold=0.9, warmup_tokens=3, cold_start=1, cold_end=5)
NEURONS = SkipParams(
    policy="neurons",
    up_thresholds=(0.1,) * NUM_LAYERS,
    down_thresholds=(0.1,) * NUM_LAYERS,
    warmup_tokens=3,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("oracle")
    make_oracle("llama3", num_hidden_layers=NUM_LAYERS).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def runner(model_dir: Path) -> TorchModelRunner:
    return TorchModelRunner(engine_config(model_dir, load_format="auto"))


@pytest.fixture
def passes(runner: TorchModelRunner) -> Passes:
    return Passes(runner)


@torch.inference_mode()
@pytest.mark.parametrize("slice_logits", [1, 2**25])
def test_distributions_are_compared_over_all_tokens(
    passes: Passes, slice_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = passes.add(TEXTS[:2]) + passes.add(TEXTS[2:])
    expected = []
    for skip in (ADAPTIVE, NEURONS):
        logits, full, targets = [], [], []
        for group in groups:
            found = passes.under(group, skip)
            logits.append(passes.model.head(found.h).double())
            full.append(passes.model.head(passes.in_full(group)[found.places]).double())
            targets.append(group.targets[found.places])
        q, p, text = torch.cat(logits), torch.cat(full), torch.cat(targets)
        expected.append((
            float(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True,
                           reduction="batchmean")),
            float((q.argmax(-1) == p.argmax(-1)).float().mean()),
            float(torch.exp(F.cross_entropy(q, text) - F.cross_entropy(p, text))) - 1,
        ))  # fmt: skip
    monkeypatch.setattr(measuring, "SLICE_LOGITS", slice_logits)
    heard: list[int] = []
    found = measure(passes, groups, [ADAPTIVE, NEURONS], heard.append)
    for one, (kl, agreement, change) in zip(found, expected, strict=True):
        assert one.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert one.top1_agreement == pytest.approx(agreement)
        assert one.perplexity_change == pytest.approx(change, rel=1e-3)
        assert one.num_tokens == sum(heard) // 2 == 27 + 18 + 6


@torch.inference_mode()
def test_never_skipping_agrees_with_itself(passes: Passes) -> None:
    never = SkipParams(policy="ffn_skip", threshold=2.0, cold_end=NUM_LAYERS, warmup_tokens=0)
    (found,) = measure(passes, passes.add(TEXTS), [never])
    assert found.skipped_ffn_share == 0
    assert found.top1_agreement == 1
    assert found.kl == pytest.approx(0, abs=1e-5)
    assert found.perplexity_change == pytest.approx(0, abs=1e-5)
    assert set(found.weight_skip_ratio.values()) == {0.0}


@torch.inference_mode()
def test_reads_are_avoided_where_all_rows_of_a_batch_skip(passes: Passes) -> None:
    groups = passes.add(TEXTS)
    found, neurons = measure(passes, groups, [ADAPTIVE, NEURONS])
    rows = [
        passed.gate.skipped_layers[row]
        for group in groups
        for passed in [passes.under(group, ADAPTIVE)]
        for row in passed.rows
    ]
    shares = [sum(layer in row for row in rows) / len(rows) for layer in range(NUM_LAYERS)]
    assert 0 < sum(shares) < NUM_LAYERS
    assert found.skipped_ffn_share == pytest.approx(sum(shares) / NUM_LAYERS)
    for batch, ratio in found.weight_skip_ratio.items():
        assert ratio == pytest.approx(sum(p**batch for p in shares) / NUM_LAYERS)
    triggers = [sum(row[:1] == [layer + 1] for row in rows) for layer in range(NUM_LAYERS)]
    assert found.trigger_layers == triggers

    without: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in range(NUM_LAYERS)}
    for group in groups:
        passes.under(group, NEURONS, lambda layer, *masks: without[layer].append(masks))
    expected = dict.fromkeys(found.weight_skip_ratio, 0.0)
    for masks in without.values():
        of_neurons = [torch.cat(some).double().mean(dim=0) for some in zip(*masks, strict=True)]
        for batch in expected:
            # Rows of gate are always read, those of up and down where one of the batch wants them.
            read = 1 - torch.stack([torch.zeros_like(of_neurons[0]), *of_neurons]) ** batch
            expected[batch] += float(1 - read.mean()) / NUM_LAYERS
    assert neurons.weight_skip_ratio == pytest.approx(expected)
    assert neurons.weight_skip_ratio[1] == pytest.approx(neurons.skipped_ffn_share)
    assert 0.05 < neurons.skipped_ffn_share < 0.6


# Recording ---------------------------------------------------------------------------------------


@torch.inference_mode()
def test_similarities_and_influences_are_those_of_transformers_hidden_states(
    passes: Passes, model_dir: Path
) -> None:
    oracle = make_oracle("llama3", num_hidden_layers=NUM_LAYERS)
    answer = TEXTS[1]
    seen = record(passes, passes.add([answer]), warmup_tokens=0)
    attended: list[Tensor] = []
    for layer in oracle.model.layers:  # what the FFN's norm gets is the residual before the FFN
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args: attended.append(args[0])
        )
    text = torch.tensor([answer.prompt_ids + answer.answer_ids])
    # hidden_states[l] is what goes into layer l; the last one is normed, so it is left out.
    states = oracle(text, output_hidden_states=True).hidden_states
    decoded = slice(len(answer.prompt_ids), text.shape[1] - 1)
    assert seen.generated.tolist() == list(range(1, 21))
    for layer in range(NUM_LAYERS - 1):
        before, after = states[layer][0, decoded], states[layer + 1][0, decoded]
        cosines = torch.cosine_similarity(attended[layer][0, decoded], after, dim=-1)
        assert torch.allclose(seen.similarities[:, layer], cosines, atol=1e-5)
        influence = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
        assert seen.block_influence[layer] == pytest.approx(float(influence), abs=1e-5)


@torch.inference_mode()
def test_many_tokens_are_thinned_out_and_all_of_them_counted(
    passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = passes.add(TEXTS[:2]) + passes.add(TEXTS[2:])
    every = record(passes, groups, 3)
    monkeypatch.setattr(recording, "MAX_RECORDED_TOKENS", 25)  # of 57
    third = record(passes, groups, 3)
    assert third.num_tokens == every.num_tokens == 57
    assert third.block_influence == every.block_influence
    assert torch.equal(third.similarities, every.similarities[::3])
    assert torch.equal(third.generated, every.generated[::3])


@torch.inference_mode()
def test_scores_are_those_by_which_neurons_are_left_out(passes: Passes) -> None:
    """Of tokens behind the warm-up, and only of those."""
    groups: list[Group] = passes.add(TEXTS)
    seen = record(passes, groups, warmup_tokens=20)
    behind = torch.tensor([n >= 20 for a in TEXTS for n in range(1, len(a.answer_ids))])
    assert 0 < behind.sum() < len(behind)

    def compare(layer: int, block: Block, h: Tensor, attended: Tensor, after: Tensor) -> None:
        up, down = (float(scores.quantile(0.4)) for scores in seen.scores[layer])
        _, counts = feed_forward_neurons(block, attended[behind], [(up, 0.0)] * int(behind.sum()))
        share = sum(counts.before_up) / (len(counts.before_up) * block.ffn.down_norms.numel())
        assert share == pytest.approx(0.4, abs=0.02)
        _, counts = feed_forward_neurons(block, attended[behind], [(0.0, down)] * int(behind.sum()))
        share = sum(counts.before_down) / (len(counts.before_up) * block.ffn.down_norms.numel())
        assert share == pytest.approx(0.4, abs=0.02)

    passes.in_full(groups[0], compare)
    assert not math.isnan(float(seen.scores[0].sum()))
