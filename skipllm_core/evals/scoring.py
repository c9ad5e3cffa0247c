"""How answers are judged. Pure functions of text; every score is within 0 and 1."""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter
from collections.abc import Collection, Sequence

from skipllm_core.errors import ConfigError

REPEATED_NGRAM = 4
REPEATED_TIMES = 3
COLLAPSED_TAIL = 8

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """As open-domain question answering does: case, punctuation, articles and spaces aside."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Collection[str]) -> bool:
    """Whether the answer is one of the accepted ones, both normalised."""
    return normalise(answer) in {normalise(one) for one in accepted}


def contains_answer(answer: str, accepted: Collection[str]) -> bool:
    """Whether an accepted answer stands in the text as whole words: for models that answer in
    sentences. An accepted answer of which normalising leaves nothing never counts."""
    words = f" {normalise(answer)} "
    return any((one := normalise(a)) and f" {one} " in words for a in accepted)


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F-measures `rouge1`, `rouge2` and `rougeL` by the rouge-score package, with stemming."""
    try:
        from rouge_score import rouge_scorer  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError("ROUGE needs rouge-score: pip install 'skipllm[eval]'") from None
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    return {name: float(s.fmeasure) for name, s in scorer.score(reference, answer).items()}


def pieces(text: str) -> list[str]:
    """Words and single marks, in lower case: the units of the two rates below, whatever the model's
    tokenizer, and the same over HTTP, where token ids are not seen."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def is_repetitive(text: str) -> bool:
    """Whether some run of 4 pieces stands in the answer 3 times or more."""
    found, n = pieces(text), REPEATED_NGRAM
    grams = Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))
    return max(grams.values(), default=0) >= REPEATED_TIMES


def is_collapsed(text: str) -> bool:
    """Whether the last 8 pieces are one and the same."""
    tail = pieces(text)[-COLLAPSED_TAIL:]
    return len(tail) == COLLAPSED_TAIL and len(set(tail)) == 1


def wilson(successes: float, num_items: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share of `num_items` yes-or-no outcomes; 95 % by default."""
    if num_items == 0:
        return 0.0, 1.0
    share = successes / num_items
    spread = z * math.sqrt(share * (1 - share) / num_items + z * z / (4 * num_items**2))
    scale = 1 + z * z / num_items
    middle = share + z * z / (2 * num_items)
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def bootstrap(values: Sequence[float], seed: int = 0, rounds: int = 1000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values`, by resampling items."""
    if not values:
        return 0.0, 1.0
    rng = random.Random(seed)  # noqa: S311 - no secret depends on it
    n = len(values)
    means = sorted(sum(rng.choices(values, k=n)) / n for _ in range(rounds))
    return means[int(0.025 * rounds)], means[int(0.975 * rounds) - 1]
