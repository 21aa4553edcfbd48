"""The demo model's dialogues: the same for a seed, true to their own state, and never leaking held-out combinations."""

from __future__ import annotations

import importlib
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = str(Path(__file__).resolve().parents[1] / "scripts")


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    sys.path.insert(0, SCRIPTS)
    yield importlib.import_module("demo.dialogues")
    sys.path.remove(SCRIPTS)


@pytest.fixture(scope="module")
def training(demo: Any) -> list[Any]:
    return list(demo.make_dialogues(1, 600))


@pytest.fixture(scope="module")
def held_out(demo: Any) -> list[Any]:
    return list(demo.make_dialogues(1, 300, held_out=True))


def turns(dialogues: list[Any]) -> list[Any]:
    return [turn for dialogue in dialogues for turn in dialogue.turns]


def test_same_seed_same_dialogues(demo: Any) -> None:
    assert demo.make_dialogues(7, 20) == demo.make_dialogues(7, 20)
    assert demo.make_dialogues(7, 20) != demo.make_dialogues(8, 20)


def test_dialogues_have_one_to_six_turns_of_every_topic(training: list[Any]) -> None:
    assert {len(dialogue.turns) for dialogue in training} == {1, 2, 3, 4, 5, 6}
    assert {turn.topic for turn in turns(training)} == {
        *("arithmetic", "arithmetic_follow_up", "flags", "flag_follow_up", "commands", "concepts", "small_talk"),
        *("memory", "identity", "off_topic", "two_in_one", "repeat"),
    }


def test_messages_alternate_after_an_optional_system_prompt(training: list[Any]) -> None:
    for dialogue in training[:50]:
        roles = [message["role"] for message in dialogue.messages()]
        assert roles[-2 * len(dialogue.turns) :] == ["user", "assistant"] * len(dialogue.turns)
        assert roles[: -2 * len(dialogue.turns)] == ([] if dialogue.system is None else ["system"])


def test_no_slot_is_left_open(training: list[Any], held_out: list[Any]) -> None:
    for turn in turns(training + held_out):
        assert not set("{}") & set(turn.user + turn.reply)


def test_sums_are_right(training: list[Any], held_out: list[Any]) -> None:
    sums = [match for turn in turns(training + held_out) if (match := re.search(r"(\d+) ([-+x/]) (\d+) = (-?\d+)\.",
                                                                                turn.reply))]  # fmt: skip
    assert len(sums) > 200
    for match in sums:
        a, operation, b, result = match.groups()
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b), "/": int(a) / max(int(b), 1)}
        assert value[operation] == int(result)


def test_a_name_is_remembered(training: list[Any], held_out: list[Any]) -> None:
    recalled = 0
    for dialogue in training + held_out:
        name = None
        for turn in dialogue.turns:
            told = re.match(r"Nice to meet you, (\w+)!", turn.reply)
            name = told[1] if told else name
            if asked := re.fullmatch(r"Your name is (\w+)\.", turn.reply):
                assert asked[1] == name
                recalled += 1
            if turn.reply == "You have not told me your name yet.":
                assert name is None
    assert recalled > 20


def test_held_out_wordings_do_not_occur_in_training(demo: Any) -> None:
    draw = importlib.import_module("demo.turns").Draw
    wordings, train, test = ("What is {x}?", "And {x}?"), set(), set()
    for fillers in (f"thing{i}" for i in range(100)):
        train.add(draw(random.Random(1)).say(wordings, x=fillers).lower())
        test.add(draw(random.Random(1), held_out=True).say(wordings, x=fillers).lower())
    assert not train & test


def test_held_out_names_and_pairs_do_not_occur_in_training(demo: Any, training: list[Any], held_out: list[Any]) -> None:
    def names(dialogues: list[Any]) -> set[str]:
        return {match[1] for turn in turns(dialogues) if (match := re.match(r"Nice to meet you, (\w+)!", turn.reply))}

    def pairs(dialogues: list[Any], topic: str) -> set[str]:
        return {turn.reply for turn in turns(dialogues) if turn.topic == topic}

    capitalised = {name for name in names(training) if name[0].isupper()}
    assert not capitalised & names(held_out)
    new = pairs(held_out, "arithmetic_new_pairs")
    assert new
    assert not new & (pairs(training, "arithmetic") | pairs(training, "arithmetic_follow_up"))


@pytest.fixture(scope="module")
def tokenizer(demo: Any, training: list[Any]) -> Any:
    return importlib.import_module("demo.tokenizer").train_tokenizer(training, 512)


