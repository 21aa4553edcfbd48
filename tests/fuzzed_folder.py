"""Model folders with one thing changed at random, and everything that reads a folder at start.

As a program it takes numbers of cases on stdin and writes a line of JSON for each: how it ended, its seconds, and how
far memory grew.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import sentencepiece
import tokenizers

from jaxdeploy.chat_template import ChatTemplate
from jaxdeploy.checkpoint.adapter import adaptable, base_tensors, read_adapter
from jaxdeploy.checkpoint.model import LoadOptions, load_model
from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.checkpoint.writing import put_json, put_tensors
from jaxdeploy.errors import JaxdeployError
from jaxdeploy.generation.defaults import read_generation_defaults
from jaxdeploy.generation.resolved import eos_token_ids, resolve
from jaxdeploy.models.registry import architecture_of, family_of, read_config
from jaxdeploy.parallel.mesh import make_mesh
from jaxdeploy.tokenizer import Tokenizer
from tests.stored_models import GPTQ, NARROW, checkpoint
from tests.test_tiktoken import write as write_tiktoken
from tests.tiny_adapters import TinyAdapter
from tests.torch_zip import write_torch_file

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 32},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2],
    "torch_dtype": "float32",
}
GENERATION = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "eos_token_id": 2, "max_new_tokens": 9}
TOKENIZER: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "add_bos_token": True,
    "added_tokens_decoder": {"2": {"content": "[UNUSED]", "special": True}},
    "additional_special_tokens": ["<s>"],
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "tokenizer_class": "PreTrainedTokenizerFast",
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 20.0, 0.5, 1e5, 10**9, 2**31, 2**64, 10**400, 1e308),
    *(float("nan"), float("inf"), "", "x", "20", "\ud83d", "\x00", "a\nb", "x" * 10_000, "{{", "(?:.|..)*(?<=!)"),
    *([], [None], [1], ["x"] * 3, [[[]]], {}, {"a": 1}, {"type": "x"}, {"content": 5}),
)
TEXT = "Once upon a time <s>[UNUSED] caf\u00e9 \U0001f999"


class Base(NamedTuple):
    """A sane folder, its files that are changed, and how its weights are laid out."""

    folder: Path
    files: list[Path]
    adapter: bool = False
    model_format: str | None = None


def build(folder: Path) -> list[Base]:
    """Sane folders of every layout, below ``folder``."""
    made = []
    for name, fill in LAYOUTS.items():
        target = folder / name
        target.mkdir(parents=True)
        fill(target)
        made.append(Base(target, sorted(path for path in target.rglob("*") if path.is_file()), (target / "a").is_dir()))
    return made


def tensors() -> dict[str, Any]:
    """Random weights for ``HF``."""
    numbers = np.random.default_rng(0)
    sources = family_of(HF).weights(read_config(HF)).values()
    shapes = {name: shape for source in sources for name, shape in zip(source.names, source.shapes, strict=True)}
    return {name: numbers.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def fill_plain(folder: Path) -> None:
    """Everything that a folder of transformers' has, and an adapter."""
    put_json(folder / "config.json", HF)
    put_json(folder / "generation_config.json", GENERATION)
    put_json(folder / "tokenizer_config.json", TOKENIZER)
    put_json(folder / "special_tokens_map.json", {"unk_token": "[UNUSED]"})
    put_json(folder / "added_tokens.json", {"</s>": 1})
    fill_byte_level(folder, 60)
    put_tensors(folder / "model.safetensors", tensors())
    TinyAdapter(ranks={"v_proj": 2}, alphas={"q_proj": 3}).write(folder / "a")


