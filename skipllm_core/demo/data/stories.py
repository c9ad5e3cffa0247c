"""Short stories from templates, with their one-line summaries and questions about them."""

import functools
import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from skipllm_core.demo.data.plots import PLOTS, Plot
from skipllm_core.demo.data.words import (
    BOYS,
    GIRLS,
    capitalised,
    listed,
    strange_name,
    with_article,
)

_ANIMALS = listed(
    "fox rabbit bear mouse cat dog owl wolf deer frog duck lion tiger horse turtle hen goat "
    "squirrel hedgehog elephant monkey penguin bird bee pig sheep"
)
_FEMALE_KINDS = listed("girl girl girl princess queen witch woman")
_MALE_KINDS = listed("boy boy boy prince king wizard knight man")
_ANY_KINDS = listed("farmer baker sailor dragon robot teacher giant pirate")
_ODD_KINDS = listed(
    "teapot computer cloud tree star zebra snail whale dinosaur unicorn doctor painter ghost "
    "snowman spider train toaster crab camel crow panda koala fairy dwarf alien banana"
)
_ADJECTIVES = listed("little brave clever young kind old small lazy happy curious poor shy")
_OBJECT_ADJECTIVES = listed(
    "golden silver red blue green old little shiny wooden magic broken white"
)
_OBJECTS = listed(
    "key ring ball kite book bell hat lamp boat coin drum flute cup box map scarf basket rope "
    "mirror feather crown shell lantern stone sword necklace doll clock"
)
_PLACES = listed(
    "in the forest|in the garden|in the village|in the mountains|in the old castle|at the river|"
    "at the beach|on the meadow|in the town|in the desert|in the park|on the island|in the cave|"
    "on the farm|at the lake|on the hill|in the library|in the school|at the harbour|in the barn|"
    "at the old mill|in the snow|at the sea|under the bridge|in the valley",
    "|",
)
_FOODS = listed(
    "bread|apples|cheese|nuts|berries|carrots|cake|honey|soup|pears|rice|milk|eggs|cookies|"
    "grapes|plums|tea|butter|tomatoes|fish",
    "|",
)
_SKILLS = listed(
    "swim|sing|dance|read|climb|paint|cook|fly|ride a bike|play the flute|juggle|whistle|"
    "bake bread|write|skate",
    "|",
)
_FEARS = listed("the dark|storms|deep water|thunder|big dogs|ghosts|spiders|the wind|fire", "|")
_BUILDINGS = listed("house bridge boat tower raft hut treehouse wall tent")
_PETS = listed("cat dog parrot rabbit hamster turtle pony goat")


@dataclass(frozen=True, slots=True)
class Story:
    """A story, the sentence that sums it up, and the words it was made of."""

    text: str
    summary: str
    plot: str
    words: dict[str, str]


def is_held_out(words: dict[str, str]) -> bool:
    """Whether this pair of hero and object (or kind) is kept out of training."""
    pair = f"{words['n']}|{words['k']}|{words['o']}|{words['h']}"
    return zlib.crc32(pair.encode()) % 8 == 0


def _hero(rng: random.Random) -> tuple[str, str, bool]:
    """(name, kind, whether female) of one character."""
    is_female = rng.random() < 0.5
    own_kinds = _FEMALE_KINDS if is_female else _MALE_KINDS
    kinds = rng.choices((_ANIMALS, own_kinds, _ANY_KINDS, _ODD_KINDS), (5, 3, 1, 1))[0]
    name = rng.choice(GIRLS if is_female else BOYS)
    if rng.random() < 0.25:
        name = strange_name(rng)
    return name, rng.choice(kinds), is_female


def _draw_words(rng: random.Random) -> dict[str, str]:
    name, kind, is_female = _hero(rng)
    friend, friend_kind, _ = _hero(rng)
    while friend == name:
        friend, friend_kind, _ = _hero(rng)
    noun = rng.choice(_OBJECTS)
    item = f"{rng.choice(_OBJECT_ADJECTIVES)} {noun}" if rng.random() < 0.7 else noun
    place = rng.choice(_PLACES)
    food, other_food = rng.sample(_FOODS, 2)
    building = rng.choice(_BUILDINGS)
    pronouns = ("she", "her", "her", "She") if is_female else ("he", "him", "his", "He")
    return {
        "n": name,
        "k": kind,
        "ak": with_article(kind),
        "ad": with_article(f"{rng.choice(_ADJECTIVES)} {kind}"),
        "h": friend,
        "hk": friend_kind,
        "ahk": with_article(friend_kind),
        "o": item,
        "ao": with_article(item),
        "at": place,
        "At": capitalised(place),
        "p": place[place.index("the ") :],
        "f": food,
        "g": other_food,
        "skill": rng.choice(_SKILLS),
        "fear": rng.choice(_FEARS),
        "b": building,
        "ab": with_article(building),
        "pet": rng.choice(_PETS),
        **dict(zip(("he", "him", "his", "He"), pronouns, strict=True)),
    }


