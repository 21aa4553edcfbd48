"""Texts to calibrate on, read piece by piece: the bundled one, files, known data sets of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from jaxdeploy.compress.hub_texts import HUB, first_line, hub_pieces, imported
from jaxdeploy.compress.rows import DOCUMENT_END, FIELDS, Piece, Render, pieces_of
from jaxdeploy.errors import ConfigError, RequestError
from jaxdeploy.files.stored import is_file, is_folder, user_path

BUNDLED = Path(__file__).parent / "text/default.txt"
BUNDLED_BOUNDARY = "\n<<<>>>\n"
OWN_TEXT = "calibration.jsonl"
"""The file of a model's folder that is the default text for that model."""
PIECE = 1 << 16


def open_texts(
    dataset: str | None, *, folder: Path | None, setting: str, evaluate: bool, render: Render
) -> tuple[str, Iterator[Piece]]:
    """Return the name of the text, and the text in pieces that are read as they are asked for.

    Args:
        dataset: A file (.txt or .md, one document; .jsonl, one a line; .parquet, one a row), a key of ``HUB``, or
            ``None`` for ``OWN_TEXT`` in ``folder`` or the bundled text. A file is read before a data set of the same
            name.
        folder: The folder of the model, if there is one.
        setting: The name of the setting, for errors.
        evaluate: Whether the text is to measure with: data sets then give their evaluation split.
        render: Writes the messages of a conversation as text.

    Raises:
        ConfigError: There is no such text; while the pieces are read, that it is not what its name says.
    """
    if dataset is None and folder is not None and (folder / OWN_TEXT).is_file():
        return "the model's own text", _json_lines(f"{setting}={folder / OWN_TEXT}", folder / OWN_TEXT, render)
    if dataset is None:
        return "the bundled text", _cut(_bundled())
    label, path = f"{setting}={dataset}", user_path(dataset)
    if is_file(path):
        return dataset, _cut(_reader(label, path)(label, path, render))
    if dataset in HUB:
        hub = HUB[dataset]
        split = hub.eval_split if evaluate else hub.calib_split
        return f"{dataset} ({hub.path}, {split})", _cut(hub_pieces(label, hub, split, render))
    rule = "is a folder" if is_folder(path) else "is neither a file nor a known data set"
    raise ConfigError(f"{label} {rule}; give a file ({', '.join(READERS)}) or one of {', '.join(HUB)}")


def _cut(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Long texts in pieces of ``PIECE`` characters, which may cut a word; rendered ones stay whole."""
    for piece in pieces:
        if piece.rendered:
            yield piece
        else:
            yield from (Piece(piece.text[start : start + PIECE]) for start in range(0, len(piece.text), PIECE))


def _bundled() -> Iterator[Piece]:
    documents = BUNDLED.read_text(encoding="utf-8").split(BUNDLED_BOUNDARY)
    return (Piece(document.strip() + DOCUMENT_END) for document in documents)


Reader = Callable[[str, Path, Render], Iterator[Piece]]


def _reader(label: str, path: Path) -> Reader:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{label} must be one of {', '.join(READERS)}; rename or convert the file")
    return reader


def _plain_texts(label: str, path: Path, render: Render) -> Iterator[Piece]:
    for text in _decoded(label, path, lambda file: iter(lambda: file.read(PIECE), "")):
        if "\0" in text:
            raise ConfigError(f"{label} holds NUL bytes, so it is no text; give a UTF-8 text file")
        yield Piece(text)


def _json_lines(label: str, path: Path, render: Render) -> Iterator[Piece]:
    for number, line in enumerate(_decoded(label, path, iter), start=1):
        if line.strip():
            yield from _json_pieces(f"{label} line {number}", line, render)


def _decoded(label: str, path: Path, parts: Callable[[Any], Iterator[str]]) -> Iterator[str]:
    """The parts of a UTF-8 file, with or without a byte order mark."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from parts(file)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label} is not UTF-8 ({error.reason}); convert it, or give another file") from error
    except OSError as error:
        raise ConfigError(f"{label} cannot be read ({error.strerror}); give a readable file") from error


def _json_pieces(place: str, line: str, render: Render) -> list[Piece]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error}); write one JSON object a line") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is no JSON object; write one a line, with a field {' or '.join(FIELDS)}")
    try:
        found = (pieces_of(row[field], render) for field in FIELDS if field in row)
        pieces = next((pieces for pieces in found if pieces is not None), None)
    except RequestError as error:
        raise ConfigError(f"{place} does not fit the chat template ({error}); change the messages") from error
    if pieces is None:
        raise ConfigError(f"{place} has no text; give each object a field {' or '.join(FIELDS)}")
    return pieces


def _parquet_rows(label: str, path: Path, render: Render) -> Iterator[Piece]:
    pyarrow = imported("pyarrow.parquet", f"{label} is a parquet file", "pyarrow", "a .txt or .jsonl file")
    try:
        with pyarrow.ParquetFile(path) as file:
            column = next((field for field in FIELDS if field in file.schema_arrow.names), None)
            batches = file.iter_batches(columns=[column]) if column else ()
            values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            yield from chain.from_iterable(pieces_of(value, render) or () for value in values)
    except RequestError as error:
        raise ConfigError(f"{label} does not fit the chat template ({error}); change the messages") from error
    except Exception as error:  # pyarrow has a tree of its own
        raise ConfigError(f"{label} cannot be read as parquet ({first_line(error)}); give another file") from error
    if column is None:
        raise ConfigError(f"{label} has no text; give the table a column {' or '.join(FIELDS)}")


READERS: dict[str, Reader] = {
    ".txt": _plain_texts,
    ".md": _plain_texts,
    ".jsonl": _json_lines,
    ".parquet": _parquet_rows,
}
