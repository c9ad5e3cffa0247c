"""`skipllm bench gpu`: everything about the decode step's kernels in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from server.cli.bench.flags import Peer, check_surroundings, names, numbers
from server.cli.options import told_in_one_line
from skipllm_core.bench.shapes import SHAPE_NAMES
from skipllm_core.config import Quantization

_QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


def gpu(
    *,
    shapes: Annotated[
        str, typer.Option(metavar="NAME,..", help=f"Of {', '.join(SHAPE_NAMES)}.")
    ] = "llama-2-7b,llama-3.1-8b,llama-3.2-1b",
    batch: Annotated[
        str, typer.Option(metavar="INT,..", help="How many rows are decoded together.")
    ] = "1,2,4,8,16,32,64",
    context: Annotated[
        str, typer.Option(metavar="INT,..", help="Tokens in the cache before the step.")
    ] = "512,4096",
    forced_skip: Annotated[
        str,
        typer.Option(metavar="INT,..", help="How many FFN blocks every row is made to skip."),
    ] = "0,4,8,10,16,20",
    quantization: Annotated[
        str, typer.Option(metavar="NAME,..", help=f"Weights: {', '.join(_QUANTIZATIONS)}.")
    ] = "none,int8",
    budget: Annotated[
        int,
        typer.Option(
            metavar="SECONDS", min=1, help="No new case is begun after so long; it is told which."
        ),
    ] = 440,
    compare: Annotated[
        Peer | None,
        typer.Option(
            metavar="transformers",
            help="Measure its generate too, at the first batch and context of each shape: eager, "
            "and with a static cache, which it compiles.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write one JSON object a line per row."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw step time against forced skips with the fit, and speed-up against skip "
            "ratio, as PNG.",
        ),
    ] = None,
) -> None:
    """Measure the decode step's kernels on a CUDA device, with random weights in bfloat16."""
    with told_in_one_line():
        shape_names = names("--shapes", shapes, SHAPE_NAMES)
        batches = numbers("--batch", batch, int, least=1)
        contexts = numbers("--context", context, int, least=1)
        skips = numbers("--forced-skip", forced_skip, int)
        kinds = names("--quantization", quantization, _QUANTIZATIONS)
        check_surroundings(compare, plot, json_file)

        from skipllm_core.bench.gpu.plan import Plan
        from skipllm_core.bench.gpu.report import run_plan

        plan = Plan(
            shapes=shape_names,
            batches=batches,
            contexts=contexts,
            forced_skips=skips,
            quantizations=[kind for kind in _QUANTIZATIONS if kind in kinds],
            compare=compare is not None,
            budget_s=budget,
        )
        run_plan(plan, json_file, plot)
