"""What the demo model is told and asked to say again: words to repeat, the user's name, city and favourite things."""

from __future__ import annotations

from demo.turns import REMARK, UNCLOSED, Draw, State, Turn
from demo.words import CITIES, COUNTED, FAVOURITES, NAME_ENDINGS, NAMES, SYLLABLES


def some_name(draw: Draw) -> str:
    """A first name of this split: a real one or made of syllables, so that copying is learnt rather than a list."""
    made_up = ["".join(draw.choice(SYLLABLES) for _ in range(draw.rng.randint(2, 3))) for _ in range(20)]
    pool = NAMES if draw.chance(0.5) else [name.capitalize() + draw.choice(NAME_ENDINGS) for name in made_up]
    name = draw.pick(pool)
    return name.lower() if draw.chance(0.15) else name


def repeat(draw: Draw, state: State) -> Turn | None:
    """Words to say after the user. What is learnt here, copying, is what remembering and sums begin with."""
    state.forget_context()
    kinds = (lambda: some_name(draw), lambda: str(draw.rng.randint(0, 9999)), lambda: draw.choice(COUNTED))
    text = " ".join(kinds[draw.rng.randrange(3)]() for _ in range(draw.rng.randint(1, 6)))
    asks = (
        "Repeat after me: {text}",
        "Say: {text}",
        "Repeat: {text}",
        "Please say {text}",
        "Can you repeat this? {text}",
    )
    return Turn("repeat", draw.say(asks, UNCLOSED, text=text), text)


def tell_name(draw: Draw, state: State) -> Turn | None:
    """The user's name, or a new one."""
    state.forget_context()
    tells = ("My name is {name}.", "I am {name}.", "I'm {name}.", "Call me {name}.", "You can call me {name}.",
             "I am called {name}.", "Hello, I am {name}.", "Hi, my name is {name}.", "This is {name}.",
             "People call me {name}.", "Remember that my name is {name}.")  # fmt: skip
    state.name = some_name(draw)
    return Turn("memory", draw.say(tells, REMARK, name=state.name), f"Nice to meet you, {state.name}!")


def ask_name(draw: Draw, state: State) -> Turn | None:
    """Does the model remember the user's name?"""
    state.forget_context()
    asks = ("What is my name?", "Who am I?", "Do you remember my name?", "Do you know my name?", "What am I called?",
            "Can you tell me my name?", "What did I say my name was?", "Say my name.")  # fmt: skip
    reply = f"Your name is {state.name}." if state.name else "You have not told me your name yet."
    return Turn("memory", draw.say(asks), reply)


def recall_name(draw: Draw, state: State) -> Turn | None:
    """The name again, only if it was told."""
    return ask_name(draw, state) if state.name else None


def tell_city(draw: Draw, state: State) -> Turn | None:
    """Where the user lives."""
    state.forget_context()
    tells = (
        "I live in {city}.",
        "I am from {city}.",
        "My home is {city}.",
        "I come from {city}.",
        "My city is {city}.",
    )
    state.city = draw.pick(CITIES) if draw.chance(0.8) else some_name(draw)
    return Turn("memory", draw.say(tells, REMARK, city=state.city), f"{state.city}, good to know!")


def ask_city(draw: Draw, state: State) -> Turn | None:
    """Does the model remember where the user lives?"""
    state.forget_context()
    asks = ("Where do I live?", "Where am I from?", "Which city do I live in?", "Do you remember where I live?",
            "What is my city?", "Do you know where I come from?")  # fmt: skip
    reply = f"You live in {state.city}." if state.city else "You have not told me where you live."
    return Turn("memory", draw.say(asks), reply)


def tell_favourite(draw: Draw, state: State) -> Turn | None:
    """A favourite colour, food, animal …"""
    state.forget_context()
    kind = draw.choice(list(FAVOURITES))
    tells = ("My favourite {kind} is {value}.", "My favorite {kind} is {value}.", "The {kind} I like best is {value}.",
             "{value} is my favourite {kind}.", "Remember that my favourite {kind} is {value}.")  # fmt: skip
    value = state.favourites[kind] = draw.choice(FAVOURITES[kind])
    return Turn("memory", draw.say(tells, REMARK, kind=kind, value=value), f"Noted: your favourite {kind} is {value}.")


def ask_favourite(draw: Draw, state: State) -> Turn | None:
    """Does the model remember a favourite?"""
    state.forget_context()
    kinds = list(state.favourites) if state.favourites and draw.chance(0.7) else list(FAVOURITES)
    kind = draw.choice(kinds)
    asks = ("What is my favourite {kind}?", "What is my favorite {kind}?", "Which {kind} do I like best?",
            "Do you remember my favourite {kind}?", "Tell me my favourite {kind}.")  # fmt: skip
    value = state.favourites.get(kind)
    reply = f"Your favourite {kind} is {value}." if value else f"You have not told me your favourite {kind}."
    return Turn("memory", draw.say(asks, kind=kind), reply)
