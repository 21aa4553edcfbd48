"""The data sets that ``--calib-dataset`` knows by name, as LMDeploy names them, read from the Hugging Face hub.

``datasets`` 4 and later runs no script of a data set. The two that have one are read from the Parquet files into which
the hub converts every data set.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxdeploy.compress.rows import Piece, Render, pieces_of
from jaxdeploy.errors import ConfigError

Row = Mapping[str, Any]
_CONVERTED = "hf://datasets/{}@refs/convert/parquet/{}"


class HubText(NamedTuple):
    """A data set on the hub.

    ``path`` is its repository and ``config`` its configuration.
    ``calib_split`` is the split for calibration, ``eval_split`` the split for evaluation.
    ``content`` returns the text or the messages of a row.
    ``converted`` is the pattern of the converted files, with ``{split}``; ``None`` if the repository has no script.
    """

    path: str
    config: str | None
    calib_split: str
    eval_split: str
    content: Callable[[Row], Any]
    converted: str | None = None


def _column(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name]


def _question_and_answer(row: Row) -> list[dict[str, str]]:
    return _turn(row["question"], row["answer"])


def _instruction_and_output(row: Row) -> list[dict[str, str]]:
    return _turn(f"{row['instruction']}\n{row['input'] or ''}".strip(), row["output"])


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_TEXT, _MESSAGES = _column("text"), _column("messages")

HUB: dict[str, HubText] = {
    "c4": HubText("allenai/c4", "en", "train", "validation", _TEXT),
    "gsm8k": HubText("openai/gsm8k", "main", "train", "test", _question_and_answer),
    "neuralmagic_calibration": HubText("neuralmagic/calibration", "LLM", "train", "train", _MESSAGES),
    "open-platypus": HubText("garage-bAInd/Open-Platypus", None, "train", "train", _instruction_and_output),
    "openwebtext": HubText("Skylion007/openwebtext", None, "train", "train", _TEXT, "*/*{split}/*.parquet"),
    "pileval": HubText("mit-han-lab/pile-val-backup", None, "validation", "validation", _TEXT),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        None,
        "train",
        "test",
        _column("sentence"),
        "penn_treebank/{split}/*.parquet",
    ),
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", _TEXT),
}
"""Name → data set."""


def hub_pieces(label: str, hub: HubText, split: str, render: Render) -> Iterator[Piece]:
    """Yield the rows of ``split``, read as they are asked for.

    Raises ``ConfigError`` with ``label`` if ``datasets`` is not installed or cannot load the data set.
    """
    datasets = imported("datasets", f"{label} is read from the hub", "datasets", "a local .txt or .jsonl file")
    path = hub.path
    options: dict[str, Any] = {"name": hub.config}
    if hub.converted is not None:
        path = "parquet"
        options = {"data_files": {split: _CONVERTED.format(hub.path, hub.converted.format(split=split))}}
    try:
        for row in datasets.load_dataset(path, split=split, streaming=True, **options):
            yield from pieces_of(hub.content(row), render) or ()
    except Exception as error:  # the library, the network and the hub raise errors of many kinds
        advice = "check the network, or name a local text: --calib-dataset FILE.txt or FILE.jsonl"
        raise ConfigError(f"{label} cannot be loaded from {hub.path} ({first_line(error)}); {advice}") from error


def imported(module: str, need: str, package: str, instead: str) -> Any:
    """Import ``module``. Raises ``ConfigError`` that names the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{need}, but {package} is not installed; pip install {package}, or give {instead}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
