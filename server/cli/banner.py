"""What `skipllm serve` says to whoever started it, on stderr: logs have stdout to themselves."""

from __future__ import annotations

import json
from importlib.metadata import version

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from server.settings import Settings
from skipllm_core.skip.resolve import SkipDefaults
from skipllm_core.types import EngineInfo, SkipParams

_EXAMPLE = {
    "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def print_line(text: str) -> None:
    Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)


def print_banner(
    settings: Settings, info: EngineInfo, skip: str, *, url: str, startup_s: float
) -> None:
    """The facts of a server that is ready, boxed on a terminal, and a curl to copy."""
    console = Console(stderr=True, highlight=False)
    title = f"SkipLLM {version('skipllm')} is ready ({startup_s:.1f} s)"
    facts = [
        ("model", f"{settings.model_name}, {_short(info.num_parameters)} parameters"),
        ("device", f"{info.device}, {info.dtype}"),
        (
            "context",
            f"{info.max_model_len} tokens; {info.max_num_seqs} sequences at once; "
            f"a KV cache of {info.num_kv_blocks * info.block_size} tokens",
        ),
        ("skipping", skip),
        ("address", url),
    ]
    if console.is_terminal:
        grid = Table.grid(padding=(0, 2))
        for label, fact in facts:
            grid.add_row(Text(label, style="bold"), Text(fact))
        console.print(Panel(grid, title=title, title_align="left", expand=False))
    else:
        print_line(title)
        for label, fact in facts:
            print_line(f"  {label:<9} {fact}")
    print_line(f"\n{_curl(settings, url)}\n")


def describe_skipping(defaults: SkipDefaults, params: SkipParams) -> str:
    if params.policy == "never":
        return "off"
    wanted = "" if defaults.ratio is None else f"ratio {defaults.ratio:.3g}, "
    full_tokens = f"{params.warmup_tokens} full token{'s' * (params.warmup_tokens != 1)}"
    region = f"in layers {params.cold_start} to {params.cold_end - 1}"
    match params.policy:
        case "static" | "layer_drop":
            how = f"always layers {', '.join(map(str, params.layers)) or 'none'}"
        case "random":
            how = f"probability {params.probability:.3g} {region}"
        case "early_exit":
            how = f"exit after {params.first_exit} layers, falling to {params.cold_start}"
        case _:
            how = f"threshold {params.threshold:.6g} {region}"
    after = f", after {full_tokens}" if params.warmup_tokens else ""
    return f"{params.policy}, {wanted}{how}{after}"


def _curl(settings: Settings, url: str) -> str:
    key = "  -H 'Authorization: Bearer YOUR_KEY' \\\n" if settings.api_key else ""
    return (
        f"curl -N {url}/v1/chat/completions \\\n"
        f"  -H 'Content-Type: application/json' \\\n{key}"
        f"  -d '{json.dumps(_EXAMPLE)}'"
    )


def _short(number: int) -> str:
    """5100000 as 5.1M."""
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return str(number)
