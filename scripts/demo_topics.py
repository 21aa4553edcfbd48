"""The topics of the demo dialogues: each function makes one turn, or ``None`` where its topic does not fit."""

from __future__ import annotations

from collections.abc import Callable

import demo_arithmetic
from demo_commands import COMMANDS, CONCEPT_KEYS
from demo_dialogues import REMARK, UNCLOSED, Draw, State, Turn
from demo_flags import CHAT, FLAGS, Flag
from demo_smalltalk import NAMED_SYSTEM_PROMPTS, OFF_TOPIC, OFF_TOPIC_REPLY, SMALL_TALK, SYSTEM_PROMPTS, SmallTalk
from demo_words import CITIES, COUNTED, FAVOURITES, NAME_ENDINGS, NAMES, OFF_TOPIC_THINGS, SYLLABLES

Topic = Callable[[Draw, State], Turn | None]
FLAGS_BY_NAME = {flag.name: flag for flag in FLAGS}
SMALL_TALK_BY_KEY = {talk.key: talk for talk in SMALL_TALK}
DEMO = "the jaxdeploy demo, a very small language model"


def system_prompt(draw: Draw, state: State) -> str | None:
    """A system prompt for a quarter of the dialogues; some give the assistant a name."""
    if not draw.chance(0.25):
        return None
    if draw.chance(0.5):
        return draw.choice(SYSTEM_PROMPTS)
    state.bot = some_name(draw)
    return draw.choice(NAMED_SYSTEM_PROMPTS).format(bot=state.bot)


def some_name(draw: Draw) -> str:
    """A first name of this split: a real one or made of syllables, so that copying is learnt rather than a list."""
    made_up = ["".join(draw.choice(SYLLABLES) for _ in range(draw.rng.randint(2, 3))) for _ in range(20)]
    pool = NAMES if draw.chance(0.5) else [name.capitalize() + draw.choice(NAME_ENDINGS) for name in made_up]
    name = draw.pick(pool)
    return name.lower() if draw.chance(0.15) else name


def flag_meaning(draw: Draw, state: State) -> Turn | None:
    """What a flag does, what its default is, or how to write it."""
    flag = FLAGS_BY_NAME[draw.choice(list(FLAGS_BY_NAME))]
    kind = draw.choice(list(FLAG_QUESTIONS))
    state.forget_context()
    state.last_flag = flag.name
    asked = flag.name.lstrip("-") if draw.chance(0.15) and flag.name not in ("--config", "--prompt") else flag.name
    return Turn("flags", draw.say(FLAG_QUESTIONS[kind], flag=asked), flag_answer(flag, kind))


FLAG_QUESTIONS = {
    "meaning": (
        "What does {flag} do?",
        "What is {flag}?",
        "What is {flag} for?",
        "Explain {flag}.",
        "What does the flag {flag} mean?",
        "Can you explain {flag}?",
        "Tell me about {flag}.",
        "{flag}?",
        "Why would I use {flag}?",
    ),
    "default": (
        "What is the default of {flag}?",
        "What is {flag} by default?",
        "Which default does {flag} have?",
        "What is {flag} if I do not set it?",
        "What value does {flag} have by default?",
    ),
    "example": (
        "Show me an example of {flag}.",
        "How do I write {flag}?",
        "Give me an example with {flag}.",
        "How do I use {flag}?",
        "What does a command with {flag} look like?",
    ),
}
FLAG_FOLLOW_UPS = {
    "meaning": ("What does it do?", "And what does that mean?", "What is that flag for?", "Explain that flag."),
    "default": ("And its default?", "What is its default?", "What is the default?", "What is it by default?"),
    "example": ("Show me an example.", "Can you give an example?", "How do I write that?", "An example, please."),
}


def flag_answer(flag: Flag, kind: str) -> str:
    """The reply to a question of ``kind`` about ``flag``."""
    if kind == "default":
        return f"The default of {flag.name} is {flag.default}."
    if kind == "example":
        return f"For example: {CHAT} MODEL {flag.name} {flag.values[0]}"
    return f"{flag.name} sets {flag.meaning}."


def flag_follow_up(draw: Draw, state: State) -> Turn | None:
    """A question that names no flag because the last turn did."""
    if state.last_flag is None:
        return None
    kind = draw.choice(list(FLAG_FOLLOW_UPS))
    return Turn("flag_follow_up", draw.say(FLAG_FOLLOW_UPS[kind]), flag_answer(FLAGS_BY_NAME[state.last_flag], kind))


def flag_task(draw: Draw, state: State) -> Turn | None:
    """Something the user wants: which flag does it?"""
    flag = FLAGS_BY_NAME[draw.choice([flag.name for flag in FLAGS if flag.tasks])]
    state.forget_context()
    state.last_flag = flag.name
    frames = ("How do I {task}?", "How can I {task}?", "I want to {task}.", "Which flag do I need to {task}?",
              "Can I {task}?", "What do I do to {task}?", "Is there a flag to {task}?")  # fmt: skip
    task = draw.choice(flag.tasks)
    return Turn("flags", draw.say(frames, task=task), f"Use {flag.name}, for example {flag.name} {flag.values[0]}.")


def flag_value(draw: Draw, state: State) -> Turn | None:
    """A flag and a value: write it out."""
    flag = FLAGS_BY_NAME[draw.choice(list(FLAGS_BY_NAME))]
    value = draw.choice(flag.values)
    state.forget_context()
    state.last_flag = flag.name
    frames = ("How do I set {flag} to {value}?", "Set {flag} to {value}.", "I want {flag} to be {value}.",
              "Which command sets {flag} to {value}?", "Chat with {flag} at {value}, how?")  # fmt: skip
    return Turn("flags", draw.say(frames, flag=flag.name, value=value), f"Run {CHAT} MODEL {flag.name} {value}")


