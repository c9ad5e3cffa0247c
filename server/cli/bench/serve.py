"""The command `skipllm bench serve`: its flags, and how it ends."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from server.cli.bench.fields import json_object, response_format
from server.cli.options import told_in_one_line
from server.settings import SettingsError
from skipllm_core.errors import ConfigError

DEFAULT_CONCURRENCY = 8
INTERRUPTED = 130  # the exit code of what ends by Ctrl-C


def serve(
    *,
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="Any server that speaks OpenAI's API.")
    ] = "http://127.0.0.1:8000",
    endpoint: Annotated[
        Literal["/v1/completions", "/v1/chat/completions"],
        typer.Option(metavar="PATH", help="/v1/completions or /v1/chat/completions."),
    ] = "/v1/completions",
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="By default, the first one that the server names."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="By default, what OPENAI_API_KEY says."),
    ] = None,
    num_prompts: Annotated[
        int, typer.Option(metavar="INT", min=1, help="Requests to measure.", rich_help_panel="Load")
    ] = 100,
    request_rate: Annotated[
        float | None,
        typer.Option(
            metavar="FLOAT",
            help="Requests per second, sent at random times (Poisson) whatever the server does: an "
            "open loop.",
            rich_help_panel="Load",
        ),
    ] = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            metavar="INT",
            min=1,
            help="Requests under way at all times: a closed loop. Default without a rate: "
            f"{DEFAULT_CONCURRENCY}.",
            rich_help_panel="Load",
        ),
    ] = None,
    num_warmups: Annotated[
        int,
        typer.Option(
            metavar="INT",
            min=0,
            help="Requests that are sent first, together, and not measured.",
            rich_help_panel="Load",
        ),
    ] = 1,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            help="After which a request counts as failed.",
            rich_help_panel="Load",
        ),
    ] = 600.0,
    input_len: Annotated[
        int,
        typer.Option(
            "--input-len",
            "--random-input-len",
            metavar="INT",
            min=1,
            help="Tokens of random prompts (words, in chats and where a server has no /tokenize).",
            rich_help_panel="Requests",
        ),
    ] = 128,
    output_len: Annotated[
        int,
        typer.Option(
            "--output-len",
            "--random-output-len",
            metavar="INT",
            min=1,
            help="Tokens to generate at most; exactly, with --ignore-eos.",
            rich_help_panel="Requests",
        ),
    ] = 64,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Prompts instead of random ones, one JSON object per line: {"messages": ...} or '
            '{"prompt": ...}; repeated if they are too few.',
            rich_help_panel="Requests",
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos",
            help="Generate on after the end-of-sequence token (no parameter of OpenAI's).",
            rich_help_panel="Requests",
        ),
    ] = False,
    temperature: Annotated[
        float, typer.Option(metavar="FLOAT", min=0, help="0: greedy.", rich_help_panel="Requests")
    ] = 0.0,
    extra_body: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help='More fields of every request, as \'{"skip": {"ratio": 0.25}}\'.',
            rich_help_panel="Requests",
        ),
    ] = "{}",
    structured: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|builtin",
            help="Have every answer follow a JSON Schema: a file's, or one without an end, so that "
            "answers are as long as without it.",
            rich_help_panel="Requests",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="INT", help="Of random prompts and times.", rich_help_panel="Requests"
        ),
    ] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MS",
            help="A bound that good requests keep, as ttft:200, tpot:50 or e2el:3000; several: "
            "repeat it, or separate by commas.",
            rich_help_panel="Results",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Also write them here, as one object.",
            rich_help_panel="Results",
        ),
    ] = None,
) -> None:
    """Measure a running server as its clients see it.

    TTFT, ITL, TPOT and whole requests, throughput, goodput and errors; from a SkipLLM server also
    what was skipped. Latencies count from when a request was to be sent.
    """
    with told_in_one_line():
        if not base_url.startswith(("http://", "https://")):
            raise SettingsError(f"--base-url: must begin with http://, but got {base_url!r}")
        if request_rate is not None and math.isinf(request_rate):
            request_rate = None  # what load generators call "no pause between requests"
        if request_rate is not None and not request_rate > 0:
            raise SettingsError(f"--request-rate: must be greater than 0, but got {request_rate:g}")
        if request_rate is not None and max_concurrency is not None:
            raise SettingsError("give --request-rate or --max-concurrency, not both")
        if json_file is not None and not json_file.parent.is_dir():  # better told now than later
            raise SettingsError(f"cannot write {json_file}: {json_file.parent} is not a directory")
        slos_ms = parse_goodput(goodput or [])
        fields = json_object("--extra-body", extra_body) | response_format(structured)

        try:
            from server.cli.bench.serving import Benchmark, run_benchmark
        except ModuleNotFoundError as error:
            if error.name != "aiohttp":
                raise
            raise ConfigError("this needs aiohttp: pip install 'skipllm[bench]'") from None

        result = run_benchmark(
            Benchmark(
                base_url=base_url,
                endpoint=endpoint,
                model=model,
                num_prompts=num_prompts,
                request_rate=request_rate,
                max_concurrency=max_concurrency or DEFAULT_CONCURRENCY,
                input_len=input_len,
                output_len=output_len,
                prompts=prompts,
                ignore_eos=ignore_eos,
                temperature=temperature,
                extra_body=fields,
                slos_ms=slos_ms,
                seed=seed,
                num_warmups=num_warmups,
                timeout_s=timeout,
                api_key=api_key or os.environ.get("OPENAI_API_KEY"),
            ),
            json_file,
        )
    if result["is_interrupted"]:
        raise typer.Exit(INTERRUPTED)
    if not result["num_ok"]:
        raise typer.Exit(1)


def parse_goodput(texts: list[str]) -> dict[str, float]:
    """["ttft:200,tpot:50"] as {"ttft": 200.0, "tpot": 50.0}. Raises SettingsError."""
    slos_ms = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, _, bound = text.partition(":")
        try:
            slos_ms[name] = float(bound)
        except ValueError:
            slos_ms[name] = math.nan
        if name not in ("ttft", "tpot", "e2el") or not slos_ms[name] > 0:
            raise SettingsError(
                f"--goodput: must be ttft, tpot or e2el with milliseconds, as ttft:200, but got "
                f"{text!r}"
            )
    return slos_ms
