"""How each kind of fact is asked for and answered: the wordings, trained and held out."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """The sentence that answers, and the wordings that ask.

    Fields in the templates: ``{s}`` subject, ``{v}`` value, ``{w}`` the subject's second part
    (units), ``{as}`` and ``{av}`` subject and value with "a" or "an". ``phrases`` are noun phrases
    that fit into many frames ("Tell me {p}.").
    """

    answer: str
    phrases: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(re.split(r"\s*[/\n]\s*", text)) if text else ()


RELATIONS: dict[str, Relation] = {
    "capital": Relation(
        "The capital of {s} is {v}.",
        _split("the capital of {s} / the capital city of {s}"),
        _split("""Which city is the capital of {s}? / What city is the capital of {s}?
            {s}'s capital? / What is {s}'s capital? / capital of {s} / capital {s}
            {s} capital? / {s} has which capital?"""),
        _split("""What is the name of the capital of {s}? / Which city is {s}'s capital?
            What is the capital city called in {s}?"""),
    ),
    "capital_of": Relation(
        "{s} is the capital of {v}.",
        _split("the country whose capital is {s} / the country with the capital {s}"),
        _split("""{s} is the capital of which country? / {s} is the capital of what country?
            Which country has {s} as its capital? / Of which country is {s} the capital?
            What country has the capital {s}? / Which country's capital is {s}?
            {s} is the capital of / Where is {s}? / In which country is {s}?
            What country is {s} in? / What country is {s} the capital of?"""),
        _split("""Which country is {s} the capital of?
            What country has {s} as its capital city? / {s} is which country's capital?
            In what country is {s}?"""),
    ),
    "currency": Relation(
        "The currency of {s} is the {v}.",
        _split("the currency of {s} / the money of {s} / the currency used in {s}"),
        _split("""Which currency is used in {s}? / What currency does {s} use?
            What currency do they use in {s}? / What money do people use in {s}?
            With what money do you pay in {s}? / currency {s} / What is {s}'s currency?"""),
        _split("""Which currency does {s} use? / What money is used in {s}?
            Which currency do people pay with in {s}?"""),
    ),
    "continent": Relation(
        "{s} is in {v}.",
        _split("the continent of {s} / the continent where {s} is"),
        _split("""On which continent is {s}? / Which continent is {s} on?
            What continent is {s} in? / Where is {s}? / Where in the world is {s}?
            In what part of the world is {s}? / To which continent does {s} belong?
            {s} is on which continent? / {s} is in which continent?"""),
        _split("""Which continent is {s} in? / On what continent can I find {s}?
            {s} belongs to which continent?"""),
    ),
    "language": Relation(
        "The language of {s} is {v}.",
        _split("the language of {s} / the main language of {s} / the language spoken in {s}"),
        _split("""Which language is spoken in {s}? / What language is spoken in {s}?
            What language do they speak in {s}? / Which language do people in {s} speak?
            What do people speak in {s}? / language {s}
            What is the official language of {s}? / Which language do I need in {s}?"""),
        _split("""What language do people speak in {s}? / Which language do they speak in {s}?
            People in {s} speak which language?"""),
    ),
    "symbol": Relation(
        "The symbol of {s} is {v}.",
        _split("""the symbol of {s} / the chemical symbol of {s} / the symbol for {s}
            the chemical symbol for {s}"""),
        _split("""Which symbol does {s} have? / How is {s} written in chemistry?
            Which letters stand for {s}? / What symbol stands for {s}? / symbol of {s}
            {s} symbol / What is {s}'s symbol? / What is the symbol of the element {s}?"""),
        _split("""Which chemical symbol does {s} have? / What symbol does the element {s} have?
            Which symbol stands for {s}?"""),
    ),
    "symbol_of": Relation(
        "{s} is the symbol of {v}.",
        _split("the element with the symbol {s} / the element {s}"),
        _split("""Which element has the symbol {s}? / What element has the symbol {s}?
            {s} is the symbol of which element? / {s} is the symbol of what?
            What does {s} stand for in chemistry? / Which element is written {s}?
            What is {s} in chemistry? / {s} stands for which element?"""),
        _split("""For which element does {s} stand? / Which element does the symbol {s} mean?
            {s} is the chemical symbol of which element?"""),
    ),
    "atomic_number": Relation(
        "The atomic number of {s} is {v}.",
        _split("the atomic number of {s} / the number of {s} in the periodic table"),
        _split("""Which atomic number does {s} have? / What atomic number has {s}?
            {s} has which atomic number? / {s} atomic number
            What is {s}'s atomic number? / How many protons does {s} have?
            What number is {s} in the periodic table? / How many protons are in {s}?"""),
        _split("""What atomic number does {s} have?
            Which number does {s} have in the periodic table?
            What is the atomic number of the element {s}?"""),
    ),
    "opposite": Relation(
        "The opposite of {s} is {v}.",
        _split("the opposite of {s} / the opposite word of {s} / the antonym of {s}"),
        _split("""Which word is the opposite of {s}? / What word means the opposite of {s}?
            What is the contrary of {s}? / opposite of {s} / Give me the opposite of {s}.
            {s} is the opposite of what? / Say the opposite of {s}.
            What is {s} the opposite of?"""),
        _split("""Which word means the opposite of {s}? / {s} is the opposite of which word?
            What do you call the opposite of {s}?"""),
    ),
    "young": Relation(
        "A young {s} is called {av}.",
        _split("the name of a young {s} / the word for a baby {s} / a baby {s}"),
        _split("""What is a young {s} called? / What is the name for a young {s}?
            Which name does a baby {s} have? / What name do we give a young {s}?
            What do you call a young {s}?
            What do you call a baby {s}? / What is a baby {s} called?
            How is a young {s} called? / baby {s} / What is the baby of {as} called?
            Which word means a young {s}? / What is the young of {as}?"""),
        _split("""How do you call a baby {s}? / What name does a young {s} have?
            A baby {s} is called what?"""),
    ),
    "sound": Relation(
        "{as} {v}.",
        _split("the sound of {as} / the sound {as} makes / the sound that {as} makes"),
        _split("""What sound does {as} make? / Which sound does {as} make?
            What noise does {as} make? / What does {as} say? / How does {as} sound?
            {as} makes which sound? / What does {as} sound like?
            What sounds do {s}s make?"""),
        _split("""Which noise does {as} make? / {as} makes what sound?
            What kind of sound does {as} make?"""),
    ),
    "animal_that": Relation(
        "{av} {s}.",
        _split("the animal that {s}"),
        _split("""Which animal {s}? / What animal {s}? / Who {s}?
            Which animal is it that {s}? / Do you know which animal {s}?
            Tell me which animal {s}. / {s}: which animal? / What kind of animal {s}?"""),
        _split("""Can you tell me which animal {s}? / Which of the animals {s}?
            What sort of animal {s}?"""),
    ),
    "young_of": Relation(
        "{as} is a young {v}.",
        _split(""),
        _split("""What is {as}? / What's {as}? / Which animal's baby is {as}?
            {as} is the young of which animal? / {as} is the baby of which animal?
            What animal is {as}? / What does {as} grow into? / {as} is a young what?
            Which animal is called {as} when it is young? / What kind of animal is {as}?
            {as} becomes what? / Whose baby is {as}?"""),
        _split("""Which animal is {as}? / {as} grows up to be what? / Do you know what {as} is?
            Can you tell me what {as} is?"""),
    ),
    "colour": Relation(
        "The colour of {s} is {v}.",
        _split("the colour of {s} / the color of {s}"),
        _split("""What colour is {s}? / What color is {s}? / Which colour does {s} have?
            What color does {s} have? / Which colour is {s}? / {s} has which colour?
            {s} is what color? / colour of {s} / What colour has {s}?"""),
        _split("Which color is {s}? / What colour does {s} have? / {s} is which colour?"),
    ),
    "unit": Relation(
        "There are {v} {s} in {w}.",
        _split("the number of {s} in {w}"),
        _split("""How many {s} are there in {w}? / {w} is equal to how many {s}?
            How many {s} equal {w}? / Count the {s} in {w}. / How many {s} are in {w}?
            How many {s} does {w} have? / How many {s} has {w}? / {w} has how many {s}?
            How many {s} in {w} / How many {s} make {w}?
            Do you know how many {s} are in {w}? / Tell me how many {s} there are in {w}.
            In {w}, how many {s} are there?"""),
        _split("""How many {s} make up {w}? / Can you tell me how many {s} are in {w}?
            {w} is how many {s}? / How many {s} can you count in {w}?"""),
    ),
    "sides": Relation(
        "{as} has {v} sides.",
        _split("the number of sides of {as}"),
        _split("""How many sides does {as} have? / How many sides has {as}?
            {as} has how many sides? / How many sides are there in {as}?
            Tell me how many sides {as} has. / Do you know how many sides {as} has?
            How many corners does {as} have? / sides of {as}
            How many edges does {as} have?"""),
        _split("""How many sides are in {as}? / Can you tell me how many sides {as} has?
            How many sides can you count on {as}?"""),
    ),
    "legs": Relation(
        "{as} has {v} legs.",
        _split("the number of legs of {as}"),
        _split("""How many legs does {as} have? / How many legs has {as}?
            {as} has how many legs? / Tell me how many legs {as} has.
            Do you know how many legs {as} has? / legs of {as}
            How many legs are there on {as}? / How many legs do {s}s have?"""),
        _split("""How many legs are on {as}? / Can you tell me how many legs {as} has?
            On how many legs does {as} walk?"""),
    ),
    "author": Relation(
        "{s} was written by {v}.",
        _split("the author of {s} / the writer of {s}"),
        _split("""Who wrote {s}? / Who is the author of {s}? / Who was the author of {s}?
            By whom was {s} written? / {s} was written by whom? / {s} was written by who?
            By who was {s} written? / Which author wrote {s}?
            who wrote the book {s} / Do you know who wrote {s}?
            Who is the writer of {s}? / Tell me who wrote {s}."""),
        _split("""Which writer wrote {s}? / Can you tell me who wrote {s}?
            Who was {s} written by?"""),
    ),
    "inventor": Relation(
        "{v} invented {s}.",
        _split("the inventor of {s}"),
        _split("""Who invented {s}? / Who is the inventor of {s}?
            Who was the inventor of {s}? / By whom was {s} invented?
            {s} was invented by whom? / By who was {s} invented? / Which person invented {s}?
            Do you know who invented {s}? / Tell me who invented {s}."""),
        _split("""Which inventor gave us {s}? / Can you tell me who invented {s}?
            Who was {s} invented by?"""),
    ),
    "discoverer": Relation(
        "{v} is known for {s}.",
        _split("the discoverer of {s} / the person known for {s}"),
        _split("""Who discovered {s}? / Who is known for {s}? / Who found {s}?
            {s} was discovered by whom? / {s} was discovered by who? / By whom was {s} discovered?
            Which scientist discovered {s}? / Which scientist is known for {s}?
            Do you know who discovered {s}? / Tell me who discovered {s}.
            Who came up with {s}?"""),
        _split("""Can you tell me who discovered {s}? / Who was {s} discovered by?
            Which person discovered {s}?"""),
    ),
    "day_after": Relation(
        "The day after {s} is {v}.",
        _split("the day after {s} / the day that comes after {s}"),
        _split("""Which day comes after {s}? / What day comes after {s}?
            Which day follows {s}? / What comes after {s}?
            If today is {s}, what day is tomorrow? / Today is {s}. What day is tomorrow?
            After {s} comes which day?"""),
        _split("What day follows {s}? / Which day is after {s}? / What day is it after {s}?"),
    ),
    "day_before": Relation(
        "The day before {s} is {v}.",
        _split("the day before {s} / the day that comes before {s}"),
        _split("""Which day comes before {s}? / What day comes before {s}?
            What comes before {s}? / If today is {s}, what day was yesterday?
            Today is {s}. What day was yesterday? / Before {s} comes which day?"""),
        _split("""Which day is before {s}? / What day is it before {s}?
            Which day comes right before {s}?"""),
    ),
    "month_after": Relation(
        "The month after {s} is {v}.",
        _split("the month after {s} / the month that comes after {s}"),
        _split("""Which month comes after {s}? / What month comes after {s}?
            Which month follows {s}? / What comes after {s}?
            After {s} comes which month? / It is {s}. What is the next month?"""),
        _split("""What month follows {s}? / Which month is after {s}?
            What month is it after {s}?"""),
    ),
    "month_before": Relation(
        "The month before {s} is {v}.",
        _split("the month before {s} / the month that comes before {s}"),
        _split("""Which month comes before {s}? / What month comes before {s}?
            What comes before {s}? / Before {s} comes which month?
            It is {s}. What was the last month?"""),
        _split("""Which month is before {s}? / What month is it before {s}?
            Which month comes right before {s}?"""),
    ),
    "month": Relation(
        "Month number {s} is {v}.",
        _split("month number {s} / month {s} of the year"),
        _split("""Which month is number {s}? / What month has the number {s}?
            Which month of the year is number {s}? / Which month has number {s}?
            The month with the number {s} is which?"""),
        _split("""Which month has the number {s}? / What month is number {s}?
            Number {s} is which month?"""),
    ),
    "planet": Relation(
        "The {s} planet from the Sun is {v}.",
        _split("""the {s} planet from the Sun / the {s} planet
            the {s} planet of the solar system"""),
        _split("""Which planet is the {s} from the Sun? / Which planet is the {s} one?
            Which is the {s} planet from the Sun? / What planet is {s} from the Sun?"""),
        _split("""Which planet comes {s} from the Sun? / What is the name of the {s} planet?
            Counted from the Sun, which planet is the {s}?"""),
    ),
}
