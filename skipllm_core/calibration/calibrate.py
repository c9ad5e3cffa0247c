"""Calibration: from a model and some prompts, or finished answers, to its skip profile.

1. The full model answers the prompts (greedily). Settings are chosen by three answers of four, and
   measured on the fourth, which is held out.
2. A pass over the former records what the full model looks like from inside (`record`).
3. Each policy's settings for each target ratio (`settings`) are measured by passes over the
   held-out answers: how far the next-token distributions are from the full model's on the same
   text.
4. Where a policy's ratio is not known beforehand, some free generation tells what it is there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from skipllm_core.calibration.answers import Answer, check_answers
from skipllm_core.calibration.ffn_skip import RegionSearch
from skipllm_core.calibration.generate import complete, expected_work, free_shares
from skipllm_core.calibration.measure import Measurement, measure
from skipllm_core.calibration.neurons import neurons_skip
from skipllm_core.calibration.passes import Group, Passes
from skipllm_core.calibration.points import (
    ascending,
    block_point,
    ffn_skip_point,
    neuron_point,
    similarity_curve,
)
from skipllm_core.calibration.record import record
from skipllm_core.calibration.regions import (
    Region,
    candidates,
    find_plateau,
    regions_for,
)
from skipllm_core.calibration.work import OnProgress, Options, Work, no_progress
from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError, InvalidRequestError
from skipllm_core.model.fingerprint import model_fingerprint
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.skip.profile import FfnSkipPoint, NeuronPoint, SkipPoint, SkipProfile
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, resolve_skip
from skipllm_core.types import SkipParams, SkipPolicyName

logger = logging.getLogger(__name__)

TARGET_RATIOS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.50)
HELD_OUT_EVERY = 4  # one answer of four is measured on, and not calibrated with
SEARCH_TOKENS = 350  # behind the warm-up, at least, that settings are tried out on
MANY_REGIONS = 6  # about as many are tried out for a target
SIDE_BY_SIDE = 3  # settings measured in one piece: they share the full model's head
REGION_RATIO = 0.25  # whose region is the profile's own, for thresholds without a ratio
FEW_TOKENS = 300  # held-out ones, by which agreement is known to 2 % or worse
ADAPTIVE: frozenset[SkipPolicyName] = frozenset({"ffn_skip", "neurons"})
BASELINES: tuple[SkipPolicyName, ...] = ("static", "random", "early_exit", "layer_drop")


def calibrate_model(
    config: EngineConfig,
    answers: Sequence[Answer],
    options: Options,
    *,
    journal: Path | None = None,
    on_progress: OnProgress = no_progress,
) -> SkipProfile:
    """Loads the model and calibrates it. Answers that are missing are generated.

    What is done is kept in the file `journal`, for a run that follows an interruption; it is the
    caller's to remove.
    """
    if len(answers) < 2:
        raise ConfigError("calibration needs at least two prompts: one of them is held out")
    fingerprint = model_fingerprint(config.model_dir)
    on_progress("loading the model", 0, 1)
    runner = TorchModelRunner(config)
    header = {
        "fingerprint": fingerprint,
        "dtype": runner.dtype,
        "device": runner.device,
        "options": msgspec.to_builtins(replace(options, policies=())),
        "answers": msgspec.to_builtins(answers),
    }
    work = Work(journal, header, on_progress)
    return calibrate(runner, config, answers, options, fingerprint=fingerprint, work=work)


@torch.inference_mode()
def calibrate(
    runner: TorchModelRunner,
    config: EngineConfig,
    answers: Sequence[Answer],
    options: Options,
    *,
    fingerprint: str,
    work: Work | None = None,
) -> SkipProfile:
    """Raises ConfigError where the prompts do not fit the model, or the answers end so early that
    no token is decoded after the warm-up."""
    if runner.num_layers < 4:
        raise ConfigError(f"a model of {runner.num_layers} layers has no middle region to skip in")
    check_answers(answers, runner.max_model_len, runner.vocab_size)
    work = work or Work()
    work.plan("passes", _expected_passes(answers, options))
    work.plan("free", _expected_free(options))
    work.begin("answers", "generating the full model's answers")
    answers = complete(runner, config, answers, options.max_tokens, work)
    work.end()
    return _Calibration(runner, config, answers, options, work).profile(fingerprint)


def _expected_passes(answers: Sequence[Answer], options: Options) -> float:
    """Tokens that will pass, as long as nothing is known but the number of answers."""
    num_tokens = len(answers) * options.max_tokens
    tries = MANY_REGIONS * ("ffn_skip" in options.policies)
    per_target = (
        tries * min(SEARCH_TOKENS, num_tokens) + len(options.policies) * num_tokens / HELD_OUT_EVERY
    )
    return num_tokens + len(TARGET_RATIOS) * per_target


def _expected_free(options: Options) -> float:
    num_settings = len(ADAPTIVE.intersection(options.policies)) * len(TARGET_RATIOS)
    return expected_work(num_settings)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is kept of a `Recording`; of the scores, the settings for each target ratio."""

    similarities: bytes  # float32
    generated: list[int]
    block_influence: list[float]
    num_tokens: int
    neurons: list[SkipParams]


