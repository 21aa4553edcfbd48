"""The topics of the demo dialogues: each function makes one turn, or ``None`` where its topic does not fit."""

from __future__ import annotations

from collections.abc import Callable

from demo import arithmetic
from demo.commands import COMMANDS, CONCEPT_KEYS
from demo.flags import CHAT, FLAGS, Flag
from demo.memory import (
    ask_city,
    ask_favourite,
    ask_name,
    recall_name,
    repeat,
    some_name,
    tell_city,
    tell_favourite,
    tell_name,
)
from demo.smalltalk import NAMED_SYSTEM_PROMPTS, OFF_TOPIC, OFF_TOPIC_REPLY, SMALL_TALK, SYSTEM_PROMPTS, SmallTalk
from demo.turns import REMARK, Draw, State, Turn
from demo.words import OFF_TOPIC_THINGS

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


def who_are_you(draw: Draw, state: State) -> Turn | None:
    """The assistant's own name, which a system prompt may have given."""
    state.forget_context()
    asks = ("Who are you?", "What is your name?", "What are you called?", "Introduce yourself.", "What are you?",
            "May I ask your name?", "Do you have a name?")  # fmt: skip
    reply = f"I am {state.bot}." if state.bot else f"I am {DEMO}."
    return Turn("identity", draw.say(asks), reply)


def introduce_and_ask(draw: Draw, state: State) -> Turn | None:
    """A name and a question in one message; the reply answers both."""
    introduction = tell_name(draw, state)
    question = (arithmetic.arithmetic, flag_meaning, who_are_you, command)[draw.rng.randrange(4)](draw, state)
    assert introduction is not None
    assert question is not None
    user = f"{introduction.user.rstrip('.')}. {question.user}"
    return Turn("two_in_one", user, f"{introduction.reply} {question.reply}")


WEIGHTED: tuple[tuple[Topic, int], ...] = (
    (arithmetic.arithmetic, 40),
    (arithmetic.follow_up, 40),
    (arithmetic.too_large, 4),
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
PRACTICE: dict[str, tuple[tuple[Topic, int], ...]] = {
    "copying": ((repeat, 90),),
    "memory": (
        (tell_name, 25),
        (recall_name, 60),
        (who_are_you, 15),
        (introduce_and_ask, 20),
        (tell_city, 15),
        (ask_city, 15),
        (repeat, 20),
    ),
    "sums": ((arithmetic.arithmetic, 70), (arithmetic.follow_up, 50)),
}
RECALL: tuple[tuple[Topic, int], ...] = ((ask_name, 12), (ask_city, 6), (ask_favourite, 6))


def next_turn(draw: Draw, state: State, *, last: bool, practise: str | None = None) -> Turn:
    """One more turn: a topic by weight, with more recall once there is something to remember.

    ``practise`` names a key of ``PRACTICE``, of which there are then many turns more.
    """
    if last and draw.chance(0.2):
        topics: tuple[tuple[Topic, int], ...] = ((goodbye, 1),)
    else:
        known = (state.name is not None, state.city is not None, bool(state.favourites))
        topics = (
            WEIGHTED
            + PRACTICE.get(practise or "", ())
            + tuple(entry for entry, has in zip(RECALL, known, strict=True) if has)
        )
    while True:
        (topic,) = draw.rng.choices([t for t, _ in topics], [w for _, w in topics])
        turn = topic(draw, state)
        if turn is not None:
            return turn
