"""Token ids to calibrate on and to measure with: disjoint windows of one text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxdeploy.compress.conversations import ConversationWriter
from jaxdeploy.compress.rows import Piece
from jaxdeploy.compress.texts import open_texts
from jaxdeploy.errors import ConfigError
from jaxdeploy.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]

SHORTEST = 32
SPREAD = 4


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of T tokens: S to calibrate on and E held out, none of which share a token of the text.

    ``calib`` int32 [S, T], ``held_out`` int32 [E, T]. ``source`` names the text; ``note`` says what differs from what
    was asked for, None if nothing does. ``scored`` bool [E, T] marks the held-out tokens that are measured, None for
    all.
    """

    calib: Ids
    held_out: Ids
    source: str
    note: str | None
    scored: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Windows:
    """The windows to cut from a text.

    Attributes:
        samples: windows to calibrate on.
        held_out: windows to measure with.
        seqlen: tokens in a window.
        seed: seed of the choice of ``samples``.
    """

    samples: int
    held_out: int
    seqlen: int
    seed: int = 0


def calibration_ids(
    dataset: str | Sequence[Sequence[int]] | None,
    tokenizer: Tokenizer,
    asked: Windows,
    *,
    folder: Path | None = None,
    architecture: str = "",
) -> Calibration:
    """Return the windows that are ``asked`` for, cut from a text.

    ``dataset`` is what ``texts.open_texts`` takes, or lists of token ids, which are joined and used as they are. A
    window of text begins with what the tokenizer puts before a text. Windows to calibrate on are drawn with a seed;
    those held out are the last ones, whatever the seed. At most ``SPREAD`` times the tokens needed are read, from the
    beginning.

    Of a text that is too short as many whole windows are taken as there are, at most a quarter of them held out unless
    more are over. If it has not even one for each purpose, ``seqlen`` becomes the largest power of two that gives them.
    With ``samples=0`` the text is for evaluation only: messages call it ``eval_dataset``, and hub data sets give their
    evaluation split. Messages are written with the chat template of the ``tokenizer``, or else of ``architecture``.
    ``folder`` is that of the model, which may hold the default text.

    Raises:
        ConfigError: there is no such text, it cannot be read, it has fewer than ``SHORTEST`` tokens for a purpose, or
            an id is outside the vocabulary.
    """
    samples, seqlen = asked.samples, asked.seqlen
    setting = "calib_dataset" if samples else "eval_dataset"
    if dataset is None or isinstance(dataset, str):
        render = ConversationWriter(tokenizer, architecture)
        source, texts = open_texts(dataset, folder=folder, setting=setting, evaluate=not samples, render=render)
        prefix, pieces = tokenizer.prefix_ids, _encoded(texts, tokenizer)
    else:
        source, prefix, pieces = "token ids", (), _checked(dataset, tokenizer.vocab_size, setting)
    if seqlen <= len(prefix):
        rule = f"must be more than the {len(prefix)} tokens that begin a text"
        raise ConfigError(f"calib_seqlen={seqlen} {rule}; raise it")
    tokens = _first(pieces, SPREAD * (samples + asked.held_out) * seqlen)
    purposes = (samples > 0) + (asked.held_out > 0)
    length = _length(len(tokens), seqlen, len(prefix), purposes, f"{setting}={source}")
    windows = _windows(tokens, length, prefix)
    kept = min(asked.held_out, max(len(windows) // 4, 1, len(windows) - samples))
    front, end = windows[: len(windows) - kept], windows[len(windows) - kept :]
    drawn = np.random.default_rng(asked.seed).permutation(len(front))[:samples]
    calib = front[np.sort(drawn)]
    short = _note(source, asked, length, len(calib), len(end))
    scored = _scored(tokens, end)
    replies = None if scored is None else "of conversations only the replies are measured"
    note = "; ".join(note for note in (short, replies) if note)
    return Calibration(calib[..., 0], end[..., 0], source, note or None, scored)


def _scored(tokens: Ids, windows: Ids) -> npt.NDArray[np.bool_] | None:
    """Which tokens of ``windows`` [E, T, 2] are measured; ``None`` for all, as in a text without conversations."""
    scored = windows[..., 1].astype(np.bool_)
    return None if tokens[:, 1].all() or not scored[:, 1:].any() else scored


def _encoded(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Ids]:
    """Tokens of the pieces. Only in rendered ones the name of a special token means that token."""
    for piece in pieces:
        yield _tokens(tokenizer.encode(piece.text, add_bos=False, parse_special=piece.rendered), scored=piece.scored)


def _tokens(ids: Sequence[int] | npt.NDArray[Any], *, scored: bool) -> Ids:
    """``ids`` and whether they are scored, side by side: int32 [n, 2]."""
    column = np.asarray(ids, np.int32).reshape(-1)
    return np.stack([column, np.full_like(column, scored)], axis=1)


def _checked(rows: Sequence[Sequence[int]], vocab_size: int, setting: str) -> Iterator[Ids]:
    for number, row in enumerate(rows):
        ids = _whole_numbers(row)
        if ids is None:
            raise ConfigError(f"{setting}[{number}] is no list of token ids; give lists of whole numbers, or a path")
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            rule = f"holds the id {outside[0]}, outside the vocabulary of {vocab_size}"
            raise ConfigError(f"{setting}[{number}] {rule}; use ids of this model's tokenizer")
        yield _tokens(ids, scored=True)


def _whole_numbers(row: Sequence[int]) -> npt.NDArray[Any] | None:
    """The row as an array, None if it is anything but whole numbers; it may be empty."""
    try:
        numbers = np.asarray(row)
    except ValueError:  # lists and numbers mixed
        return None
    return numbers if numbers.ndim == 1 and (numbers.dtype.kind in "iu" or not numbers.size) else None


def _first(pieces: Iterable[Ids], enough: int) -> Ids:
    """The pieces [n, 2] joined, until there are ``enough`` tokens; the last piece is whole."""
    taken: list[Ids] = []
    count = 0
    for piece in pieces:
        taken.append(piece)
        count += len(piece)
        if count >= enough:
            break
    return np.concatenate([np.empty((0, 2), np.int32), *taken])


def _length(count: int, seqlen: int, prefix: int, purposes: int, label: str) -> int:
    """``seqlen`` if ``count`` tokens give a window for each purpose, else the largest power of two that does."""
    shorter = [1 << power for power in reversed(range((seqlen - 1).bit_length()))]
    for length in [seqlen, *(length for length in shorter if length >= SHORTEST)]:
        if count >= purposes * (length - prefix):
            return length
    if not count:
        raise ConfigError(f"{label} holds no text; give a longer one")
    least = purposes * (min(seqlen, SHORTEST) - prefix)
    raise ConfigError(f"{label} has {count} tokens, but at least {least} are needed; give a longer text")


def _windows(tokens: Ids, length: int, prefix: Sequence[int]) -> Ids:
    """All whole windows [n, length, 2], each with ``prefix`` before its part of the text."""
    body = length - len(prefix)
    count = len(tokens) // body
    begin = np.broadcast_to(_tokens(prefix, scored=False), (count, len(prefix), 2))
    return np.concatenate([begin, tokens[: count * body].reshape(count, body, 2)], axis=1)


def _note(source: str, asked: Windows, length: int, calib: int, end: int) -> str | None:
    if (length, calib, end) == (asked.seqlen, asked.samples, asked.held_out):
        return None
    wanted = f"{asked.samples} + {asked.held_out} samples of {asked.seqlen} tokens"
    return f"{source} is short of {wanted}: {calib} + {end} (held out) of {length} are used"