def _tell(plot: Plot, words: dict[str, str], rng: random.Random) -> str:
    return " ".join(capitalised(rng.choice(s).format(**words)) for s in plot.sentences)


def make_story(rng: random.Random, *, held_out: bool = False, only_tales: bool = False) -> Story:
    """A fresh story whose combination of words is (or is not) among those held out."""
    names = [name for name, plot in PLOTS.items() if plot.is_tale or not only_tales]
    words = _draw_words(rng)
    while is_held_out(words) != held_out:
        words = _draw_words(rng)
    name = rng.choice(names)
    plot = PLOTS[name]
    summary = capitalised(plot.summary.format(**words))
    return Story(_tell(plot, words, rng), summary, name, words)


_WISHES = (
    "Tell me {x}.", "Tell me {x}.", "Tell me {x} please.", "Can you tell me {x}?", "Write {x}.",
    "Please write {x}.", "Write me {x}.", "I want to hear {x}.", "I'd like {x}.", "{x}",
    "{x}, please.",
    "Make up {x}.", "Please, {x}.", "Tell us {x}.", "I need {x}.", "How about {x}?",
    "Tell me {x}!", "Invent {x}.", "Can I hear {x}?", "Create {x}.", "Do you know {x}?",
    "Could you tell me {x}?", "Give me {x}.",
    "Please tell me {x}.",
    "I would like to hear {x}.", "Can you write {x}?", "Tell {x}.", "Let me hear {x}.",
)  # fmt: skip
_WISHES_HELD_OUT = (
    "Would you tell me {x}?", "I want you to tell me {x}.", "Could you write {x} for me?",
    "Please make up {x}.",
)  # fmt: skip
_STORIES = (
    "a story", "a story", "a story", "a short story", "a short story", "a little story", "a tale",
    "a nice story", "another story", "a new story", "a fairy tale", "a bedtime story",
    "a funny story", "one more story", "a good story", "a children's story", "a sweet story",
)  # fmt: skip
_ABOUTS = (
    "", "", " about {ak}", " about {ak}", " about {ad}", " about {ad}", " about {ak} named {n}",
    " about {ad} named {n}", " with {ak}", " with {ad} named {n}", " about {n}", " with {n}",
    " about {ad} named {n}",
    " about {ak} named {n}",
    " about {ak} called {n}", " about {n} the {k}", " about {n} and {h}", " about {n} and {h}",
    " with {n} and {h}",
    " about two friends, {n} and {h}", " for children",
    " for my child", " about {ak} and {ahk}", " about {ak} {at}",
)  # fmt: skip


def story_request(story: Story, rng: random.Random, *, held_out: bool = False) -> str:
    """A wish that ``story`` fulfils."""
    abouts: tuple[str, ...] = _ABOUTS
    if "{at}" not in PLOTS[story.plot].summary:
        abouts = tuple(a for a in abouts if "{at}" not in a)
    if story.plot == "journey":  # it has no friend
        abouts = tuple(a for a in abouts if "{h}" not in a and "{ahk}" not in a)
    wish = (rng.choice(_STORIES) + rng.choice(abouts)).format(**story.words)
    frame = rng.choice(_WISHES_HELD_OUT if held_out else _WISHES)
    return capitalised(frame.replace("{x}", wish))


_SUMMARIZE = (
    "Summarize this in one sentence: {t}", "Summarize this story in one sentence: {t}",
    "Summarize: {t}", "Sum this up: {t}", "Give me a short summary of this story: {t}",
    "Please summarize the following story: {t}", "{t} Summarize this in one sentence.",
    "{t} What is this story about in one sentence?", "What happens in this story? {t}",
    "Summarise this text: {t}", "Read this story and sum it up in one sentence: {t}",
    "TL;DR: {t}", "Summary please: {t}", "Write a one-line summary: {t}",
    "Here is a story: {t} Please summarize it.", "Tell me in one sentence what happens: {t}",
    "Can you summarize this? {t}", "Summarize this text. {t}", "{t} Please summarize this.",
)  # fmt: skip
_SUMMARIZE_HELD_OUT = (
    "Please sum up this story in one sentence: {t}", "Give me a one-sentence summary: {t}",
    "Could you summarize this story? {t}", "Summarize the following text in one line: {t}",
)  # fmt: skip
SUMMARIZE_AGAIN = (
    "Summarize it.", "Summarize it in one sentence.", "Please sum it up.", "What was it about?",
    "Can you summarize the story?", "Give me a short summary.", "Now summarize the story.",
    "Summarize that.", "Sum it up in one sentence.", "Summary?", "And in one sentence?",
    "What happened in the story?", "Can you sum that up?", "Sum up your story.",
    "Please summarize this story.", "Summarize what you told me.", "Please sum up your tale.",
    "Can you summarize your story?", "Now sum up your story in one line.",
)  # fmt: skip
SUMMARIZE_AGAIN_HELD_OUT = ("Please summarize your story.", "Sum up the story in one sentence.")


