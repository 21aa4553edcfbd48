from __future__ import annotations

import itertools
import json
import sys
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdeploy.compress import texts
from jaxdeploy.compress.calibration import SPREAD, Calibration, Windows, calibration_ids
from jaxdeploy.compress.hub_texts import HUB
from jaxdeploy.compress.rows import DOCUMENT_END
from jaxdeploy.errors import ConfigError
from jaxdeploy.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "jaxdeploy/demo"
WORDS = ["the", "little", "red", "hen", "went", "out", "to", "find", "some", "corn", "before", "rain", "began", "again"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def story(words: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def cut(
    dataset: str | Sequence[Sequence[int]] | None,
    tokenizer: Tokenizer,
    *,
    samples: int = 5,
    seqlen: int = 32,
    held_out: int = 3,
    seed: int = 0,
) -> Calibration:
    return calibration_ids(dataset, tokenizer, Windows(samples, held_out, seqlen, seed))


def decoded(tokenizer: Tokenizer, found: Calibration) -> str:
    """All windows as one text; windows are drawn in the order of the text."""
    return "".join(tokenizer.decode(row.tolist()) for row in [*found.calib, *found.held_out])


def shown(tokenizer: Tokenizer, found: Calibration) -> str:
    """``decoded`` with special tokens by name, without the one that begins each window."""
    rows = [*found.calib, *found.held_out]
    return "".join(tokenizer.decode(row[1:].tolist(), skip_special_tokens=False) for row in rows)


class TestWindows:
    def test_windows_share_no_token_and_those_held_out_are_the_last(self, tokenizer: Tokenizer) -> None:
        found = cut([range(500), range(500, 1024)], tokenizer)  # every id once; 1024 ids are what 8 samples read
        assert (found.calib.shape, found.held_out.shape) == ((5, 32), (3, 32))
        assert found.calib.dtype == found.held_out.dtype == np.int32
        assert np.unique(np.concatenate([found.calib, found.held_out])).size == 8 * 32
        np.testing.assert_array_equal(found.held_out.ravel(), np.arange(1024 - 3 * 32, 1024))
        assert (np.diff(found.calib) == 1).all()
        assert found.note is None

    def test_the_seed_decides_what_is_drawn_but_not_what_is_held_out(self, tokenizer: Tokenizer) -> None:
        first, same, other = (cut(None, tokenizer, samples=20, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first.calib, same.calib)
        assert (first.calib != other.calib).any()
        np.testing.assert_array_equal(first.held_out, same.held_out)
        np.testing.assert_array_equal(first.held_out, other.held_out)

    def test_samples_are_drawn_from_the_whole_of_what_is_read(self, tokenizer: Tokenizer) -> None:
        drawn = np.concatenate([cut([range(1024)], tokenizer, seed=seed).calib for seed in range(40)])
        assert set(drawn[:, 0].tolist()) == set(range(0, 1024 - 3 * 32, 32))

    def test_a_window_of_text_begins_as_the_tokenizer_begins_a_text(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        text = story(400)
        found = cut(write(tmp_path / "a.txt", text), tokenizer)
        rows = np.concatenate([found.calib, found.held_out])
        assert tokenizer.prefix_ids == (1,)
        assert (rows[:, 0] == 1).all()
        assert (rows[:, 1:] != 1).all()
        assert all(tokenizer.decode(row.tolist()).strip() in text for row in rows)

    def test_given_ids_are_used_as_they_are(self, tokenizer: Tokenizer) -> None:
        rows = np.random.default_rng(0).integers(0, 1024, (8, 32))
        found = cut(rows.tolist(), tokenizer)
        np.testing.assert_array_equal(np.concatenate([found.calib, found.held_out]), rows)
        assert found.source == "token ids"

    def test_the_name_of_a_special_token_in_a_text_is_text(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        end = tokenizer.special_tokens["eos_token"]
        assert tokenizer.encode(end, add_bos=False) == [tokenizer.eos_token_id]
        found = cut(write(tmp_path / "a.txt", f"{end} and " * 200), tokenizer)
        assert not set(found.calib[:, 1:].ravel().tolist()) & tokenizer.special_ids

    @pytest.mark.parametrize(("samples", "held_out"), [(5, 0), (0, 3), (0, 0)])
    def test_either_purpose_may_be_left_out(self, tokenizer: Tokenizer, samples: int, held_out: int) -> None:
        found = cut(None, tokenizer, samples=samples, held_out=held_out)
        assert (found.calib.shape, found.held_out.shape) == ((samples, 32), (held_out, 32))
        assert found.note is None


class TestShortTexts:
    @pytest.mark.parametrize(
        ("tokens", "samples", "held_out", "expected"),
        [
            (32 * 8, 5, 3, (5, 3)),
            (32 * 8 - 1, 5, 3, (5, 2)),
            (32 * 8, 100, 6, (6, 2)),
            (32 * 8, 100, 1, (7, 1)),
            (32 * 3, 100, 8, (2, 1)),
            (32 * 2, 100, 8, (1, 1)),
            (32 * 2, 0, 8, (0, 2)),
            (32, 0, 8, (0, 1)),
        ],
    )
    def test_there_are_as_many_whole_samples_as_fit(
        self, tokenizer: Tokenizer, tokens: int, samples: int, held_out: int, expected: tuple[int, int]
    ) -> None:
        found = cut([range(tokens)], tokenizer, samples=samples, held_out=held_out)
        assert (len(found.calib), len(found.held_out)) == expected
        short = expected != (samples, held_out)
        note = f"token ids is short of {samples} + {held_out} samples of 32 tokens: {expected[0]} + {expected[1]} "
        assert (found.note or "").startswith(note) if short else found.note is None

    @pytest.mark.parametrize(
        ("tokens", "seqlen", "expected"),
        [(800, 400, 400), (799, 400, 256), (511, 400, 128), (64, 2048, 32), (62, 31, 31)],
    )
    def test_samples_become_shorter_where_not_one_fits_for_each_purpose(
        self, tokenizer: Tokenizer, tokens: int, seqlen: int, expected: int
    ) -> None:
        found = cut([range(tokens)], tokenizer, samples=1, held_out=1, seqlen=seqlen)
        assert (found.calib.shape, found.held_out.shape) == ((1, expected), (1, expected))
        assert (found.note is None) == (expected == seqlen)

    @pytest.mark.parametrize(("tokens", "samples", "least"), [(63, 5, 64), (31, 0, 32)])
    def test_even_shorter_ones_are_refused(self, tokenizer: Tokenizer, tokens: int, samples: int, least: int) -> None:
        name = "calib_dataset" if samples else "eval_dataset"
        with pytest.raises(
            ConfigError, match=f"{name}=token ids has {tokens} tokens, but at least {least} are needed; "
        ):
            cut([range(tokens)], tokenizer, samples=samples, seqlen=2048)

    def test_a_window_needs_room_behind_its_beginning(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(
            ConfigError, match="calib_seqlen=1 must be more than the 1 tokens that begin a text; raise it"
        ):
            cut(None, tokenizer, seqlen=1)


class TestGivenIds:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([[1, 2], [3, 1024]], r"calib_dataset\[1\] holds the id 1024, outside the vocabulary of 1024; use ids"),
            ([[-1]], r"calib_dataset\[0\] holds the id -1, outside"),
            ([["a"]], r"calib_dataset\[0\] is no list of token ids; give lists of whole numbers, or a path"),
            (["some text"], r"calib_dataset\[0\] is no list"),
            ([[0.5]], r"calib_dataset\[0\] is no list"),
            ([True], r"calib_dataset\[0\] is no list"),
            ([7, 8], r"calib_dataset\[0\] is no list"),
            ([[1, [2]]], r"calib_dataset\[0\] is no list"),
            ([], "calib_dataset=token ids holds no text; give a longer one"),
        ],
    )
    def test_what_is_no_list_of_ids_is_refused(self, tokenizer: Tokenizer, rows: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            cut(rows, tokenizer)


class TestFiles:
    @pytest.mark.parametrize("name", ["a.txt", "a.MD"])
    def test_a_text_file_is_one_document(self, tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
        text = "One.\n\nTwo, für dich.\n" + story(300)
        path = write(tmp_path / name, b"\xef\xbb\xbf" + text.encode())
        found = cut(path, tokenizer, samples=100, held_out=1)
        assert found.source == path
        assert decoded(tokenizer, found)[:500] == text[:500]

    def test_lines_of_json_are_documents(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        parts = [{"type": "text", "text": "Fine."}, {"type": "image_url", "image_url": "x"}]
        messages = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": parts}]
        rows = [
            {"text": "First.", "prompt": "no"},
            {"content": " Second.\n"},
            {"prompt": "Third."},
            {"messages": messages},
        ]
        rows += [{"text": ""}, {"messages": []}, {"text": story(200)}]
        path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
        start, end = "<|im_start|>", "<|im_end|>\n"
        chat = f"<s>{start}user\nHow are you?{end}{start}assistant\nFine.{end}"
        found = cut(path, tokenizer, samples=100, held_out=1)
        assert shown(tokenizer, found)[:400] == f"First.\n\nSecond.\n\nThird.\n\n{chat}{story(200)}"[:400]

    def test_of_conversations_only_replies_are_scored(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        turns = [("user", "Q"), ("assistant", "A")]
        talk = [{"role": role, "content": f"{letter} {n}"} for n in range(20) for role, letter in turns]
        path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"messages": talk}) for _ in range(3)))
        found = cut(path, tokenizer)
        assert found.scored is not None
        assert "only the replies are measured" in str(found.note)
        marked = found.held_out[found.scored]
        replies = tokenizer.decode(marked.tolist(), skip_special_tokens=False).split("<|im_end|>")
        assert len(replies) > 3
        assert {reply.strip() for reply in replies[1:-1]} <= {f"A {n}" for n in range(20)}
        assert cut(None, tokenizer).scored is None

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        ],
        ids=["drops earlier replies", "begins otherwise"],
    )
    def test_a_template_whose_replies_cannot_be_found(
        self, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
    ) -> None:
        """Then all tokens are measured."""
        monkeypatch.setattr(tokenizer, "chat_templates", {"default": template})
        talk = [{"role": role, "content": story(99, seed)} for seed, role in enumerate(["user", "assistant"] * 2)]
        found = cut(write(tmp_path / "a.jsonl", json.dumps({"messages": talk})), tokenizer)
        assert found.scored is None

    def test_messages_without_a_template_are_joined(
        self, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer, "chat_templates", {})
        messages = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]
        path = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}) + "\n" + json.dumps({"text": story(200)}))
        found = cut(path, tokenizer, samples=100, held_out=1)
        assert decoded(tokenizer, found).startswith("How are you?\n\nFine.\n\n" + story(200)[:50])

    def test_messages_that_the_template_refuses(
        self, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenizer, "chat_templates", {"default": "{{ raise_exception('no such role') }}"})
        path = write(tmp_path / "a.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
        with pytest.raises(ConfigError, match=r"a\.jsonl line 1 does not fit the chat template .*no such role"):
            cut(path, tokenizer)

    @pytest.mark.parametrize("row", [r'{"text": "x \ud83d"}', r'{"messages": [{"role": "user", "content": "\ud83d"}]}'])
    def test_half_an_emoji_is_read(self, tokenizer: Tokenizer, tmp_path: Path, row: str) -> None:
        path = write(tmp_path / "a.jsonl", f"{row}\n" + json.dumps({"text": story(200)}))
        assert "\ufffd" in decoded(tokenizer, cut(path, tokenizer, samples=100, held_out=1))

    def test_the_text_of_the_model_is_the_default(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        write(tmp_path / texts.OWN_TEXT, json.dumps({"text": story(400)}))
        found = calibration_ids(None, tokenizer, Windows(5, 3, 32), folder=tmp_path)
        assert found.source == "the model's own text"
        assert decoded(tokenizer, found)[:50] in story(400)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", "", "a.txt holds no text; give a longer one"),
            ("a.txt", "too short", r"a.txt has \d+ tokens, but at least 62 are needed; give a longer text"),
            ("a.txt", "a\0b" * 99, "a.txt holds NUL bytes, so it is no text; give a UTF-8 text file"),
            ("a.txt", b"\xff\xfe\x00a", "a.txt is not UTF-8 .invalid start byte.; convert it, or give another file"),
            ("a.jsonl", "", "a.jsonl holds no text"),
            ("a.jsonl", b'{"text": "\xe4"}', "a.jsonl is not UTF-8"),
            ("a.jsonl", '{"text": "a"}\n\n{"text": ', "a.jsonl line 3 is not JSON .*; write one JSON object a line"),
            ("a.jsonl", "[" * 100_000, "a.jsonl line 1 is not JSON"),
            (
                "a.jsonl",
                '["a"]',
                "a.jsonl line 1 is no JSON object; write one a line, with a field text or messages",
            ),
            (
                "a.jsonl",
                '{"txt": "a"}',
                "a.jsonl line 1 has no text; give each object a field text or messages or content",
            ),
            ("a.jsonl", '{"text": 7}', "a.jsonl line 1 has no text"),
            ("a.jsonl", '{"messages": [{"role": "user"}]}', "a.jsonl line 1 has no text"),
            ("a.csv", "a,b", "a.csv must be one of .txt, .md, .jsonl, .parquet; rename or convert the file"),
        ],
    )
    def test_what_is_wrong_with_a_file_is_said(
        self, tokenizer: Tokenizer, tmp_path: Path, name: str, content: str | bytes, message: str
    ) -> None:
        path = write(tmp_path / name, content)
        with pytest.raises(ConfigError, match=message) as caught:
            cut(path, tokenizer)
        assert str(caught.value).startswith(f"calib_dataset={path} ")

    def test_other_names_are_refused(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"eval_dataset=wiki is neither a file nor a known data set; give .*wikitext2"
        ):
            cut("wiki", tokenizer, samples=0)
        with pytest.raises(ConfigError, match=r"calib_dataset=.* is a folder; give a file"):
            cut(str(tmp_path), tokenizer)

    def test_a_file_that_vanishes_is_one_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        write(path, "text")
        _, pieces = texts.open_texts(
            str(path), folder=None, setting="calib_dataset", evaluate=False, render=lambda _: None
        )
        path.unlink()
        with pytest.raises(
            ConfigError, match=r"a.txt cannot be read .No such file or directory.; give a readable file"
        ):
            next(pieces)

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_of_a_long_file_only_the_beginning_is_read(
        self, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setattr(texts, "PIECE", 1000)
        text = story(20_000)
        # What ends the file is neither text nor JSON: an error if it were read.
        path = write(tmp_path / name, (text if name == "a.txt" else json.dumps({"text": text})) + "\n" + "\0" * 9000)
        seen: list[int] = []
        encode = tokenizer.encode

        def watched(text: str, **how: bool) -> list[int]:
            seen.append(len(text))
            return encode(text, **how)

        monkeypatch.setattr(tokenizer, "encode", watched)
        found = cut(path, tokenizer)
        assert found.note is None
        assert set(seen) == {1000}
        assert len(seen) < SPREAD * 8 * 32 * 4 / 1000 + 1


class FakeDatasets(types.ModuleType):
    """Records how a data set is asked for; its rows have no end, so a reader of all rows never returns."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.calls: list[tuple[object, ...]] = []
        self.error = error

    def load_dataset(
        self, path: str, *, split: str, streaming: bool, name: str | None = None, data_files: Any = None
    ) -> Iterator[dict[str, Any]]:
        assert streaming
        self.calls.append((path, name or data_files, split))
        if self.error is not None:
            raise self.error
        return (self.row("" if n % 2 else story(20, n)) for n in itertools.count())

    def row(self, text: str) -> dict[str, Any]:
        """Every column that one of the data sets has."""
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]
        columns = {"instruction": "I", "input": "", "question": "Q"}
        return {**columns, **dict.fromkeys(("text", "sentence", "answer", "output"), text), "messages": turns}


def converted(repository: str, files: str, split: str) -> tuple[object, ...]:
    return "parquet", {split: f"hf://datasets/{repository}@refs/convert/parquet/{files}"}, split


PTB = "ptb-text-only/ptb_text_only"
OPENWEBTEXT = converted("Skylion007/openwebtext", "*/*train/*.parquet", "train")


class TestHub:
    @pytest.mark.parametrize(
        ("name", "begin", "calib", "evaluation"),
        [
            ("c4", "", ("allenai/c4", "en", "train"), ("allenai/c4", "en", "validation")),
            ("gsm8k", "user\nQ", ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")),
            ("neuralmagic_calibration", "user\nQ", *2 * [("neuralmagic/calibration", "LLM", "train")]),
            ("open-platypus", "user\nI", *2 * [("garage-bAInd/Open-Platypus", None, "train")]),
            ("openwebtext", "", *2 * [OPENWEBTEXT]),
            ("pileval", "", *2 * [("mit-han-lab/pile-val-backup", None, "validation")]),
            ("ptb", "", *[converted(PTB, f"penn_treebank/{split}/*.parquet", split) for split in ("train", "test")]),
            ("wikitext2", "", *[("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("train", "test")]),
        ],
    )
    def test_known_names_are_streamed(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str, begin: str, calib: Any, evaluation: Any
    ) -> None:
        fake = FakeDatasets()
        monkeypatch.setitem(sys.modules, "datasets", fake)
        found = cut(name, tokenizer)
        assert name in found.source
        text = shown(tokenizer, cut(name, tokenizer, samples=8, seqlen=500))
        assert (f"<|im_start|>{begin}<|im_end|>" in text) if begin else ("<|im_start|>" not in text)
        assert any(story(20, n) in text for n in range(0, 400, 2))
        cut(name, tokenizer, samples=0)
        assert fake.calls == [calib, calib, evaluation]

    def test_every_name_of_lmdeploy_is_known(self) -> None:
        names = "ptb wikitext2 c4 pileval gsm8k neuralmagic_calibration open-platypus openwebtext"
        assert set(HUB) == set(names.split())

    def test_without_the_library_it_says_what_to_do(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        message = (
            "calib_dataset=c4 .* datasets is not installed; pip install datasets, or give a local .txt or .jsonl file"
        )
        with pytest.raises(ConfigError, match=message):
            cut("c4", tokenizer)

    @pytest.mark.parametrize("error", [RuntimeError("no scripts\nany more"), ConnectionError("no scripts")])
    def test_what_the_library_raises_is_one_line(
        self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(error))
        message = r"^calib_dataset=c4 cannot be loaded from allenai/c4 \(no scripts\); .*: --calib-dataset FILE"
        with pytest.raises(ConfigError, match=message):
            cut("c4", tokenizer)

    def test_a_file_comes_before_a_data_set_of_that_name(
        self, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "c4", "text")
        with pytest.raises(ConfigError, match=r"calib_dataset=c4 must be one of .txt"):
            cut("c4", tokenizer)


class FakeParquet(types.ModuleType):
    """One file whose table has the columns ``table``."""

    def __init__(self, table: dict[str, list[Any]]) -> None:
        super().__init__("pyarrow.parquet")
        self.table = table
        self.schema_arrow = types.SimpleNamespace(names=list(table))

    def __enter__(self) -> FakeParquet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ParquetFile(self, path: Path) -> FakeParquet:  # noqa: N802
        if not path.read_bytes():
            raise ValueError("magic bytes\nnot found")
        return self

    def iter_batches(self, columns: list[str]) -> Iterator[Any]:
        for value in self.table[columns[0]]:
            column = types.SimpleNamespace(to_pylist=lambda value=value: [value])
            yield types.SimpleNamespace(column=lambda _, column=column: column)


class TestParquet:
    def read(self, tokenizer: Tokenizer, tmp_path: Path, content: str = "PAR1") -> Calibration:
        return cut(write(tmp_path / "a.parquet", content), tokenizer, samples=100, held_out=1)

    def test_rows_are_documents(self, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        table: dict[str, list[Any]] = {"id": [1, 2, 3], "content": ["First.", None, story(200)]}
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", FakeParquet(table))
        assert decoded(tokenizer, self.read(tokenizer, tmp_path))[:300] == ("First.\n\n" + story(200))[:300]

    def test_faults_are_one_line(self, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", FakeParquet({"id": [1]}))
        with pytest.raises(ConfigError, match=r"a.parquet has no text; give the table a column text or messages or"):
            self.read(tokenizer, tmp_path)
        with pytest.raises(
            ConfigError, match=r"a.parquet cannot be read as parquet \(magic bytes\); give another file"
        ):
            self.read(tokenizer, tmp_path, content="")
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(
            ConfigError, match=r"pyarrow is not installed; pip install pyarrow, or give a .txt or .jsonl file"
        ):
            self.read(tokenizer, tmp_path)


class TestBundledText:
    text = texts.BUNDLED.read_text(encoding="utf-8")

    def test_it_is_enough_for_the_demo_model(self, tokenizer: Tokenizer) -> None:
        found = cut(None, tokenizer, samples=12, seqlen=512, held_out=4)
        assert (found.calib.shape, found.held_out.shape) == ((12, 512), (4, 512))
        assert (found.source, found.note) == ("the bundled text", None)
        assert found.calib.max() < tokenizer.vocab_size

    def test_it_is_plain_and_varied(self) -> None:
        documents = self.text.split(texts.BUNDLED_BOUNDARY)
        paragraphs = Counter(paragraph.strip() for document in documents for paragraph in document.split("\n\n"))
        assert len(documents) > 50
        assert 60_000 <= len(self.text.encode()) <= 80_000
        assert [paragraph for paragraph, count in paragraphs.items() if count > 1] == []
        assert max(map(len, self.text.splitlines())) <= 200
        assert not {"\0", "\r", "\t", "\ufffd", "\ufeff"} & set(self.text)

    def test_boundaries_of_documents_are_no_text(self) -> None:
        _, pieces = texts.open_texts(None, folder=None, setting="calib_dataset", evaluate=False, render=lambda _: None)
        joined = "".join(piece.text for piece in pieces)
        assert "<<<" not in joined
        assert joined.replace(DOCUMENT_END, "") == self.text.replace("<<<>>>\n", "\n").rstrip().replace("\n\n", "")
