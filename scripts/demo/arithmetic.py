"""Sums of the demo dialogues: small numbers, in digits or words, in words problems, and carried on from turn to turn.

Each reply repeats the sum before its result ("7 + 8 = 15."), which makes the result depend on the tokens next to it.
Some ordered pairs of ``+`` and ``x`` are kept from training altogether while their mirror images are learnt: the topic
``arithmetic_new_pairs`` measures whether the model found out that the order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable

from demo.turns import Draw, State, Turn, is_held_out
from demo.words import COUNTED, NUMBERS

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "x": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}
ASK = (
    *("What is {s}?", "How much is {s}?", "{s}?", "{s} = ?", "Calculate {s}.", "Can you compute {s}?", "Compute {s}."),
    *("What does {s} make?", "What do you get for {s}?", "Tell me what {s} is.", "Work out {s}.", "I need {s}."),
)
SPELLINGS = {
    "+": ("{a} + {b}", "{a}+{b}", "{a} plus {b}", "the sum of {a} and {b}", "{a} and {b} together"),
    "-": ("{a} - {b}", "{a}-{b}", "{a} minus {b}", "{a} less {b}", "{a} take away {b}"),
    "x": ("{a} x {b}", "{a} * {b}", "{a}*{b}", "{a} times {b}", "{a} multiplied by {b}", "the product of {a} and {b}"),
    "/": ("{a} / {b}", "{a}/{b}", "{a} divided by {b}", "{a} over {b}"),
}
STORIES = {
    "+": (
        "I have {a} {thing} and get {b} more. How many do I have?",
        "There are {a} {thing} here and {b} there. How many are there in all?",
        "I bought {a} {thing} today and {b} yesterday. How many is that?",
    ),
    "-": (
        "I have {a} {thing} and lose {b}. How many are left?",
        "There were {a} {thing} and {b} are gone. How many are left?",
        "I had {a} {thing} and gave away {b}. How many do I have now?",
    ),
    "x": (
        "I have {a} bags with {b} {thing} each. How many {thing} are there?",
        "{a} people have {b} {thing} each. How many is that?",
    ),
}
FOLLOW = {
    "+": ("Add {b}.", "Add {b} to that.", "Plus {b}?", "And {b} more?", "Now add {b}.", "What if I add {b}?"),
    "-": ("Subtract {b}.", "Take away {b}.", "Minus {b}?", "Now subtract {b} from that.", "And minus {b}?"),
    "x": ("Times {b}?", "Multiply that by {b}.", "Now multiply it by {b}.", "And times {b}?"),
}
TOO_LARGE = "Such numbers are too large for me. Try numbers up to 20."


def operands(draw: Draw, operation: str) -> tuple[int, int]:
    """Two numbers: up to 20 for sums and differences, up to 10 for products and exact quotients."""
    largest = 20 if operation in "+-" else 10
    a, b = draw.rng.randint(0, largest), draw.rng.randint(0, largest)
    if operation == "-" and a < b and draw.chance(0.5):
        a, b = b, a
    return (a * max(b, 1), max(b, 1)) if operation == "/" else (a, b)


def is_new_pair(operation: str, a: int, b: int) -> bool:
    """Whether training never shows this ordered pair (it does show the mirrored one)."""
    withheld = operation in "+x" and is_held_out(f"{a}{operation}{b}")
    return withheld and a != b and not is_held_out(f"{b}{operation}{a}")


def answer(operation: str, a: int, b: int) -> str:
    """The sum and its result, as in ``7 + 8 = 15.``"""
    return f"{a} {operation} {b} = {OPERATIONS[operation](a, b)}."


def arithmetic(draw: Draw, state: State) -> Turn | None:
    """A sum, plain or as a story; in held-out dialogues one in four is a pair that training never shows."""
    operation = draw.choice("+++--xx/")
    a, b = operands(draw, operation)
    wants_new = draw.held_out and operation in "+x" and draw.chance(0.4)
    while is_new_pair(operation, a, b) != wants_new:
        a, b = operands(draw, operation)
    state.forget_context()
    state.last_result = OPERATIONS[operation](a, b)
    topic = "arithmetic_new_pairs" if wants_new else "arithmetic"
    return Turn(topic, _question(draw, operation, a, b), answer(operation, a, b))


def _question(draw: Draw, operation: str, a: int, b: int) -> str:
    number: Callable[[int], str] = str
    if max(a, b) <= 20 and draw.chance(0.15):
        number = NUMBERS.__getitem__
    fits_story = operation in "+x" or (operation == "-" and a >= b)
    if fits_story and draw.chance(0.2):
        return draw.say(STORIES[operation], a=number(a), b=number(b), thing=draw.choice(COUNTED))
    spelling = draw.choice(SPELLINGS[operation]).format(a=number(a), b=number(b))
    return draw.say(ASK, s=spelling)


def follow_up(draw: Draw, state: State) -> Turn | None:
    """Go on with the last result: "add 5" after "7 + 8 = 15."."""
    result = state.last_result
    if result is None or not 0 <= result <= 40:
        return None
    operation = draw.choice("++--x" if result <= 10 else "++--")
    b = draw.rng.randint(0, 20 if result <= 20 and operation != "x" else 10)
    if is_new_pair(operation, result, b):
        return None
    state.forget_context()
    state.last_result = OPERATIONS[operation](result, b)
    return Turn("arithmetic_follow_up", draw.say(FOLLOW[operation], b=str(b)), answer(operation, result, b))


def too_large(draw: Draw, state: State) -> Turn | None:
    """A sum beyond what was learnt; the reply says so instead of guessing."""
    operation = draw.choice("+-x/")
    least = {"+": 21, "-": 21, "x": 11, "/": 101}[operation]
    a, b = (
        draw.rng.randint(least, draw.rng.choice((120, 999, 9999))),
        draw.rng.randint(2, draw.rng.choice((20, 999, 9999))),
    )
    state.forget_context()
    spelling = draw.choice(SPELLINGS[operation]).format(a=a, b=b)
    return Turn("arithmetic", draw.say(ASK, s=spelling), TOO_LARGE)
