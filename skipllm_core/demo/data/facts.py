"""What the embedded model knows: common facts as (relation, subject, value), by hand."""

from dataclasses import dataclass

from skipllm_core.demo.data import tables
from skipllm_core.demo.data.words import listed

# Other names that people use in questions; the answers keep to the first.
ALIASES = {
    "the United States": ("the USA", "the US", "America", "the United States of America", "USA"),
    "England": ("Great Britain", "the UK", "the United Kingdom", "Britain", "UK"),
    "the Netherlands": ("Holland", "Netherlands"),
    "the Czech Republic": ("Czechia",),
    "South Korea": ("Korea",),
    "aluminium": ("aluminum",),
    "sulfur": ("sulphur",),
    "the airplane": ("the plane", "the aeroplane"),
    "the light bulb": ("the lightbulb", "the electric light"),
    "centimetres": ("centimeters", "cm"),
    "metres": ("meters", "m"),
    "millimetres": ("millimeters", "mm"),
    "grams": ("g",),
    "the World Wide Web": ("the web", "the WWW"),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """One known fact; ``relation`` is a key of ``questions.RELATIONS``."""

    relation: str
    subject: str
    value: str


DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed(
    "January February March April May June July August September October November December"
)
_MONTH_DAYS = listed("31 28 31 30 31 30 31 31 30 31 30 31")
_PLANETS = listed("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune")
_ORDINALS = listed("first second third fourth fifth sixth seventh eighth")


def _rows(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.strip().splitlines()]


def _country_facts() -> list[Fact]:
    facts: list[Fact] = []
    for country, capital, currency, continent, language in _rows(tables.COUNTRIES):
        values = {
            "capital": capital,
            "currency": currency,
            "continent": continent,
            "language": language,
        }
        facts += [Fact(relation, country, v) for relation, v in values.items() if v != "-"]
        facts.append(Fact("capital_of", capital, country))
    return facts


def _cyclic(before: str, after: str, names: tuple[str, ...]) -> list[Fact]:
    """Neighbours on a cycle (the day before Monday is Sunday)."""
    following = [*names[1:], names[0]]
    return [
        fact
        for a, b in zip(names, following, strict=True)
        for fact in (Fact(after, a, b), Fact(before, b, a))
    ]


def all_facts() -> list[Fact]:
    """Every fact, each (relation, subject) once, in a fixed order."""
    facts = _country_facts()
    for element, symbol, number in _rows(tables.ELEMENTS):
        facts += [
            Fact("symbol", element, symbol),
            Fact("symbol_of", symbol, element),
            Fact("atomic_number", element, number),
        ]
    for a, b in _rows(tables.OPPOSITES):
        facts += [Fact("opposite", a, b), Fact("opposite", b, a)]
    by_relation = {
        "young": tables.YOUNG,
        "sound": tables.SOUNDS,
        "colour": tables.COLOURS,
        "sides": tables.SHAPES,
        "legs": tables.LEGS,
        "author": tables.AUTHORS,
        "inventor": tables.INVENTORS,
        "discoverer": tables.DISCOVERERS,
        "single": tables.SINGLE,
    }
    for relation, table in by_relation.items():
        facts += [Fact(relation, subject, value) for subject, value in _rows(table)]
    # Sounds and young asked the other way round.
    facts += [Fact("animal_that", sound, animal) for animal, sound in _rows(tables.SOUNDS)]
    facts += [Fact("young_of", young, animal) for animal, young in _rows(tables.YOUNG)]
    facts += [Fact("unit", f"{part}|{whole}", n) for part, whole, n in _rows(tables.UNITS)]
    facts += _cyclic("day_before", "day_after", DAYS)
    facts += _cyclic("month_before", "month_after", MONTHS)
    facts += [Fact("planet", o, p) for o, p in zip(_ORDINALS, _PLANETS, strict=True)]
    for name, number_of_days in zip(MONTHS, _MONTH_DAYS, strict=True):
        facts.append(Fact("unit", f"days|{name}", number_of_days))
    facts += [Fact("month", str(n + 1), month) for n, month in enumerate(MONTHS)]
    return facts
