"""The plots of the short stories: per sentence some wordings, per plot one summary.

Fields: ``{n}`` hero's name, ``{k}`` kind (``{ak}`` with its article, ``{ad}`` with an adjective
too), ``{h}`` friend's name, ``{hk}``/``{ahk}`` friend's kind, ``{o}``/``{ao}`` object, ``{p}``
place, ``{at}`` place with its preposition, ``{f}``/``{g}`` foods, ``{skill}``, ``{fear}``,
``{b}``/``{ab}`` building, ``{pet}``, and the hero's pronouns ``{he} {him} {his} {He}``.
"""

from dataclasses import dataclass

_OPENINGS = (
    "Once upon a time, there was {ad} named {n}.",
    "There once was {ad} named {n}.",
    "Long ago, there lived {ad} named {n}.",
    "This is the story of {ad} named {n}.",
)
_FRIEND = (
    "Then {he} met {ahk} named {h}.",
    "Soon {ahk} named {h} came by.",
    "There {he} saw {ahk} named {h}.",
    "On the way, {he} met {ahk} named {h}.",
)
_HAPPY = (
    "{n} was very happy and thanked {h}.",
    "From that day on, {n} and {h} were best friends.",
    "In the evening, {n} went home with a big smile.",
    "{n} never forgot that day.",
    "And so {n} and {h} became good friends.",
)


@dataclass(frozen=True, slots=True)
class Plot:
    """``sentences`` holds the wordings of each sentence in order; ``summary`` is one sentence."""

    summary: str
    sentences: tuple[tuple[str, ...], ...]
    is_tale: bool = True  # a tale may be told on request; other plots are only summarised


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    """One line per sentence, its wordings split by "/"."""
    return tuple(tuple(line.strip().split(" / ")) for line in text.strip().splitlines())


