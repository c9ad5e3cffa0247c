"""Names, places and made-up words that several kinds of dialogue share."""

import random


def listed(text: str, separator: str | None = None) -> tuple[str, ...]:
    """The words of ``text``; data this long reads better unquoted."""
    return tuple(part.strip() for part in text.split(separator))


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """``a fox``, ``an owl``."""
    takes_an = noun[:1].lower() in "aeiou" and not noun.startswith("uni")
    return f"{'an' if takes_an else 'a'} {noun}"


GIRLS = listed(
    "Mia Anna Lily Emma Clara Nora Rosa Ella Sara Ruby Zoe Lucy Ida Maya Alice Eva Julia Lena "
    "Tara Molly Hana Vera Iris Olga Nina Sofia Greta Paula Marta Daisy"
)
BOYS = listed(
    "Tom Ben Max Leo Sam Jack Finn Paul Noah Oscar Adam Tim Karl Hugo Luke Omar David Felix Ivan "
    "Peter Bruno Henry Oliver Jonas Erik Simon Marco Theo Victor Otto"
)

_ONSETS = listed("b br c d dr f fl g gr h j k l m n p pl qu r s st sh t tr v w z zh")
_VOWELS = listed("a e i o u ai ee oo ou")
_CODAS = ("", "", "", "n", "r", "l", "s", "x", "m", "ck", "nd", "sh", "th")
_TAILS = ("", "", "ia", "land", "o", "ster", "ium", "a", "on", "istan", "y", "ville")


def pseudo_word(rng: random.Random) -> str:
    """A pronounceable word that, with near certainty, means nothing."""
    syllables = (
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.randint(2, 3))
    )
    return "".join(syllables) + rng.choice(_TAILS)


def strange_name(rng: random.Random) -> str:
    """A name outside the lists, so that copying is learned and not only recognising."""
    parts = (rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2))
    return ("".join(parts) + rng.choice(_CODAS)).capitalize()