def summary_request(text: str, rng: random.Random, *, held_out: bool = False) -> str:
    """A wish for the summary of ``text``."""
    frame = rng.choice(_SUMMARIZE_HELD_OUT if held_out else _SUMMARIZE)
    if rng.random() < 0.25:
        frame = frame.replace(": {t}", ":\n\n{t}").replace("{t} ", "{t}\n\n")
    return frame.replace("{t}", text)


_QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "{ak} named {n}": (
        ("Who is the hero?", "Who is the story about?", "Who was the main character?",
         "What was the name of the {k}?", "What was {his} name?", "Who is it about?",
         "What is the name of the hero?", "Who was the {k}?", "How is the {k} called?",
         "What was the {k}'s name?", "What name does the {k} have?", "What do they call the {k}?"),
        ("Who is the hero of the story?", "What is the {k} called?"),
    ),
    "{ahk} named {h}": (
        ("Who did {n} meet?", "Who was the friend?", "What was the name of the {hk}?",
         "Who else is in the story?", "Who is {h}?", "Who was the other one?", "Who was the {hk}?",
         "How is the {hk} called?", "What was the {hk}'s name?", "What name does the {hk} have?"),
        ("Who is the friend of {n}?", "What is the {hk} called?"),
    ),
    "{at}": (
        ("Where did it happen?", "Where was that?", "Where was {n}?", "Where does it happen?",
         "Where does the story take place?", "In which place was that?", "Where were they?"),
        ("Where did that happen?", "In what place does the story happen?"),
    ),
}  # fmt: skip
_ANSWERS = {
    "{ak} named {n}": "The story is about {ak} named {n}.",
    "{ahk} named {h}": "It was {ahk} named {h}.",
    "{at}": "It happened {at}.",
}


def story_question(
    story: Story, rng: random.Random, *, held_out: bool = False
) -> tuple[str, str] | None:
    """A question about a told tale with its answer, or None where the drawn topic does not fit."""
    topic = rng.choice(tuple(_QUESTIONS))
    asked = topic.format(**story.words)
    if asked not in story.text and capitalised(asked) not in story.text:
        return None
    question = rng.choice(_QUESTIONS[topic][held_out])
    return question.format(**story.words), _ANSWERS[topic].format(**story.words)


_NAMED = re.compile(r"\bnamed ([A-Z]\w*)")


def _one_of(words: Iterable[str]) -> str:
    return "|".join(sorted(set(words)))


def _field_patterns() -> dict[str, str]:
    """What may stand in a plot's fields: names and kinds are free words (a request may bring its
    own), everything else comes from the lists."""
    item = f"(?:(?:{_one_of(_OBJECT_ADJECTIVES)}) )?(?:{_one_of(_OBJECTS)})"
    building = f"(?:{_one_of(_BUILDINGS)})"
    places = _one_of(_PLACES)
    return {
        **dict.fromkeys(("n", "h", "k", "hk"), r"\w+"),
        **dict.fromkeys(("ak", "ahk"), r"an? \w+"),
        "ad": r"an? \w+ \w+",
        "o": item,
        "ao": f"an? {item}",
        **dict.fromkeys(("at", "At"), f"(?:{places})"),
        "p": f"(?:{_one_of(p[p.index('the ') :] for p in _PLACES)})",
        **dict.fromkeys(("f", "g"), f"(?:{_one_of(_FOODS)})"),
        "skill": f"(?:{_one_of(_SKILLS)})",
        "fear": f"(?:{_one_of(_FEARS)})",
        "b": building,
        "ab": f"an? {building}",
        "pet": f"(?:{_one_of(_PETS)})",
        **dict.fromkeys(("he", "He"), "s?he"),
        "him": "(?:him|her)",
        "his": "(?:his|her)",
    }


@functools.cache
def _plot_patterns() -> tuple[re.Pattern[str], ...]:
    """Of each plot, all the stories that it can make."""
    fields = _field_patterns()

    def sentence(wordings: tuple[str, ...]) -> str:
        # re.escape leaves the fields' letters alone, and their braces escaped.
        return "|".join(
            re.sub(r"\\\{(\w+)\\\}", lambda found: fields[found[1]], re.escape(wording))
            for wording in wordings
        )

    return tuple(
        re.compile(r"\ ".join(f"(?:{sentence(s)})" for s in plot.sentences), re.IGNORECASE)
        for plot in PLOTS.values()
    )


def is_coherent(story: str, request: str = "") -> bool:
    """Whether a told story is one of a plot from its first word to its last, with no stutter and
    no sentence from elsewhere, about the names (capitalised words) of ``request``, and every name
    it introduces occurs again."""
    names = _NAMED.findall(story)
    wanted = re.findall(r"\b(?:about|with|named|called|and) ([A-Z]\w+)", request)
    return (
        any(pattern.fullmatch(story.strip()) for pattern in _plot_patterns())
        and 1 <= len(set(names)) == len(names) <= 2
        and all(len(re.findall(rf"\b{name}\b", story)) >= 2 for name in names)
        and all(name in story for name in wanted)
    )
