"""Questions outside the model's world; the only right answer is ``ANSWER``."""

import random

from skipllm_core.demo.data.facts import Fact, all_facts
from skipllm_core.demo.data.questions import fields, held_out_templates, train_templates
from skipllm_core.demo.data.relations import RELATIONS
from skipllm_core.demo.data.words import capitalised, listed, pseudo_word

ANSWER = "I'm sorry, I don't know that."

_FAR_COUNTRIES = listed(
    "Albania Angola Armenia Bolivia Bulgaria Cambodia Cameroon Chad Croatia Cyprus Ecuador "
    "Estonia Fiji Gabon Georgia Guatemala Guinea Guyana Haiti Honduras Iraq "
    "Jamaica Jordan Kazakhstan Kuwait Laos Latvia Lebanon Libya Luxembourg Madagascar Malawi "
    "Malaysia Mali Malta Moldova Monaco Mozambique Namibia Nepal Nicaragua Niger Oman Pakistan "
    "Panama Paraguay Philippines Qatar Rwanda Senegal Serbia Singapore Slovakia Slovenia "
    "Somalia Sudan Suriname Syria Tanzania Togo Tunisia Uganda Uruguay Venezuela Yemen Zambia "
    "Atlantis Narnia Texas Bavaria Scotland California Wonderland"
)
_FAR_COUNTRIES_HELD_OUT = listed(
    "Mongolia Bhutan Romania Algeria Botswana Bangladesh Lithuania Tajikistan Zimbabwe Bahrain "
    "Liberia Myanmar Wakanda Florida"
)
_FAR_SUBJECTS: dict[str, tuple[str, ...]] = {
    "country": _FAR_COUNTRIES,
    "city": listed("Munich Milan Boston Chicago Lyon Osaka Toronto Sydney Zurich Mumbai Hamburg "
                  "Atlanta Naples Porto Geneva Bergen Krakow Lagos"),
    "element": listed("cobalt krypton xenon barium platinum tungsten radon arsenic cesium boron "
                     "bromine plutonium gallium wood plastic steel glass"),
    "animal": listed("hedgehog moose otter badger walrus lizard parrot squirrel beaver camel "
                    "dragon unicorn hippo ferret"),
    "book": listed("The Silent Road|The Red Garden|Winter Songs|The Last Train|A House of Stars|"
                  "The Glass Door|Long Shadows|The Green River|Seven Letters|My Quiet Town", "|"),
    "thing": listed("the zipper|the toaster|the fridge|the bicycle|the umbrella|the pencil|"
                   "the elevator|the camera|the piano|the compass|the ballpoint pen|jeans|"
                   "the microwave|the hammer", "|"),
    "item": listed("my shirt|my car|the door|my house|a phone|the table|my hair|a box|your hat|"
                   "the train|a dress|my bag|the wall|the book|a balloon|my eyes|the flag", "|"),
    "adjective": listed("purple table window green seven apple garden chair pencil river bread "
                       "Tuesday sofa"),
}  # fmt: skip
_FAR_KIND = {
    "capital": "country", "currency": "country", "continent": "country", "language": "country",
    "capital_of": "city", "symbol": "element", "atomic_number": "element", "young": "animal",
    "sound": "animal", "legs": "animal", "author": "book", "inventor": "thing",
    "discoverer": "thing", "opposite": "adjective", "colour": "item",
}  # fmt: skip

_SLOTS: dict[str, tuple[str, ...]] = {
    "team": listed("the Lions|the Eagles|Arsenal|Real Madrid|the Bulls|Brazil|Germany|Italy|the "
                  "Tigers|Chelsea|France|Japan", "|"),
    "person": listed("Napoleon|Cleopatra|Mozart|Elvis|Messi|Gandhi|Picasso|the president|the "
                    "pope|the king|my boss|my neighbour|Julius Caesar|Beyonce|the mayor|Tom|"
                    "Anna|my sister|Lincoln|Obama", "|"),
    "place": listed("Paris|London|Berlin|my town|Rome|Tokyo|Spain|the office|Chicago|India|"
                   "the village|Canada|the Moon", "|"),
    "thing": listed("a phone|a car|bitcoin|a laptop|a house|bread|a bicycle|gold|a ticket|a pizza|"
                   "coffee|a guitar|the internet|a computer", "|"),
    "topic": listed("love|politics|religion|art|football|music|philosophy|money|war|the economy|"
                   "quantum physics|history|democracy|football|poetry|chess", "|"),
    "illness": listed("a headache|the flu|a cold|back pain|a fever|a cough|an allergy", "|"),
    "language": listed("Python|Java|JavaScript|Rust|C++|SQL|Bash|HTML|Go", "|"),
    "task": listed("sorts a list|reads a file|prints a table|finds prime numbers|opens a window|"
                  "reverses a string|sends an email|adds two numbers", "|"),
    "dish": listed("pancakes|soup|bread|pizza|a cake|rice|lasagna|curry|an omelette", "|"),
    "year": tuple(str(y) for y in range(1500, 2030, 7)),
}  # fmt: skip

