"""Shown text is the whole text up to its first stop word, however it was cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxdeploy.engine.front.text_stream import TextStream


class Pieces:
    """Token i is the i-th piece of a text; ``rest`` comes at the end."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces = pieces
        self.rest = rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.rest


def stream(
    pieces: list[str], stops: tuple[str, ...] = (), *, include_stop: bool = False, rest: str = "", minimum: int = 0
) -> tuple[list[str], TextStream]:
    """What is shown after each piece, and at the end."""
    text = TextStream(Pieces(pieces, rest), stops, include_stop=include_stop, min_new_tokens=minimum)
    shown = []
    for index in range(len(pieces)):
        shown.append(text.push(index))
        if text.stopped:
            break
    return [*shown, text.finish()], text


def cut(text: str, stops: tuple[str, ...], *, include_stop: bool) -> str:
    """The text up to the stop word that is complete first; of those that end together, the longest."""
    for end in range(len(text) + 1):
        complete = [word for word in stops if text[:end].endswith(word)]
        if complete:
            return text[:end] if include_stop else text[: end - max(map(len, complete))]
    return text


def test_without_stop_words_everything_is_shown_at_once() -> None:
    shown, text = stream(["Hel", "lo", "", " you"], rest="!")
    assert shown == ["Hel", "lo", "", " you", "!"]
    assert not text.stopped


def test_a_stop_word_inside_a_piece() -> None:
    shown, text = stream(["one STOP two", "never"], ("STOP",))
    assert shown == ["one ", ""]
    assert text.stopped


def test_a_stop_word_across_pieces_is_never_shown() -> None:
    shown, text = stream(["one S", "TO", "P two"], ("STOP",))
    assert shown == ["one ", "", "", ""]
    assert text.stopped


def test_what_only_began_like_a_stop_word_is_shown() -> None:
    shown, text = stream(["a ST", "IR b"], ("STOP",))
    assert shown == ["a ", "STIR b", ""]
    assert not text.stopped


def test_what_is_held_back_at_the_end_is_shown() -> None:
    assert stream(["a ST"], ("STOP",))[0] == ["a ", "ST"]


def test_a_stop_word_is_kept_on_demand() -> None:
    shown, _ = stream(["one S", "TOP two"], ("STOP",), include_stop=True)
    assert shown == ["one ", "STOP", ""]


def test_a_stop_word_may_be_completed_by_what_the_decoder_held() -> None:
    shown, text = stream(["one ST"], ("STOP",), rest="OP")
    assert "".join(shown) == "one "
    assert text.stopped


def test_a_beginning_that_restarts_within_itself() -> None:
    assert "".join(stream(["a", "a", "b", "a", "a", "a", "c"], ("aac",))[0]) == "aaba"


def test_the_word_that_is_complete_first_wins() -> None:
    for pieces in (["xabcdy"], list("xabcdy")):
        assert "".join(stream(pieces, ("abcd", "bc"))[0]) == "xa"


def test_before_min_new_tokens_stop_words_are_text() -> None:
    shown, text = stream(["a.", "b.", "c.", "d"], (".",), minimum=3)
    assert "".join(shown) == "a.b.c"
    assert text.stopped
    assert "".join(stream(["a.", "b.", "c"], (".",), minimum=3)[0]) == "a.b.c"


WORDS = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.text("ab.c", max_size=4), max_size=12), rest=st.text("ab.", max_size=3), stops=WORDS, keep=...
)
@example(pieces=["abcd"], rest="", stops=("abcd", "bc"), keep=False)
def test_streamed_text_is_the_whole_text_cut(pieces: list[str], rest: str, stops: tuple[str, ...], keep: bool) -> None:
    shown, text = stream(pieces, stops, include_stop=keep, rest=rest)
    whole = "".join([*pieces, rest])
    assert "".join(shown) == cut(whole, stops, include_stop=keep)
    assert text.stopped == any(word in whole for word in stops)


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.text("ab.", max_size=3), max_size=8), stops=WORDS)
def test_nothing_is_held_back_without_need(pieces: list[str], stops: tuple[str, ...]) -> None:
    text = TextStream(Pieces(pieces), stops, include_stop=False, min_new_tokens=0)
    shown = ""
    for index in range(len(pieces)):
        shown += text.push(index)
        held = "".join(pieces[: index + 1])[len(shown) :]
        if text.stopped:
            break
        assert not held or any(word.startswith(held) for word in stops)


@pytest.mark.parametrize("keep", [False, True])
def test_finish_says_nothing_after_a_stop(keep: bool) -> None:
    _, text = stream(["a.b"], (".",), include_stop=keep, rest="z")
    assert text.finish() == ""
