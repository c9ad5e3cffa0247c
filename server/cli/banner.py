"""What `skipllm serve` says to whoever started it, on stderr: logs have stdout to themselves."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from importlib.metadata import version

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from server.settings import Settings
from skipllm_core.skip.amounts import SkipChoice
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import AUTO_POLICIES, SkipDefaults, choose_skip, resolve_skip
from skipllm_core.types import EngineInfo, SkipParams, SkipPolicyName

_EXAMPLE = {
    "messages": [{"role": "user", "content": "Tell me a story about a fox."}],
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def print_line(text: str) -> None:
    Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)


def print_banner(
    settings: Settings, info: EngineInfo, skipping: Sequence[str], *, url: str, startup_s: float
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
        *zip(("skipping", *[""] * len(skipping)), skipping, strict=False),
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


def describe_skipping(
    defaults: SkipDefaults, profile: SkipProfile | None, runnable: Collection[SkipPolicyName]
) -> list[str]:
    """What a request gets that wishes nothing; of a ratio of a measured policy also what it costs,
    and why `auto` chose it. Raises InvalidRequestError where the engine cannot do it."""
    choice = choose_skip(defaults, profile, None, runnable)
    if choice.policy == "never":
        return ["off"]
    assert profile is not None, "nothing else was chosen without one"
    params = resolve_skip(defaults, profile, None, runnable)
    wanted = "" if choice.threshold is not None else f"ratio {choice.ratio:.3g}, "
    full_tokens = f"{params.warmup_tokens} full token{'s' * (params.warmup_tokens != 1)}"
    after = f", after {full_tokens}" if params.warmup_tokens else ""
    by_auto = "auto chose " if defaults.policy == "auto" else ""
    lines = [f"{by_auto}{choice.policy}, {wanted}{_in_its_numbers(params)}{after}"]
    if choice.threshold is None and choice.ratio <= profile.max_ratio(choice.policy):
        expected = profile.expected(choice.policy, choice.ratio)
        others = _others(choice, defaults.min_agreement, profile) if by_auto else ""
        lines.append(
            f"there its profile has a top-1 agreement of {expected.top1_agreement:.3f} and a KL of "
            f"{expected.kl:.3g}{others}"
        )
    return lines


def _in_its_numbers(params: SkipParams) -> str:
    region = f"in layers {params.cold_start} to {params.cold_end - 1}"
    match params.policy:
        case "neurons":
            return "thresholds by layer"
        case "static" | "layer_drop":
            return f"always layers {', '.join(map(str, params.layers)) or 'none'}"
        case "random":
            return f"probability {params.probability:.3g} {region}"
        case "early_exit":
            return f"exit after {params.first_exit} layers, falling to {params.cold_start}"
        case _:
            return f"threshold {params.threshold:.6g} {region}"


def _others(choice: SkipChoice, least_agreement: float | None, profile: SkipProfile) -> str:
    """What the choice of `auto` was preferred to."""
    found = []
    for policy in AUTO_POLICIES:
        if policy == choice.policy or not profile.points(policy):
            continue
        if least_agreement is not None:
            ratio = profile.ratio_at_agreement(policy, least_agreement)
            found.append(f"{policy}: ratio {ratio or 0.0:.3g}")
        elif choice.ratio <= profile.max_ratio(policy):
            found.append(f"{policy}: KL {profile.expected(policy, choice.ratio).kl:.3g}")
        else:
            found.append(f"{policy}: out of reach")
    return f" ({', '.join(found)})" if found else ""


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
