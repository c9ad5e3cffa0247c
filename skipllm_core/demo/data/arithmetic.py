"""Simple arithmetic: sums and differences of numbers up to 20, products up to 10 times 10."""

import random

from skipllm_core.demo.data.words import listed

OPERATIONS = "++--**/"
"""As often as they are asked for."""

_NUMBERS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)

_TRAIN = {
    "+": (
        "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a}+{b}", "{a}+{b}=",
        "{a} + {b} = ?",
        "{a} plus {b}", "How much is {a} + {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.",
        "What is the sum of {a} and {b}?", "Calculate {a} + {b}.", "What do {a} and {b} make?",
        "Can you add {a} and {b}?", "What's {a}+{b}?", "{a} and {b} is how much?",
        "Tell me {a} plus {b}.",
        "I have {a} apples and get {b} more. How many apples do I have?", "{a}+{b}?", "{a}+{b} is",
        "Compute the sum of {a} and {b}.", "Work out {a} + {b}.", "Solve {a} + {b}.",
        "What do you get if you add {a} and {b}?", "Could you calculate {a} + {b}?",
        "{a} + {b} makes what?", "Please calculate {a} + {b}.",
        "If I add {a} and {b}, what do I get?",
    ),
    "-": (
        "What is {a} - {b}?", "What is {a} minus {b}?", "{a} - {b}", "{a}-{b}", "{a}-{b}=",
        "{a} - {b} = ?",
        "{a} minus {b}", "How much is {a} - {b}?", "How much is {a} minus {b}?",
        "Take {b} from {a}.",
        "What is the difference of {a} and {b}?", "Calculate {a} - {b}.", "Subtract {b} from {a}.",
        "Can you take {b} from {a}?", "What's {a}-{b}?", "{a} less {b} is how much?", "{a}-{b}?",
        "I have {a} apples and eat {b}. How many apples do I have?", "Tell me {a} minus {b}.",
        "Compute the difference of {a} and {b}.", "Work out {a} - {b}.", "Solve {a} - {b}.",
        "What do you get if you take {b} from {a}?", "Could you calculate {a} - {b}?",
        "{a} - {b} makes what?", "Please calculate {a} - {b}.",
        "If I take {b} from {a}, what do I get?",
    ),
    "*": (
        "What is {a} * {b}?", "What is {a} times {b}?", "{a} * {b}", "{a}*{b}", "{a}x{b}",
        "{a} x {b} = ?",
        "{a} times {b}", "How much is {a} * {b}?", "How much is {a} times {b}?",
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?", "Calculate {a} * {b}.", "Multiply {a} and {b}.",
        "Can you multiply {a} by {b}?", "What's {a}*{b}?", "{a} times {b} is how much?", "{a}*{b}?",
        "Tell me {a} times {b}.", "What is {a} x {b}?",
        "Compute the product of {a} and {b}.", "Work out {a} * {b}.", "Solve {a} * {b}.",
        "What do you get if you multiply {a} by {b}?", "Could you calculate {a} * {b}?",
        "{a} * {b} makes what?", "Please calculate {a} * {b}.",
        "If I multiply {a} by {b}, what do I get?",
    ),
    "/": (
        "What is {a} / {b}?", "What is {a} divided by {b}?", "{a} / {b}", "{a}/{b}", "{a}:{b}",
        "{a} / {b} = ?", "{a} divided by {b}", "How much is {a} / {b}?", "Divide {a} by {b}.",
        "How much is {a} divided by {b}?", "Calculate {a} / {b}.", "{a}/{b}?", "{a}/{b}=",
        "Can you divide {a} by {b}?", "What's {a}/{b}?", "Tell me {a} divided by {b}.",
        "How often does {b} go into {a}?",
        "Compute the quotient of {a} and {b}.", "Work out {a} / {b}.", "Solve {a} / {b}.",
        "What do you get if you divide {a} by {b}?", "Could you calculate {a} / {b}?",
        "{a} / {b} makes what?", "Please calculate {a} / {b}.",
        "If I divide {a} by {b}, what do I get?",
    ),
}  # fmt: skip
_HELD_OUT = {
    "+": ("Compute {a} + {b}.", "What does {a} plus {b} make?", "Please add {a} and {b}."),
    "-": ("Compute {a} - {b}.", "What does {a} minus {b} make?", "Please take {b} from {a}."),
    "*": ("Compute {a} * {b}.", "What does {a} times {b} make?", "Please multiply {a} by {b}."),
    "/": ("Compute {a} / {b}.", "What does {a} divided by {b} make?", "Please divide {a} by {b}."),
}
_FOLLOW_UPS = ("And {a} {op} {b}?", "And {a}{op}{b}?", "What about {a} {op} {b}?", "{a} {op} {b}?")


def train_templates(op: str) -> tuple[str, ...]:
    return _TRAIN[op]


def held_out_templates(op: str) -> tuple[str, ...]:
    return _HELD_OUT[op]


def _draw(op: str, rng: random.Random) -> tuple[int, int]:
    if op == "*":
        return rng.randint(0, 10), rng.randint(0, 10)
    if op == "/":
        divisor = rng.randint(1, 10)
        return divisor * rng.randint(0, 10), divisor
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return (max(a, b), min(a, b)) if op == "-" and rng.random() < 0.8 else (a, b)


def answer(a: int, op: str, b: int) -> str:
    """The equation with its result, e.g. ``2 + 2 = 4.``"""
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[op]
    return f"{a} {op} {b} = {value}."


def arithmetic_exchange(
    rng: random.Random, *, held_out: bool = False, is_follow_up: bool = False
) -> tuple[str, str]:
    """(question, answer) of one problem."""
    op = rng.choice(OPERATIONS)
    a, b = _draw(op, rng)
    templates = (_HELD_OUT if held_out else _TRAIN)[op]
    if is_follow_up:
        templates = _FOLLOW_UPS
    in_words = not held_out and max(a, b) <= 20 and not is_follow_up and rng.random() < 0.15
    shown = {"a": _NUMBERS[a], "b": _NUMBERS[b]} if in_words else {"a": str(a), "b": str(b)}
    question = rng.choice(templates).format(**shown, op=op)
    return question, answer(a, op, b)


def too_hard(rng: random.Random) -> str:
    """A problem outside the tables above."""
    op = rng.choice("+-*/")
    a, b = rng.randint(21, 10 ** rng.randint(2, 4)), rng.randint(11, 10 ** rng.randint(2, 4))
    if op == "*" and rng.random() < 0.5:
        a, b = rng.randint(11, 30), rng.randint(11, 30)
    if rng.random() < 0.3:
        a, b = b, a
    template = rng.choice(_TRAIN["+"][:9]).replace("plus", {"+": "plus", "-": "minus"}.get(op, op))
    return template.replace("+", op).format(a=a, b=b)