def fill_byte_level(folder: Path, merges: int) -> None:
    """A byte-level ``tokenizer.json`` with a normalizer and a post-processor."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trained.normalizer = tokenizers.normalizers.Replace("ab", "abc")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=259 + merges,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>", "[UNUSED]"],
        show_progress=False,
    )
    trained.train_from_iterator([TEXT] * 4, trainer)
    trained.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trained.save(str(folder / "tokenizer.json"))


def fill_sharded(folder: Path) -> None:
    """Shards with an index, and a sentencepiece model."""
    put_json(folder / "config.json", HF)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    named = tensors()
    places = {name: files[index % 2] for index, name in enumerate(named)}
    for file in files:
        put_tensors(folder / file, {name: value for name, value in named.items() if places[name] == file})
    put_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    with (folder / "tokenizer.model").open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT, "She liked to play in the park"] * 8), model_writer=out, vocab_size=320,
            model_type="unigram", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip


def fill_torch(folder: Path) -> None:
    """A pickle, and GPT-2's two files."""
    put_json(folder / "config.json", HF)
    write_torch_file(folder / "pytorch_model.bin", tensors())
    fill_byte_level(folder, 20)
    described = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    put_json(folder / "vocab.json", described["model"]["vocab"])
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in described["model"]["merges"]))


def fill_gptq(folder: Path) -> None:
    """Quantised weights under AutoGPTQ's names."""
    made = checkpoint(GPTQ, {**NARROW, "num_hidden_layers": 1})
    described = made.hf.pop("quantization_config")
    put_json(folder / "config.json", made.hf)
    put_json(folder / "quantize_config.json", {**described, "model_file_base_name": "gptq_model-4bit-64g"})
    put_tensors(folder / "gptq_model-4bit-64g.safetensors", made.tensors)
    fill_byte_level(folder, 20)


def fill_meta(folder: Path) -> None:
    """Meta's layout."""
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8, "norm_eps": 1e-5}
    put_json(folder / "params.json", {**sizes, "vocab_size": -1, "rope_theta": 5e5, "use_scaled_rope": True})
    queries = dict.fromkeys(("attention.wq", "attention.wo"), (16, 16))
    keys = dict.fromkeys(("attention.wk", "attention.wv"), (8, 16))
    widths = {"feed_forward.w1": (48, 16), "feed_forward.w2": (16, 48), "feed_forward.w3": (48, 16)}
    layer: dict[str, tuple[int, ...]] = {**queries, **keys, **widths, "attention_norm": (16,), "ffn_norm": (16,)}
    shapes: dict[str, tuple[int, ...]] = {f"layers.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"norm": (16,), "output": (96, 16), "tok_embeddings": (96, 16)}
    held = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    write_torch_file(folder / "consolidated.00.pth", held)
    write_tiktoken(folder / "tokenizer.model")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "plain": fill_plain,
    "sharded": fill_sharded,
    "torch": fill_torch,
    "gptq": fill_gptq,
    "meta": fill_meta,
}


def load(folder: Path, *, adapter: bool = False) -> None:
    """Read everything in ``folder`` that is read at start, and use it a little. Raises ``JaxdeployError``."""
    folder = resolve_model(folder)
    hf = read_hf_config(folder)
    architecture = architecture_of(hf)
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(tokenizer.encode(TEXT)[:200])
    tokenizer.encode(TEXT, parse_special=False)
    ChatTemplate.resolve(None, tokenizer, architecture)
    defaults = read_generation_defaults(folder)
    resolve(None, defaults, tokenizer, eos_token_ids=eos_token_ids(tokenizer, hf, defaults))
    family, model = family_of(hf), read_config(hf)
    if adapter:
        base = base_tensors(family, model, open_checkpoint(folder))
        read_adapter(folder / "a", adaptable(family, model), base=base)
    load_model(folder, hf, make_mesh(1), LoadOptions(jnp.dtype(jnp.float32)), model)