PLOTS: dict[str, Plot] = {
    "lost": Plot(
        "{ak} named {n} lost {ao} {at} and found it again with the help of {h}.",
        (
            _OPENINGS,
            *_table("""{n} had {ao} and took it everywhere. / More than anything, {n} loved {ao}.
                One day, {he} lost it {at}. / But one morning, {he} lost it {at}.
                {He} looked everywhere, but the {o} was gone. / {He} was sad and began to cry."""),
            _FRIEND,
            *_table("""Together, {n} and {h} found the {o} under a stone. / \
{h} helped {him} look, and soon they found the {o} behind a tree."""),
            _HAPPY,
        ),
    ),
    "returned": Plot(
        "{ak} named {n} found {ao} {at} and gave it back to {h}.",
        (
            _OPENINGS,
            *_table("""One day, {n} found {ao} {at}. / One morning, {he} saw {ao} {at}.
                {He} wanted to keep it, because it was so pretty. / It was so nice that {he} \
took it along."""),
            _FRIEND,
            *_table("""{h} was sad because the {o} was gone. / "I lost my {o}," said {h}.
                {n} gave the {o} back at once. / So {n} gave it back to {h}."""),
            _HAPPY,
        ),
    ),
    "rescue": Plot(
        "{ak} named {n} saved {h} {at} with {ao}.",
        (
            _OPENINGS,
            *_table("""One day, {n} heard a cry for help {at}. / One night, {he} heard someone \
call for help {at}.
                It was {ahk} named {h}, who was stuck in a hole. / {ahk} named {h} had fallen \
into a deep hole.
                {n} had {ao} and used it to pull {h} out. / With {ao}, {n} pulled {h} out of \
the hole."""),
            _HAPPY,
        ),
    ),
    "shared": Plot(
        "{ak} named {n} shared {f} with {h} {at}.",
        (
            _OPENINGS,
            *_table("""One day, {n} had some {f} for lunch. / {He} carried {f} in a small bag.
                {He} sat down {at} to eat. / {At}, {he} sat down to rest."""),
            _FRIEND,
            *_table("""{h} was very hungry and had nothing to eat. / {h} had not eaten all day.
                So {n} shared the {f}, and both were full. / {n} gave {h} half of the {f}."""),
            _HAPPY,
        ),
    ),
    "learned": Plot(
        "{ak} named {n} learned to {skill} with the help of {h}.",
        (
            _OPENINGS,
            *_table("""{n} wanted to {skill}, but {he} did not know how. / More than anything, \
{n} wanted to {skill}.
                {He} tried it {at} every day, but it was hard. / {At}, {he} tried and tried, \
but it did not work."""),
            _FRIEND,
            *_table("""{h} showed {him} how to do it, step by step. / "I will help you," said {h}.
                After many days, {n} could {skill} very well. / At last, {n} could {skill} \
better than anyone."""),
            _HAPPY,
        ),
    ),
    "race": Plot(
        "{ak} named {n} won a race to {p} against {h}.",
        (
            _OPENINGS,
            *_table("""One day, {ahk} named {h} laughed at {n}. / {n} knew {ahk} named {h}, who \
was very proud.
                "I am faster than you," said {h}. / "Nobody is faster than me," said {h}.
                So they ran a race to {p}. / They agreed to race to {p}.
                {h} stopped to sleep, but {n} went on and on. / {h} stopped to eat, but {n} \
did not rest.
                In the end, {n} won the race. / {n} came first and won."""),
            _HAPPY,
        ),
    ),
    "afraid": Plot(
        "{ak} named {n} was afraid of {fear} until {h} gave {him} {ao}.",
        (
            _OPENINGS,
            *_table("""{n} was afraid of {fear}. / There was one thing {he} feared: {fear}.
                {He} did not dare to go out {at}. / {At}, {he} hid all day long."""),
            _FRIEND,
            *_table("""{h} gave {him} {ao} and said, "This will help you." / "Take this," said \
{h}, and gave {him} {ao}.
                With the {o}, {n} was not afraid any more. / From then on, {n} was brave."""),
            _HAPPY,
        ),
    ),
    "gift": Plot(
        "{ak} named {n} made {ao} for the birthday of {h}.",
        (
            _OPENINGS,
            *_table("""{n} had a friend, {ahk} named {h}. / The best friend of {n} was {ahk} \
named {h}.
                The birthday of {h} was near, but {n} had no money. / {n} wanted to give {h} \
something for the birthday.
                So {he} sat down {at} and made {ao}. / {At}, {he} worked all day and made {ao}.
                {h} loved the {o} more than all other gifts. / "This is the best gift of all," \
said {h}."""),
            _HAPPY,
        ),
    ),
    "journey": Plot(
        "{ak} named {n} walked to {p}, found {ao} and brought it home.",
        (
            _OPENINGS,
            *_table("""{n} wanted to see {p}. / All {his} life, {n} had dreamed of {p}.
                So {he} packed some {f} and walked for three days. / {He} walked for many days \
and ate only {f}.
                At last, {he} came to {p}. / Finally, {he} saw {p}.
                There {he} found {ao}. / Under a tree lay {ao}.
                {n} took it home and showed it to everyone. / {He} brought the {o} home."""),
            ("{n} never forgot that day.", "In the evening, {n} went home with a big smile."),
        ),
    ),
    "built": Plot(
        "{ak} named {n} built {ab} {at} together with {h}.",
        (
            _OPENINGS,
            *_table("""{n} wanted to build {ab} {at}. / One day, {n} began to build {ab} {at}.
                But the work was too hard for one alone. / The wood was heavy, and soon {he} \
was tired."""),
            _FRIEND,
            *_table("""{h} was strong and liked to help. / "Let us do it together," said {h}.
                They worked together, and soon the {b} was ready. / After a week, the {b} \
was done."""),
            _HAPPY,
        ),
    ),
    "sorry": Plot(
        "{ak} named {n} broke the {o} of {h} and said sorry.",
        (
            _OPENINGS,
            *_table("""{n} had a friend, {ahk} named {h}. / The best friend of {n} was {ahk} \
named {h}.
                One day {at}, {n} broke the {o} of {h}. / They played {at}, and {n} broke \
the {o} of {h}.
                At first, {he} wanted to hide it. / {n} felt very bad and could not sleep.
                Then {he} told the truth and said sorry. / The next day, {he} said, "I am sorry."
                {h} was not angry at all. / "That is all right," said {h}."""),
            _HAPPY,
        ),
    ),
    "shopping": Plot(
        "{n} bought {f} and {g} at the market.",
        _table("""{n} went to the market. / In the morning, {n} walked to the market.
            There {he} bought {f} and {g}. / {He} bought some {f} and some {g}.
            Then {he} met {h} and they talked. / The weather was nice. / {He} paid with a coin.
            After that, {he} went home. / Then {he} went home and cooked."""),
        is_tale=False,
    ),
    "play": Plot(
        "{n} and {h} played with {ao} {at}.",
        _table("""{n} and {h} were friends. / {n} and {h} had a free day. / It was a warm day.
            {n} and {h} played with {ao} {at}. / They went out, and {n} and {h} played with \
{ao} {at}.
            In the evening, they were tired but happy. / Then it began to rain and they went home.
            """),
        is_tale=False,
    ),
    "pet": Plot(
        "{n} lost a {pet} and found it {at}.",
        _table("""{n} had a {pet}. / {n} lived with a small {pet}.
            One day, the {pet} ran away. / Last night, the {pet} was gone.
            {n} asked {h}, but {h} had not seen it. / {n} was sad and looked all day.
            At last, {n} found the {pet} {at}. / In the end, the {pet} was sitting {at}.
            """),
        is_tale=False,
    ),
    "visit": Plot(
        "{n} visited {h} and brought {f}.",
        _table("""{h} was ill and had to stay in bed. / {h} was alone and a little sad.
            So {n} visited {h} and brought {f}. / {n} came to visit and brought some {f}.
            They talked and laughed for an hour. / They played a game together.
            {h} felt much better. / Then {n} went home."""),
        is_tale=False,
    ),
}
