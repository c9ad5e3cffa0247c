"""What clients saw of their requests, and what it says of the server. No torch, no HTTP.

One request on the client's clock, and what is counted from where:

    intended   sent      first text    text        last text   end of the stream
       |--lag--|             |           |              |         |
       |--------- TTFT ------|--- ITL ---|---- ITL -----|         |
       |                     |------- TPOT x (tokens - 1) --------|
       |----------------------------- E2EL -----------------------|
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)
SLO_NAMES = ("ttft", "tpot", "e2el")


@dataclass(slots=True)
class RequestRecord:
    """One request; times are seconds of one monotonic clock.

    Latencies count from `intended_s`, when the request was to be sent, not from when a busy client
    came to it or a full server took it: such waiting must not vanish from the percentiles
    (coordinated omission).
    """

    intended_s: float
    sent_s: float
    first_chunk_s: float | None = None
    last_chunk_s: float = 0.0
    ended_s: float | None = None  # None: not yet
    gaps_s: list[float] = field(default_factory=list)  # between chunks, whatever tokens each has
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    usage_output_tokens: int | None = None  # None: the server told nothing
    skipped_ffn_blocks: int = 0
    total_ffn_blocks: int = 0  # 0: the server told nothing
    skipped_ffn_share: float = 0.0
    error: str | None = None  # its class, as http_503
    error_message: str = ""

    def add_chunk(self, now_s: float) -> None:
        """A chunk with text has come."""
        if self.first_chunk_s is None:
            self.first_chunk_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_chunk_s)
        self.last_chunk_s = now_s

    def fail(self, error: str, message: str) -> None:
        """Ends as an error, unless it has already ended."""
        if self.error is None and self.ended_s is None:
            self.error, self.error_message = error, message

    @property
    def num_output_tokens(self) -> int:
        """As the server told; else one for each chunk with text."""
        if self.usage_output_tokens is not None:
            return self.usage_output_tokens
        return 0 if self.first_chunk_s is None else len(self.gaps_s) + 1

    @property
    def lag_s(self) -> float:
        return self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_chunk_s is None else self.first_chunk_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """None where it cannot be told: of one token, and of tokens that came in one chunk.

        To the end of the stream, as the last tokens may have no text, and so no chunk.
        """
        if self.first_chunk_s is None or not self.gaps_s or self.num_output_tokens < 2:
            return None
        assert self.ended_s is not None
        return (self.ended_s - self.first_chunk_s) / (self.num_output_tokens - 1)

    @property
    def e2el_s(self) -> float:
        assert self.ended_s is not None
        return self.ended_s - self.intended_s

    def meets(self, slos_ms: Mapping[str, float]) -> bool:
        """Whether every named latency (`SLO_NAMES`) is within its bound; errors never are."""
        if self.error is not None:
            return False
        found_s = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2el": self.e2el_s}
        return all((found_s[name] or 0.0) * 1e3 <= bound for name, bound in slos_ms.items())


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles (linear between ranks) and maximum; None of nothing."""
    if not values:
        return None
    points = np.percentile(values, PERCENTILES)
    return {
        "mean": float(np.mean(values)),
        **{f"p{rank}": float(point) for rank, point in zip(PERCENTILES, points, strict=True)},
        "max": float(max(values)),
    }


def summarize(
    records: Sequence[RequestRecord], duration_s: float, slos_ms: Mapping[str, float]
) -> dict[str, Any]:
    """A run of `duration_s` seconds as one object for JSON. Latencies and tokens are those of the
    requests that succeeded; what the server did not tell is None."""
    served = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    num_prompt_tokens = sum(record.num_prompt_tokens for record in served)
    num_output_tokens = sum(record.num_output_tokens for record in served)
    num_ffn_blocks = sum(record.total_ffn_blocks for record in served)
    num_skipped = sum(record.skipped_ffn_blocks for record in served)
    left_out = sum(record.skipped_ffn_share * record.total_ffn_blocks for record in served)
    num_good = sum(record.meets(slos_ms) for record in served)
    examples = {record.error: record.error_message for record in reversed(failed)}
    errors = Counter(record.error for record in failed)

    def rate(number: float) -> float:
        return number / duration_s if duration_s > 0 else 0.0

    def milliseconds(values_s: Sequence[float | None]) -> dict[str, float] | None:
        return distribution([value * 1e3 for value in values_s if value is not None])

    return {
        "num_ok": len(served),
        "num_failed": len(failed),
        "errors": {
            error: {"count": count, "example": examples[error]}
            for error, count in errors.most_common()
        },
        "duration_s": duration_s,
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": num_output_tokens,
        "num_without_usage": sum(record.usage_output_tokens is None for record in served),
        "requests_per_s": rate(len(served)),
        "output_tokens_per_s": rate(num_output_tokens),
        "total_tokens_per_s": rate(num_prompt_tokens + num_output_tokens),
        "slos_ms": dict(slos_ms),
        "num_good": num_good if slos_ms else None,
        "goodput_requests_per_s": rate(num_good) if slos_ms else None,
        "ttft_ms": milliseconds([record.ttft_s for record in served]),
        "tpot_ms": milliseconds([record.tpot_s for record in served]),
        "itl_ms": milliseconds([gap_s for record in served for gap_s in record.gaps_s]),
        "e2el_ms": milliseconds([record.e2el_s for record in served]),
        "client_lag_ms": milliseconds([record.lag_s for record in records]),
        "cached_token_ratio": (
            sum(record.num_cached_tokens for record in served) / num_prompt_tokens
            if num_prompt_tokens
            else None
        ),
        "skipped_ffn_share": left_out / num_ffn_blocks if num_ffn_blocks else None,
        "token_skip_ratio": num_skipped / num_ffn_blocks if num_ffn_blocks else None,
    }