def test_tokens_of_a_dialogue_are_those_of_its_chat_template(training: list[Any], tokenizer: Any) -> None:
    import jinja2

    module = importlib.import_module("demo.tokenizer")
    template = jinja2.Environment().from_string(module.CHAT_TEMPLATE)
    for dialogue in training[:20]:
        text = template.render(bos_token="<s>", messages=dialogue.messages())
        assert module.encode_dialogue(tokenizer, dialogue)[0] == tokenizer.encode(text, add_special_tokens=False).ids


def test_only_replies_are_learnt(training: list[Any], tokenizer: Any) -> None:
    module = importlib.import_module("demo.tokenizer")
    for dialogue in training[:20]:
        ids, owner = module.encode_dialogue(tokenizer, dialogue)
        for number, turn in enumerate(dialogue.turns, start=1):
            mine = [token for token, reply in zip(ids, owner, strict=True) if reply == number]
            assert tokenizer.decode(mine, skip_special_tokens=False) == turn.reply + "<|im_end|>"


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.encode("1234 + 56", add_special_tokens=False).tokens[:4] == list("1234")


def test_batches_follow_from_seed_and_step(demo: Any, tokenizer: Any) -> None:
    pytest.importorskip("optax")
    module = importlib.import_module("demo.training")
    path = Path(SCRIPTS).parent / "configs/train/demo.yaml"
    config = module.TrainConfig.read(path, ["length=64", "tokens_per_step=128", "steps=10"])
    first, again = (module.batch(config, tokenizer, 3) for _ in range(2))
    assert (first[0] == again[0]).all()
    assert first[0].shape == first[1].shape == (2, 64)
    counted = first[1] != module.IGNORE
    assert (first[1][:, :-1][counted[:, :-1]] == first[0][:, 1:][counted[:, :-1]]).all()


def test_an_unknown_setting_is_named(demo: Any) -> None:
    from jaxdeploy.errors import ConfigError

    module = importlib.import_module("demo.training")
    with pytest.raises(ConfigError, match="stesp"):
        module.TrainConfig.read(Path(SCRIPTS).parent / "configs/train/demo.yaml", ["stesp=3"])


FLAGS_WITHOUT_A_SETTING = {"--config", "--prompt"}


def test_flag_facts_are_those_of_the_settings(demo: Any) -> None:
    """The bundled model is trained on these facts; when one changes, ``configs/train/demo_update.yaml`` is run."""
    from jaxdeploy.cli import command_parser
    from jaxdeploy.cli.chat import ChatOptions
    from jaxdeploy.cli.flags import read_settings
    from jaxdeploy.config import EngineConfig, GenerationConfig
    from jaxdeploy.settings import describe

    classes = (ChatOptions, EngineConfig, GenerationConfig)
    known = {name: described for cls in classes for name, described in describe(cls).items()}
    for flag in importlib.import_module("demo.flags").FLAGS:
        if flag.name in FLAGS_WITHOUT_A_SETTING:
            continue
        for value in flag.values:
            given = read_settings(command_parser("chat").read([flag.name, value.strip('"')]), *classes)
            for cls, fields in zip(classes, given, strict=True):
                cls(**fields)
        described = known[flag.name[2:].replace("-", "_")]
        assert described.about.live
        if described.default is None:
            assert all(number in described.about.help for number in re.findall(r"\d+", flag.default))
        else:
            assert flag.default == str(described.default)
        if len(described.about.choices) <= 4:
            assert all(
                re.search(rf"\b{choice}\b", f"{flag.meaning} {flag.values}") for choice in described.about.choices
            )


def test_no_fact_says_that_a_feature_is_missing(demo: Any) -> None:
    facts = importlib.import_module("demo.commands").COMMANDS
    texts = [fact.answer for fact in facts]
    texts += [flag.meaning for flag in importlib.import_module("demo.flags").FLAGS]
    assert not [text for text in texts if re.search(r"not yet|for now|later|coming", text, re.IGNORECASE)]


def test_commands_in_the_answers_exist(demo: Any) -> None:
    from jaxdeploy.chat.terminal import HELP
    from jaxdeploy.cli import COMMANDS
    from jaxdeploy.cli.lite import METHODS
    from jaxdeploy.cli.serve import PROGRAMS

    programs = {"lite": METHODS, "serve": PROGRAMS}
    for fact in importlib.import_module("demo.commands").COMMANDS:
        for command, program in re.findall(r"jaxdeploy (chat|list|check_env|lite|serve) ([a-z_0-9]*)", fact.answer):
            assert command in COMMANDS
            assert program in programs.get(command, {program})
        for command in re.findall(r"(?<!\w)/[a-z]+", fact.answer):
            assert command in HELP
