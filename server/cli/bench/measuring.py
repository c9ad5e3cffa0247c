"""`skipllm bench decode` and `prefill` at work: the model, its prompts, progress, what is told.

Loads torch as it is imported, by way of the benchmarks.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from server.cli.calibrate import read_prompts
from server.cli.launch import find_profile
from server.cli.models import find_model
from server.settings import Settings, SettingsError
from skipllm_core.bench.cases import make_cases
from skipllm_core.bench.decode import DecodeBench, step_bytes
from skipllm_core.bench.prefill import bench_prefill
from skipllm_core.bench.prompts import joined_prompts, random_prompts
from skipllm_core.bench.report import (
    decode_remarks,
    decode_table,
    prefill_table,
    print_ceilings,
    print_line,
    print_machine,
    print_model,
    status,
    step_progress,
)
from skipllm_core.bench.setup import Machine, loaded, measure_machine
from skipllm_core.bench.shapes import DEFAULT_SHAPE, write_shape
from skipllm_core.config import EngineConfig
from skipllm_core.demo import MODEL_DIR
from skipllm_core.demo.data.heldout import held_out_set
from skipllm_core.errors import InvalidRequestError
from skipllm_core.model.config import ModelConfig, load_model_config
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.skip.resolve import DEFAULT_SKIP_RATIO, SkipDefaults, resolve_skip
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SkipParams

if TYPE_CHECKING:
    from skipllm_core.bench.compare import TransformersModel


def run_decode(
    settings: Settings,
    shape: str | None,
    *,
    batches: Sequence[int],
    context: int,
    steps: int,
    rounds: int,
    policies: Collection[str],
    forced_skips: Sequence[int] | None,
    has_mixed: bool,
    skip_ratios: Sequence[float] | None,
    neuron_shares: Sequence[float],
    prompts_file: Path | None,
    compare: bool,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Raises ConfigError. A shape, or no model at all, means random weights."""
    with _model(settings, shape) as (name, config):
        model_config = load_model_config(config.model_dir)
        skips = {
            policy: _skips(settings, config, policy, skip_ratios)
            for policy in ("ffn_skip", "neurons")
            if policy in policies
        }
        cases = make_cases(
            model_config.num_layers,
            batches=batches,
            policies=policies,
            forced_skips=forced_skips,
            has_mixed=has_mixed,
            skips=skips.get("ffn_skip", ()),
            neurons=skips.get("neurons", ()),
            neuron_shares=neuron_shares,
            compare=compare,
        )
        prompts = _prompts(settings, config, prompts_file, max(batches), context)
        max_model_len = context + steps + 1
        _check_length(max_model_len, model_config, "--context or --steps")
        num_seqs = sum(case.batch for case in cases if case.engine == "skipllm")
        config = replace(config, max_num_seqs=num_seqs, max_model_len=max_model_len)
        with _begun(config, compare) as (machine, runner, theirs):
            _tell_model(name, runner, settings, config)
            sizes = {n: step_bytes(runner, batch=n, context=context, steps=steps) for n in batches}
            print_ceilings(_out(), sizes, machine.bandwidth.bytes_per_s, runner.device)
            bench = DecodeBench(
                runner, cases, prompts, steps=steps, rounds=rounds, transformers_model=theirs
            )
            with step_progress() as on_progress:
                found = bench.run(machine.bandwidth.bytes_per_s, on_progress)
    _out().print(decode_table(found))
    for remark in decode_remarks(found):
        print_line(_out(), "note", remark)
    setup = _setup(name, settings, machine, runner)
    _write_json(json_file, setup, [asdict(measurement) for measurement in found])
    if plot_file is not None:
        from skipllm_core.bench.plot import plot_speedups

        plot_speedups(
            found,
            plot_file,
            title=f"Decode speed-up of {name} by FFN weights left out",
            subtitle=f"{_computes(settings, runner)}, {machine.device_name}, context {context} to "
            f"{context + steps - 1}",
        )
        print_line(_out(), "wrote", str(plot_file))


def run_prefill(
    settings: Settings,
    shape: str | None,
    *,
    lengths: Sequence[int],
    rounds: int,
    compare: bool,
    json_file: Path | None,
) -> None:
    """Raises ConfigError. A shape, or no model at all, means random weights."""
    with _model(settings, shape) as (name, config):
        model_config = load_model_config(config.model_dir)
        _check_length(max(lengths) + 1, model_config, "--tokens")
        config = replace(config, max_num_seqs=1, max_model_len=max(lengths) + 1)
        with _begun(config, compare) as (machine, runner, theirs):
            _tell_model(name, runner, settings, config)
            with step_progress() as on_progress:
                found = bench_prefill(
                    runner,
                    [
                        random_prompts(1, length, runner.vocab_size, settings.seed)[0]
                        for length in lengths
                    ],
                    rounds=rounds,
                    chunk_tokens=config.max_num_batched_tokens,
                    transformers_model=theirs,
                    on_progress=on_progress,
                )
    _out().print(prefill_table(found))
    setup = _setup(name, settings, machine, runner)
    _write_json(json_file, setup, [asdict(measurement) for measurement in found])


# What is measured --------------------------------------------------------------------------------


