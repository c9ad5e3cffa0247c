"""Answers by the engine, many at a time: the full model's, and those of settings that are kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from skipllm_core.calibration.answers import Answer, cut
from skipllm_core.calibration.regions import DIGITS
from skipllm_core.calibration.work import GENERATED_TOKEN, Work
from skipllm_core.config import EngineConfig
from skipllm_core.engine.engine import Engine
from skipllm_core.errors import ConfigError
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.types import SamplingParams, SkipParams, SkipUsage

FREE_PROMPTS = 4
FREE_TOKENS = 48  # of each, behind the warm-up

Request = tuple[list[int], SamplingParams]
Name = TypeVar("Name", bound=Hashable)


def complete(
    runner: TorchModelRunner,
    config: EngineConfig,
    answers: Sequence[Answer],
    max_tokens: int,
    work: Work,
) -> list[Answer]:
    """The answers, those that are missing by the full model. Kept one by one as they end."""
    found = [cut(answer, max_tokens, runner.max_model_len) for answer in answers]
    requests: dict[int, Request] = {}
    for number, answer in enumerate(found):
        if answer.answer_ids:
            continue
        if (known := work.known(f"answer {number}", list[int])) is not None:
            found[number] = replace(answer, answer_ids=known)
        else:
            params = _greedy(runner, max_tokens)
            requests[number] = answer.prompt_ids, params
    work.plan("answers", GENERATED_TOKEN * max_tokens * len(requests))
    for number, token_ids, _ in _generate(runner, config, requests, work):
        work.keep(f"answer {number}", token_ids)
        found[number] = replace(found[number], answer_ids=token_ids)
    return found


def free_shares(
    runner: TorchModelRunner,
    config: EngineConfig,
    answers: Sequence[Answer],
    skips: Mapping[str, SkipParams],
    work: Work,
) -> dict[str, float]:
    """By name, the share of FFN weights that settings leave out where they read their own text. All
    of them go on, in one batch, from where the warm-up of some answers ends; none where no answer
    is that long."""
    results: dict[tuple[str, int], tuple[int, int]] = {}  # rows left out, and all rows
    requests: dict[tuple[str, int], Request] = {}
    for name, skip in skips.items():
        # Its last token is computed in full, as the engine does with a prompt's.
        num_given = max(1, skip.warmup_tokens) - 1
        long = [n for n, a in enumerate(answers) if a.num_decoded_tokens > num_given]
        for number in long[:FREE_PROMPTS]:
            answer = answers[number]
            prompt_ids = answer.prompt_ids + answer.answer_ids[:num_given]
            params = _greedy(runner, FREE_TOKENS, replace(skip, warmup_tokens=0))
            known = work.known(f"free {name} {number}", tuple[int, int])
            if known is None:
                requests[name, number] = prompt_ids, params
            else:
                results[name, number] = known
    work.plan("free", GENERATED_TOKEN * FREE_TOKENS * len(requests))
    for (name, number), _, usage in _generate(runner, config, requests, work):
        rows = results[name, number] = usage.skipped_ffn_rows, usage.total_ffn_rows
        work.keep(f"free {name} {number}", rows)
    shares = {}
    for name in skips:
        of_name = [rows for (of, _), rows in results.items() if of == name]
        if total := sum(all_rows for _, all_rows in of_name):
            shares[name] = round(sum(skipped for skipped, _ in of_name) / total, DIGITS)
    return shares


def expected_work(num_settings: int) -> float:
    """Of `free_shares`."""
    return GENERATED_TOKEN * FREE_TOKENS * FREE_PROMPTS * num_settings


def _generate(
    runner: TorchModelRunner, config: EngineConfig, requests: Mapping[Name, Request], work: Work
) -> Iterator[tuple[Name, list[int], SkipUsage]]:
    """(name, token ids, what was skipped) of each request, as they end. Raises ConfigError where
    the model's values are not finite."""
    if not requests:
        return
    engine = Engine(runner, config, runner.max_model_len)
    names = list(requests)
    token_ids: list[list[int]] = [[] for _ in names]
    for number, (prompt_ids, params) in enumerate(requests.values()):
        engine.add(number, prompt_ids, params)
    while engine.has_work:
        step = engine.step()
        assert step is not None, "no request has a grammar"
        for output in step.outputs:
            if output.finish_reason == "error":
                raise ConfigError(f"the model cannot be calibrated: {output.error}")
            token_ids[output.seq_id] += output.token_ids
            if output.finish_reason is not None:
                assert output.skip_usage is not None
                yield names[output.seq_id], token_ids[output.seq_id], output.skip_usage
        work.advance(GENERATED_TOKEN * sum(len(output.token_ids) for output in step.outputs))


def _greedy(
    runner: TorchModelRunner, max_tokens: int, skip: SkipParams | None = None
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        stop_token_ids=tuple(runner.model.config.eos_token_ids),
        skip=skip or SkipParams(),
    )