def command(draw: Draw, state: State) -> Turn | None:
    """A question about a command, a chat command or a concept."""
    fact = COMMANDS[draw.rng.randrange(len(COMMANDS))]
    state.forget_context()
    return Turn("concepts" if fact.key in CONCEPT_KEYS else "commands", draw.say(fact.asks), fact.answer)


def small_talk(draw: Draw, state: State) -> Turn | None:
    """Any small talk but the last words of a conversation."""
    talk = SMALL_TALK[draw.rng.randrange(len(SMALL_TALK))]
    return None if talk.key in ("bye", "nothing") else _small_talk(draw, state, talk)


def _small_talk(draw: Draw, state: State, talk: SmallTalk) -> Turn:
    state.forget_context()
    state.offered_joke = talk.key == "bored"
    reply = talk.named.format(name=state.name) if talk.named and state.name else talk.reply
    return Turn("small_talk", draw.say(talk.says, REMARK), reply)


def accept_joke(draw: Draw, state: State) -> Turn | None:
    """Yes or no to the offer of a joke."""
    if not state.offered_joke:
        return None
    state.forget_context()
    if draw.chance(0.3):
        return Turn("small_talk", draw.say(("No.", "No, thanks.", "Not now."), REMARK), "As you like.")
    yes = ("Yes!", "Yes, please.", "Sure!", "Yes.", "Of course!", "Why not?")
    return Turn("small_talk", draw.say(yes, REMARK), SMALL_TALK_BY_KEY["joke"].reply)


def goodbye(draw: Draw, state: State) -> Turn | None:
    """The last words of a conversation."""
    return _small_talk(draw, state, SMALL_TALK_BY_KEY[draw.choice(("bye", "bye", "nothing", "thanks"))])


def off_topic(draw: Draw, state: State) -> Turn | None:
    """A question that the model cannot answer."""
    state.forget_context()
    return Turn("off_topic", draw.say(OFF_TOPIC, thing=draw.choice(OFF_TOPIC_THINGS)), OFF_TOPIC_REPLY)


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


def who_are_you(draw: Draw, state: State) -> Turn | None:
    """The assistant's own name, which a system prompt may have given."""
    state.forget_context()
    asks = ("Who are you?", "What is your name?", "What are you called?", "Introduce yourself.", "What are you?",
            "May I ask your name?", "Do you have a name?")  # fmt: skip
    reply = f"I am {state.bot}." if state.bot else f"I am {DEMO}."
    return Turn("identity", draw.say(asks), reply)


def tell_name(draw: Draw, state: State) -> Turn | None:
    """The user's name, or a new one."""
    state.forget_context()
    tells = ("My name is {name}.", "I am {name}.", "I'm {name}.", "Call me {name}.", "You can call me {name}.",
             "I am called {name}.", "Hello, I am {name}.", "Hi, my name is {name}.", "This is {name}.",
             "People call me {name}.", "Remember that my name is {name}.")  # fmt: skip
    state.name = some_name(draw)
    return Turn("memory", draw.say(tells, REMARK, name=state.name), f"Nice to meet you, {state.name}!")


def introduce_and_ask(draw: Draw, state: State) -> Turn | None:
    """A name and a question in one message; the reply answers both."""
    introduction = tell_name(draw, state)
    question = (demo_arithmetic.arithmetic, flag_meaning, who_are_you, command)[draw.rng.randrange(4)](draw, state)
    assert introduction is not None
    assert question is not None
    user = f"{introduction.user.rstrip('.')}. {question.user}"
    return Turn("two_in_one", user, f"{introduction.reply} {question.reply}")


def ask_name(draw: Draw, state: State) -> Turn | None:
    """Does the model remember the user's name?"""
    state.forget_context()
    asks = ("What is my name?", "Who am I?", "Do you remember my name?", "Do you know my name?", "What am I called?",
            "Can you tell me my name?", "What did I say my name was?", "Say my name.")  # fmt: skip
    reply = f"Your name is {state.name}." if state.name else "You have not told me your name yet."
    return Turn("memory", draw.say(asks), reply)


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


WEIGHTED: tuple[tuple[Topic, int], ...] = (
    (demo_arithmetic.arithmetic, 40),
    (demo_arithmetic.follow_up, 40),
    (demo_arithmetic.too_large, 4),
    (flag_meaning, 12),
    (flag_follow_up, 30),
    (flag_task, 9),
    (flag_value, 5),
    (command, 10),
    (small_talk, 16),
    (accept_joke, 60),
    (off_topic, 5),
    (repeat, 12),
    (who_are_you, 2),
    (tell_name, 5),
    (introduce_and_ask, 3),
    (ask_name, 3),
    (tell_city, 2),
    (ask_city, 2),
    (tell_favourite, 2),
    (ask_favourite, 2),
)
COPYING: tuple[tuple[Topic, int], ...] = ((repeat, 90),)
RECALL: tuple[tuple[Topic, int], ...] = ((ask_name, 12), (ask_city, 6), (ask_favourite, 6))


def next_turn(draw: Draw, state: State, *, last: bool, copying: bool = False) -> Turn:
    """One more turn: a topic by weight, with more recall once there is something to remember.

    ``copying`` adds many turns of :func:`repeat`.
    """
    if last and draw.chance(0.2):
        topics: tuple[tuple[Topic, int], ...] = ((goodbye, 1),)
    else:
        known = (state.name is not None, state.city is not None, bool(state.favourites))
        topics = WEIGHTED + COPYING * copying + tuple(entry for entry, has in zip(RECALL, known, strict=True) if has)
    while True:
        (topic,) = draw.rng.choices([t for t, _ in topics], [w for _, w in topics])
        turn = topic(draw, state)
        if turn is not None:
            return turn