@contextmanager
def _model(settings: Settings, shape: str | None) -> Iterator[tuple[str, EngineConfig]]:
    """The model's name for people, and the engine's configuration for it."""
    if shape is None and settings.model is not None:
        yield settings.model, settings.engine_config(find_model(settings))
        return
    shape = shape or DEFAULT_SHAPE
    with tempfile.TemporaryDirectory(prefix="skipllm-shape-") as directory:
        write_shape(shape, Path(directory))
        yield shape, replace(settings.engine_config(Path(directory)), load_format="dummy")


def _check_length(needed: int, model_config: ModelConfig, flags: str) -> None:
    if needed > model_config.max_position_embeddings:
        raise SettingsError(
            f"the measurement needs {needed} positions and the model was made for "
            f"{model_config.max_position_embeddings}: lower {flags}"
        )


def _skips(
    settings: Settings,
    config: EngineConfig,
    policy: Literal["ffn_skip", "neurons"],
    ratios: Sequence[float] | None,
) -> list[tuple[float, SkipParams]]:
    """What the ratios are to the model's profile, without warm-up: all steps are to skip. Without a
    profile, there is still the gate of `ffn_skip` to measure."""
    is_random = config.load_format == "dummy"
    profile = None if is_random else find_profile(settings.skip_profile, config.model_dir)
    if profile is None:
        if ratios is not None or policy == "neurons":
            flag = "--policies neurons" if ratios is None else "--skip-ratio"
            reason = "random weights have no skip profile" if is_random else "there is none"
            raise SettingsError(f"{flag} needs the model's skip profile: {reason}")
        return []
    skips = []
    for ratio in ratios or [min(DEFAULT_SKIP_RATIO, profile.max_ratio(policy))]:
        if ratio == 0 and ratios is not None:
            raise SettingsError("--skip-ratio: 0 is the policy never, which is always measured")
        defaults = SkipDefaults(policy=policy, ratio=ratio or None, warmup_tokens=0)
        try:
            skips.append((ratio, resolve_skip(defaults, profile, None)))
        except InvalidRequestError as error:
            raise SettingsError(f"--skip-ratio: {error}") from None
    return skips


def _prompts(
    settings: Settings,
    config: EngineConfig,
    prompts_file: Path | None,
    num_rows: int,
    num_tokens: int,
) -> list[list[int]]:
    """One per row, of one length. The embedded model has prompts of its own: stories, so that its
    answers are long."""
    if prompts_file is not None:
        found = read_prompts(prompts_file, HFTokenizer(config.model_dir))
        if not found:
            raise SettingsError(f"{prompts_file}: no prompts")
        return joined_prompts(found, num_rows, num_tokens)
    if config.model_dir == MODEL_DIR:
        tokenizer = HFTokenizer(MODEL_DIR)
        stories = held_out_set("stories", num_rows)
        found = [
            tokenizer.encode_chat(list(story.messages), add_generation_prompt=True)
            for story in stories
        ]
        return joined_prompts(found, num_rows, num_tokens)
    vocab_size = load_model_config(config.model_dir).vocab_size
    return random_prompts(num_rows, num_tokens, vocab_size, settings.seed)


@contextmanager
def _begun(
    config: EngineConfig, compare: bool
) -> Iterator[tuple[Machine, TorchModelRunner, TransformersModel | None]]:
    """The machine, measured and told before anything else, and then the models."""
    with status("measuring the read bandwidth"):
        machine = measure_machine(config)
    print_machine(_out(), machine)
    with ExitStack() as stack:
        with status("loading the model"):
            runner, theirs = stack.enter_context(loaded(config, compare=compare))
        yield machine, runner, theirs


# What is told ------------------------------------------------------------------------------------


def _out() -> Console:
    return Console(highlight=False)


def _tell_model(
    name: str, runner: TorchModelRunner, settings: Settings, config: EngineConfig
) -> None:
    print_model(
        _out(),
        name,
        runner.num_parameters,
        _computes(settings, runner),
        is_random=config.load_format == "dummy",
    )


def _computes(settings: Settings, runner: TorchModelRunner) -> str:
    quantization = "" if settings.quantization == "none" else f", {settings.quantization} weights"
    return f"{runner.dtype} on {runner.device}{quantization}"


def _setup(
    name: str, settings: Settings, machine: Machine, runner: TorchModelRunner
) -> dict[str, Any]:
    """What all measurements of a run have in common."""
    return {
        "model": name,
        "num_parameters": runner.num_parameters,
        "num_layers": runner.num_layers,
        "device": runner.device,
        "device_name": machine.device_name,
        "dtype": runner.dtype,
        "quantization": settings.quantization,
        "num_threads": machine.num_threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "read_bandwidth_bytes_per_s": machine.bandwidth.bytes_per_s,
        "read_bandwidth_kind": machine.bandwidth.kind,
        "torch_version": machine.torch_version,
        "skipllm_version": version("skipllm"),
    }


def _write_json(
    path: Path | None, setup: Mapping[str, Any], measurements: Sequence[Mapping[str, Any]]
) -> None:
    if path is None:
        return
    path.write_text("".join(json.dumps({**setup, **found}) + "\n" for found in measurements))
    print_line(_out(), "wrote", str(path))
