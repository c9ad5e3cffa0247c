"""How strangers type: case, punctuation, courtesies and slips, applied to a clean question."""

import random
import re

_BEFORE = (
    "Hey, ", "Hi, ", "Hello, ", "Please, ", "OK, ", "So, ", "Well, ", "Excuse me, ", "Sorry, ",
    "Quick question: ", "One question: ", "I have a question. ", "Hi! ", "Hello! ", "Thanks. ",
    "Great. ", "Next question: ", "Now, ", "And now, ", "Hmm, ",
)  # fmt: skip
_AFTER = (" Thanks!", " Thank you.", " please", ", please?", " Please.", "!", "??", " I forgot.")
_SHORT = (
    ("What is ", "what's "),
    ("What is ", "whats "),
    ("What is ", "wat is "),
    ("Who is ", "who's "),
    ("Do you know", "do u know"),
    ("you", "u"),
)


def _slip(text: str, keep: str, rng: random.Random) -> str:
    """Swap or drop one inner letter of a longer word that ``keep`` does not contain."""
    words = [m for m in re.finditer(r"[A-Za-z]{4,}", text) if m.group().lower() not in keep.lower()]
    if not words:
        return text
    word = rng.choice(words)
    i = rng.randrange(word.start() + 1, word.end() - 1)
    if rng.random() < 0.5:
        return text[:i] + text[i + 1 :]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


def vary(text: str, rng: random.Random, *, keep: str = "", keep_case: bool = False) -> str:
    """One informal rendering of ``text``; the words in ``keep`` stay spelled as they are."""
    if rng.random() < 0.1:
        old, new = rng.choice(_SHORT)
        text = text.replace(old, new, 1)
    if rng.random() < 0.06:
        text = _slip(text, keep, rng)
    if rng.random() < 0.25:
        text = text.rstrip("?.! ")
    if rng.random() < 0.12:
        before = rng.choice(_BEFORE)
        first_word = text.split(" ", 1)[0]
        if before.endswith((", ", ": ")) and first_word not in keep.split() and not keep_case:
            text = text[:1].lower() + text[1:]
        text = before + text
    if rng.random() < 0.08:
        text = text.rstrip("?.!") + rng.choice(_AFTER)
    if keep_case:
        return text
    draw = rng.random()
    if draw < 0.22:
        return text.lower()
    return text.upper() if draw < 0.26 else text