# Known things asked about in unknown ways: a name alone must not set off its fact.
_KNOWN = {"country": "capital", "city": "capital_of", "element": "symbol", "animal": "sound",
          "book": "author", "planet": "planet"}  # fmt: skip


def _known_slots() -> dict[str, tuple[str, ...]]:
    facts = all_facts()
    return {
        slot: tuple(f.value if slot == "planet" else f.subject for f in facts if f.relation == r)
        for slot, r in _KNOWN.items()
    }


_ALL_SLOTS = {**_SLOTS, **_known_slots()}

_TRAIN = """Who won the world cup in {year}?/Who won the match yesterday?/Did {team} win today?
Which team won the league in {year}?/What was the score of the last game of {team}?
Who is the best player of {team}?/Who is the president of {place}?/Who is the mayor of {place}?
How old is {person}?/When was {person} born?/When did {person} die?/Where does {person} live?
Who is {person}?/Who was {person}?/What did {person} say?/Is {person} married?
What is the phone number of {person}?/What is my password?/Where do I live?/How old am I?
What did I eat yesterday?/What am I thinking?/Where are my keys?/What is in my pocket?
What time is it?/What is the date today?/What is the weather like in {place}?/Will it rain?
What is the temperature in {place}?/Is it sunny in {place}?/What is in the news?
How much does {thing} cost?/What is the price of {thing}?/Where can I buy {thing}?
What is the stock price of {thing}?/Should I buy {thing}?/How does {thing} work?
Can you repair {thing}?/How do I sell {thing}?/Who made {thing}?/What is {topic}?
What do you think about {topic}?/Explain {topic}./Explain {topic} to me./Why is {topic} important?
Tell me about {topic}./Write an essay about {topic}./What is the meaning of {topic}?
What is the meaning of life?/What happened in {year}?/What happened in {place} in {year}?
Who was king in {year}?/Why did the war begin in {year}?/How many people live in {place}?
How big is {place}?/How far is it to {place}?/How do I get to {place}?
What is the best hotel in {place}?
Where can I eat in {place}?/Book a flight to {place}./Is {place} nice?/What should I see in {place}?
How do I treat {illness}?/What helps against {illness}?/I have {illness}. What should I do?
Which pill is good for {illness}?/Am I ill?/Write a program in {language}.
Write a function in {language} that {task}./Write code that {task}./How do I learn {language}?
What is {language}?/Fix my {language} code./Why does my {language} program crash?
How do I cook {dish}?/Give me a recipe for {dish}./How long do I bake {dish}?
Translate this into French./Translate hello into Spanish./How do you say {topic} in German?
Write a poem./Write a poem about {topic}./Write a song about {place}./Draw a picture of {person}.
Play some music./Open the door./Call {person}./Send an email to {person}./Turn on the light.
Set an alarm for seven./Remind me to call {person}./Search the internet for {topic}.
What is your favourite colour?/What is your favourite food?/Do you like {topic}?/Do you love me?
Who will win the election?/What will happen tomorrow?/Will {team} win?/Can you see the future?
Who should I vote for?/Is there a god?/Is {person} a good person?/Are you smarter than {person}?
What is the square root of {year}?/What is {year} times {year}?/What is {year} + {year}?
Solve this equation./What is the integral of x?/How many stars are there?/How deep is the ocean?
How many books did {person} write?/What is the largest number?/How many people are in the world?
What is the population of {place}?/Who is the richest person?/What is the longest river in {place}?
What does this word mean?/What does this error mean?/Read this file./Show me a picture.
What is the best movie?/Which film won in {year}?/Who sang this song?/Who is the singer?
Who plays in that film?/What is the plot of the film?/Recommend a book about {topic}.
What should I wear today?/What should I cook tonight?/Which job is right for me?
How do I make money?/How can I lose weight?/Why is my computer slow?/Why am I sad?
What is the population of {country}?/Who is the king of {country}?
Who is the president of {country}?
How many people live in {country}?/What is the flag of {country}?/How big is {country}?
How old is {city}?
What is the largest city in {country}?/What is the longest river in {country}?
Tell me about {country}.
What is the history of {country}?/Is {country} a rich country?/What food do people eat in {country}?
What is the weather in {city}?/Tell me about {city}./How many people live in {city}?
Who is the mayor of {city}?
What is the best restaurant in {city}?/How far is it from {city} to {place}?/How do I get to {city}?
What is {element} used for?/What is the melting point of {element}?/Who discovered {element}?
How much does {element} cost?/Is {element} dangerous?/What is the density of {element}?
What is {element}?
How heavy is a {animal}?/How long does a {animal} live?/What does a {animal} eat?
How fast is a {animal}?
Where does a {animal} live?/Is a {animal} dangerous?/Can I keep a {animal}?
What colour is my {animal}?
When was {book} written?/What is {book} about?/How does {book} end?/Is {book} a good book?
How many pages does {book} have?/Who is the hero of {book}?/What is the distance to {planet}?
How many moons does {planet} have?/Is there life on {planet}?/How big is {planet}?
How hot is {planet}?
How many {animal}s are there in {country}?/How do you spell {element}?/What rhymes with {animal}?
When did {country} win the world cup?/What is the anthem of {country}?
Which countries border {country}?
What is the highest mountain in {country}?/What is the dialling code of {country}?
Who rules {country}?
What time is it in {city}?/What is the national animal of {country}?
What is the climate of {country}?
Who founded {place}?/What is the wifi password?/What is the name of my dog?
Who is my teacher?"""
_HELD_OUT = """Who won the cup final in {year}?/Who scored the most goals for {team}?
How tall is {person}?/What is the address of {person}?/What did I do last summer?
Is it snowing in {place}?/How expensive is {thing}?/What is your opinion on {topic}?
Teach me {topic}./Which king ruled in {year}?/How many cars are there in {place}?
Which train goes to {place}?/Is {illness} dangerous?/Write a script in {language} that {task}.
Which spices do I need for {dish}?/Translate good morning into Italian./Write a letter to {person}.
Turn off the music./Who will be the next president?/What is the cube of {year}?
Who directed that film?/How can I get rich?/What is the name of my cat?/What did {person} invent?
What is the area of {country}?/Who is the prime minister of {country}?
What is the boiling point of {element}?
How old is {country}?/Who lives in {city}?/How big is a {animal}?/When was {book} published?
What is the mass of {planet}?/How long is the flight to {city}?/What is {country} famous for?
Which shoes should I buy?/How many songs did {person} sing?"""