class _Calibration:
    """Everything behind the answers."""

    def __init__(
        self,
        runner: TorchModelRunner,
        config: EngineConfig,
        answers: Sequence[Answer],
        options: Options,
        work: Work,
    ) -> None:
        self._runner = runner
        self._config = config
        self._options = options
        self._work = work
        self._num_layers = runner.num_layers
        self._calibration = [a for n, a in enumerate(answers) if n % HELD_OUT_EVERY]
        self._held_out = list(answers[::HELD_OUT_EVERY])
        self._check_amounts()
        self._passes = Passes(runner)
        self._groups = self._passes.add(self._calibration)
        self._held_out_groups = self._passes.add(self._held_out)
        self._search_groups = list(self._enough(self._groups))
        self._chosen: dict[tuple[SkipPolicyName, float], SkipParams] = {}

    def profile(self, fingerprint: str) -> SkipProfile:
        work, options = self._work, self._options
        work.begin("passes", "recording what the full model does")
        seen = self._record()
        similarities = torch.frombuffer(bytearray(seen.similarities), dtype=torch.float32)
        similarities = similarities.view(-1, self._num_layers)
        if not similarities.isfinite().all():
            raise ConfigError("the model's values are not finite: it cannot be calibrated")
        means = similarities.mean(dim=0).tolist()
        regions = regions_for(means, options.cold_start, options.cold_end)
        self._plan(regions)

        behind = torch.tensor(seen.generated) >= options.warmup_tokens
        every = -(-seen.num_tokens // len(behind))
        num_tried = -(-sum(group.num_tokens for group in self._search_groups) // every)
        ffn_skip = self._ffn_skip(
            regions, similarities[behind], similarities[:num_tried][behind[:num_tried]]
        )
        own = regions[0] if len(regions) == 1 else find_plateau(means)
        if ffn_skip:
            own = min(ffn_skip, key=lambda p: abs(p.target_ratio - REGION_RATIO)).region
        model = self._runner.model.config
        profile = SkipProfile(
            fingerprint=fingerprint,
            model={
                "model_type": model.model_type,
                "num_layers": model.num_layers,
                "hidden_size": model.hidden_size,
                "intermediate_size": model.intermediate_size,
                "vocab_size": model.vocab_size,
                "dtype": self._runner.dtype,
            },
            cold_start=own[0],
            cold_end=own[1],
            warmup_tokens=options.warmup_tokens,
            num_prompts=len(self._calibration),
            num_tokens=seen.num_tokens,
            ffn_skip=ffn_skip,
            neurons=self._neurons(seen.neurons),
            similarity=similarity_curve(similarities, seen.block_influence),
        )
        points = {policy: self._baseline(policy, profile) for policy in BASELINES}
        work.end()
        profile = self._with_free_shares(msgspec.structs.replace(profile, **points))
        work.finish()
        return profile

    # Amounts -------------------------------------------------------------------------------------

    def _check_amounts(self) -> None:
        """What is too little is said before anything is measured."""
        warmup = self._options.warmup_tokens
        for answers, what in ((self._calibration, "calibration"), (self._held_out, "held-out")):
            num_behind = sum(map(self._num_behind_warmup, answers))
            if not num_behind:
                raise ConfigError(
                    f"all {len(answers)} {what} answers end within the warm-up of {warmup} tokens: "
                    "calibrate with other prompts or fewer --warmup-tokens"
                )
        if num_behind < FEW_TOKENS:
            logger.warning(
                "the held-out answers have %d tokens behind the warm-up: agreement and KL will be "
                "rough, more prompts make them better",
                num_behind,
            )

    def _num_behind_warmup(self, answer: Answer) -> int:
        return max(0, answer.num_decoded_tokens + 1 - max(1, self._options.warmup_tokens))

    def _enough(self, groups: Sequence[Group]) -> Iterator[Group]:
        """The first ones, to try settings out on."""
        warmup = max(1, self._options.warmup_tokens)
        count = 0
        for group in groups:
            if count >= SEARCH_TOKENS:
                break
            count += sum(max(0, seq.num_output_tokens - warmup) for seq in group.seqs)
            yield group

    def _plan(self, regions: Sequence[Region]) -> None:
        """How many tokens are to pass, now that the answers are known."""
        policies = self._options.policies
        tries = sum(
            1 + len(candidates(regions, target, self._num_layers)) for target in TARGET_RATIOS
        )
        tries *= "ffn_skip" in policies
        self._work.plan(
            "passes",
            _num_tokens(self._groups)
            + tries * _num_tokens(self._search_groups)
            + len(policies) * len(TARGET_RATIOS) * _num_tokens(self._held_out_groups),
        )

    # Steps ---------------------------------------------------------------------------------------

    def _record(self) -> _Seen:
        def compute() -> _Seen:
            warmup_tokens = self._options.warmup_tokens
            seen = record(self._passes, self._groups, warmup_tokens, self._work.advance)
            return _Seen(
                seen.similarities.numpy().tobytes(),
                seen.generated.tolist(),
                seen.block_influence,
                seen.num_tokens,
                [neurons_skip(seen.scores, target, warmup_tokens) for target in TARGET_RATIOS],
            )

        return self._work.do("record", _num_tokens(self._groups), compute, _Seen)

    def _measure(self, groups: Sequence[Group], skips: Sequence[SkipParams]) -> list[Measurement]:
        """A few settings at a time, each piece known by what they are."""
        found: list[Measurement] = []
        which = "held out" if groups is self._held_out_groups else "search"
        for first in range(0, len(skips), SIDE_BY_SIDE):
            some = skips[first : first + SIDE_BY_SIDE]
            compute = partial(measure, self._passes, groups, some, self._work.advance)
            amount = len(some) * _num_tokens(groups)
            found += self._work.do(f"{which} {_digest(some)}", amount, compute, list[Measurement])
        return found

    # Policies ------------------------------------------------------------------------------------

    def _ffn_skip(
        self, regions: Sequence[Region], similarities: Tensor, tried: Tensor
    ) -> tuple[FfnSkipPoint, ...]:
        if "ffn_skip" not in self._options.policies:
            return ()
        search = RegionSearch(
            similarities,
            tried,
            self._options.warmup_tokens,
            partial(self._measure, self._search_groups),
        )
        for target in TARGET_RATIOS:
            if found := candidates(regions, target, self._num_layers):
                self._work.say(f"ffn_skip at {target:.0%}: comparing {len(found)} regions")
                self._chosen["ffn_skip", target] = search.cheapest(found, target)
        return ascending(starmap(ffn_skip_point, self._measure_chosen("ffn_skip")))

    def _neurons(self, skips: Sequence[SkipParams]) -> tuple[NeuronPoint, ...]:
        if "neurons" not in self._options.policies:
            return ()
        self._chosen |= {("neurons", t): s for t, s in zip(TARGET_RATIOS, skips, strict=True)}
        return ascending(starmap(neuron_point, self._measure_chosen("neurons")))

    def _measure_chosen(
        self, policy: SkipPolicyName
    ) -> Iterator[tuple[float, SkipParams, Measurement]]:
        self._work.say(f"{policy}: measuring it")
        chosen = {target: skip for (of, target), skip in self._chosen.items() if of == policy}
        measured = self._measure(self._held_out_groups, list(chosen.values()))
        return zip(chosen.keys(), chosen.values(), measured, strict=True)

    def _baseline(self, policy: SkipPolicyName, profile: SkipProfile) -> tuple[SkipPoint, ...]:
        """With the settings that a request for the ratio would have. Exits come as if every answer
        were as long as they are on average."""
        if policy not in self._options.policies:
            return ()
        lengths = [len(answer.answer_ids) for answer in self._calibration]
        budget = round(sum(lengths) / len(lengths)) if policy == "early_exit" else None
        targets: dict[SkipParams, list[float]] = {}
        for target in TARGET_RATIOS:
            wish = SkipOptions(policy=policy, ratio=target, budget_tokens=budget)
            try:
                skip = resolve_skip(SkipDefaults(), profile, wish)
            except InvalidRequestError:  # out of reach
                break
            targets.setdefault(skip, []).append(target)
        self._work.say(f"{policy}: measuring it")
        measured = self._measure(self._held_out_groups, list(targets))
        return ascending(
            block_point(min(found, key=lambda t: abs(t - m.skipped_ffn_share)), m)
            for found, m in zip(targets.values(), measured, strict=True)
        )

    def _with_free_shares(self, profile: SkipProfile) -> SkipProfile:
        """Of the policies whose ratio depends on the text."""
        work = self._work
        work.begin("free", "generating freely with what was chosen")
        skips = {
            f"{policy} {point.target_ratio}": self._chosen[policy, point.target_ratio]
            for policy in ADAPTIVE
            for point in profile.points(policy)
        }
        shares = free_shares(self._runner, self._config, self._held_out, skips, work)
        return msgspec.structs.replace(
            profile,
            **{
                policy: tuple(
                    msgspec.structs.replace(
                        point, free_ffn_share=shares.get(f"{policy} {point.target_ratio}")
                    )
                    for point in profile.points(policy)
                )
                for policy in ADAPTIVE
            },
        )


def _num_tokens(groups: Sequence[Group]) -> int:
    return sum(group.num_tokens for group in groups)


def _digest(skips: Sequence[SkipParams]) -> str:
    return hashlib.sha256(msgspec.json.encode(skips)).hexdigest()[:16]