def mutate(bases: list[Base], case: int, target: Path) -> tuple[Base, str]:
    """Copy a folder to ``target`` and change one of its files; the same change for the same ``case``."""
    chance = random.Random(case)
    base = chance.choice(bases)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(base.folder, target)
    file = target / chance.choice(base.files).relative_to(base.folder)
    changes = [odd_kind, change_bytes, change_bytes]
    if file.suffix == ".json":
        changes = [change_json] * 12 + changes
    if file.suffix == ".safetensors":
        changes = [change_header] * 3 + changes
    change = chance.choice(changes)
    what = change(file, chance)
    return base, f"{base.folder.name}/{file.relative_to(target)}: {what}"


def odd_kind(file: Path, chance: random.Random) -> str:
    """Something else in place of a file."""
    file.unlink()
    kind = chance.choice(("missing", "folder", "fifo", "loop", "socket", "device", "empty", "sparse", "other"))
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{os.open(file.parent, os.O_RDONLY)}/{file.name}")
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "empty":
        file.touch()
    elif kind == "sparse":
        file.touch()
        os.truncate(file, 2**36)
    elif kind == "other":
        file.write_bytes(
            chance.choice((b"\xef\xbb\xbf{}", b"[" * 200_000, b'{"a":' * 200_000, b"\n" + chance.randbytes(999)))
        )
    return kind


def change_bytes(file: Path, chance: random.Random) -> str:
    """Cut a file short, or change some of its bytes; mostly near its beginning or end, where structure lies."""
    content = bytearray(file.read_bytes())
    if chance.random() < 0.15:
        cut = chance.randrange(len(content) + 1)
        file.write_bytes(content[:cut])
        return f"cut at {cut}"
    places = []
    for _ in range(chance.choice((1, 1, 2, 8))):
        span = min(len(content), chance.choice((64, 1024, len(content))))
        place = chance.randrange(span)
        place = place if chance.random() < 0.6 else len(content) - 1 - place
        content[place] = chance.choice((0, 255, chance.randrange(256), content[place] ^ 1 << chance.randrange(8)))
        places.append(place)
    file.write_bytes(content)
    return f"bytes at {places}"


def change_header(file: Path, chance: random.Random) -> str:
    """Change a value in the header of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    what = replace_value(header, chance)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return what


def change_json(file: Path, chance: random.Random) -> str:
    """Change a value in a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    what = replace_value(content, chance)
    file.write_text(json.dumps(content))
    return what


def replace_value(content: Any, chance: random.Random) -> str:
    """Replace or remove a value, or rename a key, at a random depth."""
    path, at = [], content
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = chance.choice(keys)
        path.append(key)
        if not (isinstance(at[key], dict | list) and at[key]) or chance.random() < 0.3:
            break
        at = at[key]
    kind = chance.random()
    if kind < 0.1:
        del at[key]
        return f"{path} removed"
    if kind < 0.15 and isinstance(at, dict):
        at[chance.choice(("", "\ud83d", "x" * 3000, "a\nb"))] = at.pop(key)
        return f"{path} renamed"
    value = chance.choice(VALUES)
    at[key] = value
    return f"{path} = {value!r:.40}"


def run_case(bases: list[Base], case: int, target: Path) -> dict[str, Any]:
    """How a case ends: ``loaded``, ``refused`` with its message, or ``failed`` with a traceback."""
    base, what = mutate(bases, case, target)
    found: dict[str, Any] = {"case": case, "what": what, "end": "loaded"}
    try:
        load(target, adapter=base.adapter)
    except JaxdeployError as error:
        found |= {"end": "refused", "message": str(error)}
    except BaseException:
        found |= {"end": "failed", "message": traceback.format_exc()}
    return found


def peak_memory() -> int:
    """The largest size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(folder: Path) -> None:
    """Run the cases that are asked for on stdin."""
    bases = build(folder / "bases")
    load(bases[0].folder, adapter=True)
    _say("ready")
    for line in sys.stdin:
        before, start = peak_memory(), time.monotonic()
        found = run_case(bases, int(line), folder / "case")
        _say(json.dumps(found | {"seconds": time.monotonic() - start, "grown": peak_memory() - before}))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
