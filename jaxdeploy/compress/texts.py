"""Texts to calibrate on, read piece by piece: the bundled one, files, known data sets of the Hugging Face hub."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jaxdeploy.errors import ConfigError

BUNDLED = Path(__file__).parent / "text/default.txt"
BUNDLED_BOUNDARY = "\n<<<>>>\n"
DOCUMENT_END = "\n\n"
FIELDS = ("text", "content", "prompt", "messages")
PIECE = 1 << 16


class HubText(NamedTuple):
    """Where the hub keeps a data set: calibration reads one split, evaluation the other."""

    path: str
    config: str | None
    calib_split: str
    eval_split: str
    column: str


HUB: dict[str, HubText] = {
    "c4": HubText("allenai/c4", "en", "train", "validation", "text"),
    "pileval": HubText("mit-han-lab/pile-val-backup", None, "validation", "validation", "text"),
    "ptb": HubText("ptb-text-only/ptb_text_only", "penn_treebank", "train", "test", "sentence"),
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", "text"),
}


def open_texts(dataset: str | None, *, setting: str, evaluate: bool) -> tuple[str, Iterator[str]]:
    """What ``dataset`` is called, and its text in pieces of at most ``PIECE`` characters, read as they are asked for.

    ``dataset`` is a file (.txt or .md, one document; .jsonl, one a line; .parquet, one a row), a key of ``HUB``, or
    None for the bundled text. Documents end with a blank line. A file is read before a data set of the same name.

    Raises:
        ConfigError: there is no such text; while the pieces are read, that it is not what its name says.
    """
    if dataset is None:
        return "the bundled text", _cut(_bundled())
    label, path = f"{setting}={dataset}", Path(dataset).expanduser()
    if path.is_file():
        return dataset, _cut(_reader(label, path)(label, path))
    if dataset in HUB:
        hub = HUB[dataset]
        split = hub.eval_split if evaluate else hub.calib_split
        return f"{dataset} ({hub.path}, {split})", _cut(_hub_texts(label, hub, split))
    rule = "is a folder" if path.is_dir() else "is neither a file nor a known data set"
    raise ConfigError(f"{label} {rule}; give a file ({', '.join(READERS)}) or one of {', '.join(HUB)}")


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """Long texts in pieces. A word may be cut, once in ``PIECE`` characters."""
    return (text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE))


def _bundled() -> Iterator[str]:
    documents = BUNDLED.read_text(encoding="utf-8").split(BUNDLED_BOUNDARY)
    return (document.strip() + DOCUMENT_END for document in documents)


def _reader(label: str, path: Path) -> Callable[[str, Path], Iterator[str]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{label} must be one of {', '.join(READERS)}; rename or convert the file")
    return reader


def _plain_texts(label: str, path: Path) -> Iterator[str]:
    for text in _decoded(label, path, lambda file: iter(lambda: file.read(PIECE), "")):
        if "\0" in text:
            raise ConfigError(f"{label} holds NUL bytes, so it is no text; give a UTF-8 text file")
        yield text


def _json_lines(label: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(_decoded(label, path, iter), start=1):
        if line.strip():
            yield from _document(_json_text(f"{label} line {number}", line))


def _decoded(label: str, path: Path, parts: Callable[[Any], Iterator[str]]) -> Iterator[str]:
    """The parts of a UTF-8 file, with or without a byte order mark."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from parts(file)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label} is not UTF-8 ({error.reason}); convert it, or give another file") from error
    except OSError as error:
        raise ConfigError(f"{label} cannot be read ({error.strerror}); give a readable file") from error


def _json_text(place: str, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error}); write one JSON object a line") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{place} is no JSON object; write one a line, with a field {' or '.join(FIELDS)}")
    text = next((_text_of(row[field]) for field in FIELDS if field in row), None)
    if text is None:
        raise ConfigError(f"{place} has no text; give each object a field {' or '.join(FIELDS)}")
    return text


def _text_of(value: Any) -> str | None:
    """A text itself; of messages, and of a message's parts, those that have text. None for anything else."""
    if isinstance(value, dict):
        return _text_of(value.get("content", value.get("text")))
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = [text for item in value if isinstance(text := _text_of(item), str)]
    return DOCUMENT_END.join(texts) if texts or not value else None


def _parquet_rows(label: str, path: Path) -> Iterator[str]:
    pyarrow = _imported("pyarrow.parquet", f"{label} is a parquet file", "pyarrow", "a .txt or .jsonl file")
    try:
        with pyarrow.ParquetFile(path) as file:
            column = next((field for field in FIELDS if field in file.schema_arrow.names), None)
            batches = file.iter_batches(columns=[column]) if column else ()
            values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            yield from chain.from_iterable(_document(_text_of(value) or "") for value in values)
    except Exception as error:  # pyarrow has a tree of its own
        raise ConfigError(f"{label} cannot be read as parquet ({_first_line(error)}); give another file") from error
    if column is None:
        raise ConfigError(f"{label} has no text; give the table a column {' or '.join(FIELDS)}")


def _hub_texts(label: str, hub: HubText, split: str) -> Iterator[str]:
    datasets = _imported("datasets", f"{label} is read from the hub", "datasets", "a local .txt or .jsonl file")
    try:
        for row in datasets.load_dataset(hub.path, hub.config, split=split, streaming=True):
            yield from _document(row[hub.column])
    except Exception as error:  # whatever the library, the network or the hub may raise
        advice = "check the network, or give a local .txt or .jsonl file"
        raise ConfigError(f"{label} cannot be loaded from {hub.path} ({_first_line(error)}); {advice}") from error


def _document(text: str) -> Iterator[str]:
    if text.strip():
        yield text.strip() + DOCUMENT_END


def _imported(module: str, need: str, package: str, instead: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{need}, but {package} is not installed; pip install {package}, or give {instead}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


READERS: dict[str, Callable[[str, Path], Iterator[str]]] = {
    ".txt": _plain_texts,
    ".md": _plain_texts,
    ".jsonl": _json_lines,
    ".parquet": _parquet_rows,
}