def _split(table: str) -> tuple[str, ...]:
    return tuple(part for line in table.splitlines() for part in line.strip().split("/"))


TRAIN_TEMPLATES = _split(_TRAIN)
HELD_OUT_TEMPLATES = _split(_HELD_OUT)


def _gibberish(rng: random.Random) -> str:
    words = [pseudo_word(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.3:
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9)))]
    return " ".join(words) + rng.choice(("", "?", ".", "!"))


def far_subject(relation: str, rng: random.Random, *, held_out: bool = False) -> str:
    """A subject of ``relation``'s kind about which there is no fact."""
    kind = _FAR_KIND[relation]
    if held_out and kind == "country":
        return rng.choice(_FAR_COUNTRIES_HELD_OUT)
    # A word nobody knows teaches "not on my list" better than any fixed list of strangers.
    if rng.random() < 0.5:
        word = pseudo_word(rng)
        if kind in ("thing", "book", "item"):
            return f"The {word.capitalize()}" if kind == "book" else f"the {word}"
        return word.capitalize() if kind in ("country", "city") else word
    return rng.choice(_FAR_SUBJECTS[kind])


def unknown_question(rng: random.Random, *, held_out: bool = False) -> str:
    """A question that the model must decline; ``held_out`` selects unseen wordings or subjects."""
    draw = rng.random()
    if draw < 0.45:
        relation = rng.choice(tuple(_FAR_KIND))
        subject = far_subject(relation, rng, held_out=held_out)
        make = held_out_templates if held_out else train_templates
        template = rng.choice(make(RELATIONS[relation]))
        text = template.format(**fields(Fact(relation, subject, "")))
        return capitalised(text)
    if draw < 0.5:
        return _gibberish(rng)
    template = rng.choice(HELD_OUT_TEMPLATES if held_out else TRAIN_TEMPLATES)
    return template.format(**{slot: rng.choice(values) for slot, values in _ALL_SLOTS.items()})
