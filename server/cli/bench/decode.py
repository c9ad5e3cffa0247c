"""`skipllm bench decode` and `prefill`: their flags, checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.bench.flags import Peer, check_surroundings, names, numbers
from server.cli.options import takes_settings, told_in_one_line
from server.settings import EMBEDDED_MODEL_NAME, Settings, SettingsError
from server.settings_sources import load_settings
from skipllm_core.bench.cases import MAX_NEURON_SHARE
from skipllm_core.bench.shapes import DEFAULT_SHAPE, SHAPE_NAMES
from skipllm_core.skip.resolve import DEFAULT_SKIP_RATIO

_ENGINE = ("load_format", "dtype", "device", "quantization", "num_threads", "seed")
_POLICIES = ("never", "ffn_skip", "forced")  # by default
_WITH_NEURONS = (*_POLICIES, "neurons")


_Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"A local directory, a GGUF file, a Hugging Face id, or {EMBEDDED_MODEL_NAME}. "
        "Without it, a shape with random weights is measured.",
    ),
]
_Shape = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Where no MODEL is named: {', '.join(SHAPE_NAMES)}. Default: {DEFAULT_SHAPE}.",
    ),
]
_Compare = Annotated[
    Peer | None,
    typer.Option(
        metavar="transformers",
        help="Let it take turns with the engine, on the same weights and as many threads.",
    ),
]
_Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write one JSON object a line per measurement."),
]


@takes_settings((*_ENGINE, "skip_profile"))
def decode(
    model: _Model = None,
    *,
    shape: _Shape = None,
    batch: Annotated[
        str, typer.Option(metavar="INT,..", help="How many rows are decoded together.")
    ] = "1,8",
    context: Annotated[
        int, typer.Option(metavar="INT", min=1, help="Tokens in the cache before the first step.")
    ] = 128,
    steps: Annotated[
        int, typer.Option(metavar="INT", min=1, help="Steps of a case in each round.")
    ] = 64,
    rounds: Annotated[
        int, typer.Option(metavar="INT", min=1, help="How often the cases take their turns.")
    ] = 3,
    policies: Annotated[
        str,
        typer.Option(
            metavar="NAME,..",
            help="What to measure; never always is. ffn_skip: the adaptive gate, alone and with "
            "--skip-ratio. neurons: with --skip-ratio, too. forced: see --forced-skip.",
        ),
    ] = ",".join(_POLICIES),
    forced_skip: Annotated[
        str | None,
        typer.Option(
            metavar="INT,..",
            help="How many FFN blocks every row is made to skip, as random weights can be measured "
            "too. Default: 10, 25 and 40 % of them.",
        ),
    ] = None,
    neuron_share: Annotated[
        str | None,
        typer.Option(
            metavar="FLOAT,..",
            help="Shares of the FFN weights to leave out neuron by neuron, as random weights can "
            "be measured too: each row by itself, and several rows together. The thresholds are "
            "quantiles of the model's own scores.",
        ),
    ] = None,
    mixed_triggers: Annotated[
        bool,
        typer.Option(
            "--mixed-triggers",
            help="Measure rows that skip from different layers on, too: none to half of them.",
        ),
    ] = False,
    skip_ratio: Annotated[
        str | None,
        typer.Option(
            metavar="FLOAT,..",
            help="Shares of the FFN weights to leave out, where the model has a skip profile. "
            f"Default: {DEFAULT_SKIP_RATIO}, or as much as the profile reaches.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to fill the context with, as for `skipllm calibrate`. Default: random "
            "tokens, in which a model skips otherwise than in text.",
        ),
    ] = None,
    compare: _Compare = None,
    json_file: _Json = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw speed-up against the share left out, as PNG."),
    ] = None,
    **flags: Any,
) -> None:
    """Measure decode steps of the engine, against the memory bandwidth that bounds them."""
    with told_in_one_line():
        settings = _settings(model, shape, flags)
        batches = numbers("--batch", batch, int, least=1)
        wanted = names("--policies", policies, _WITH_NEURONS)
        forced = None if forced_skip is None else numbers("--forced-skip", forced_skip, int)
        ratios = None if skip_ratio is None else numbers("--skip-ratio", skip_ratio, float)
        shares = [] if neuron_share is None else numbers("--neuron-share", neuron_share, float)
        if not all(0 < share <= MAX_NEURON_SHARE for share in shares):
            raise SettingsError(f"--neuron-share: must be above 0, and {MAX_NEURON_SHARE} at most")
        check_surroundings(compare, plot, json_file)
        _settle_openmp(settings.num_threads)

        from server.cli.bench.measuring import run_decode

        run_decode(
            settings,
            shape,
            batches=batches,
            context=context,
            steps=steps,
            rounds=rounds,
            policies=wanted,
            forced_skips=forced,
            has_mixed=mixed_triggers,
            skip_ratios=ratios,
            neuron_shares=shares,
            prompts_file=prompts,
            compare=compare is not None,
            json_file=json_file,
            plot_file=plot,
        )


@takes_settings((*_ENGINE, "max_num_batched_tokens"))
def prefill(
    model: _Model = None,
    *,
    shape: _Shape = None,
    tokens: Annotated[
        str, typer.Option(metavar="INT,..", help="Lengths of the prompts, one after another.")
    ] = "512",
    rounds: Annotated[
        int, typer.Option(metavar="INT", min=1, help="How often each prompt is computed.")
    ] = 5,
    compare: _Compare = None,
    json_file: _Json = None,
    **flags: Any,
) -> None:
    """Measure how long the engine takes over a prompt, up to the first token of the answer."""
    with told_in_one_line():
        settings = _settings(model, shape, flags)
        lengths = numbers("--tokens", tokens, int, least=1)
        check_surroundings(compare, None, json_file)
        _settle_openmp(settings.num_threads)

        from server.cli.bench.measuring import run_prefill

        run_prefill(
            settings,
            shape,
            lengths=lengths,
            rounds=rounds,
            compare=compare is not None,
            json_file=json_file,
        )


def _settings(model: str | None, shape: str | None, flags: dict[str, Any]) -> Settings:
    if shape is not None and shape not in SHAPE_NAMES:
        raise SettingsError(f"--shape: must be one of {', '.join(SHAPE_NAMES)}, but got {shape!r}")
    if shape is not None and model is not None:
        raise SettingsError("give a MODEL or --shape, not both")
    return load_settings({**flags, "model": model}, os.environ)


def _settle_openmp(num_threads: int | None) -> None:
    """The worker's OpenMP settings, which have to stand before torch is loaded: so the numbers
    are those of a server."""
    from skipllm_core.client.worker_handle import openmp_environment

    os.environ.update(openmp_environment(num_threads))
