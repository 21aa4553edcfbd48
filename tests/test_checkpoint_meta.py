from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdeploy.checkpoint.meta import half_split_rows, meta_config
from jaxdeploy.checkpoint.source import read_hf_config
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.registry import family_of, read_config
from tests.torch_zip import write_torch_file

PARAMS = {"dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": -1}
SHAPES = {
    "tok_embeddings.weight": (12, 16),
    "norm.weight": (16,),
    "output.weight": (12, 16),
    "layers.0.attention.wq.weight": (16, 16),
    "layers.0.attention.wk.weight": (8, 16),
    "layers.0.attention.wv.weight": (8, 16),
    "layers.0.attention.wo.weight": (16, 16),
    "layers.0.feed_forward.w1.weight": (48, 16),
    "layers.0.feed_forward.w2.weight": (16, 48),
    "layers.0.feed_forward.w3.weight": (48, 16),
    "layers.0.attention_norm.weight": (16,),
    "layers.0.ffn_norm.weight": (16,),
    "rope.freqs": (2,),
}
CUT_ROWS = {"output.weight", *(f"layers.0.{n}.weight" for n in ("attention.wq", "attention.wk", "attention.wv"))}
CUT_ROWS |= {"layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w3.weight"}
CUT_COLUMNS = {"layers.0.attention.wo.weight", "layers.0.feed_forward.w2.weight"}
Tensors = dict[str, np.ndarray[Any, Any]]


def tensors() -> Tensors:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def write_release(folder: Path, whole: Tensors, ranks: int = 1, embedding_axis: int = 1, **params: Any) -> Path:
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    axes = dict.fromkeys(CUT_ROWS, 0) | dict.fromkeys(CUT_COLUMNS, 1) | {"tok_embeddings.weight": embedding_axis}
    for rank in range(ranks):
        part = {n: np.array_split(v, ranks, axes[n])[rank] if n in axes else v for n, v in whole.items()}
        write_torch_file(folder / f"consolidated.{rank:02d}.pth", part)
    return folder


@pytest.mark.parametrize(("ranks", "embedding_axis"), [(1, 0), (2, 1), (2, 0)])
def test_names_and_shapes_are_those_of_a_llama(tmp_path: Path, ranks: int, embedding_axis: int) -> None:
    whole = tensors()
    files = open_checkpoint(write_release(tmp_path, whole, ranks, embedding_axis), "llama")
    hf = read_hf_config(tmp_path, "llama")
    wanted = family_of(hf).weights(read_config(hf))
    shapes = {n: s for source in wanted.values() for n, s in zip(source.names, source.shapes, strict=True)}
    assert {name: ref.shape for name, ref in files.items()} == shapes
    assert files.faults == ()
    layer = "model.layers.0."
    for ours, theirs in [
        ("model.embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
        ("model.norm", "norm"),
        (f"{layer}self_attn.v_proj", "layers.0.attention.wv"),
        (f"{layer}self_attn.o_proj", "layers.0.attention.wo"),
        (f"{layer}mlp.gate_proj", "layers.0.feed_forward.w1"),
        (f"{layer}mlp.up_proj", "layers.0.feed_forward.w3"),
        (f"{layer}mlp.down_proj", "layers.0.feed_forward.w2"),
        (f"{layer}post_attention_layernorm", "layers.0.ffn_norm"),
    ]:
        np.testing.assert_array_equal(files[f"{ours}.weight"].read(), whole[f"{theirs}.weight"])
    q, k = (files[f"{layer}self_attn.{name}_proj.weight"].read() for name in "qk")
    np.testing.assert_array_equal(q, half_split_rows(whole["layers.0.attention.wq.weight"], 4))
    np.testing.assert_array_equal(k, half_split_rows(whole["layers.0.attention.wk.weight"], 2))


def rotated(x: np.ndarray[Any, Any], angles: np.ndarray[Any, Any], neighbours: bool) -> np.ndarray[Any, Any]:
    """Rotary embedding of one position on heads [N, H], in either pairing."""
    pairs = x.reshape(len(x), -1, 2) if neighbours else x.reshape(len(x), 2, -1).swapaxes(1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    out = np.stack([turned.real, turned.imag], -1)
    return out.reshape(x.shape) if neighbours else out.swapaxes(1, 2).reshape(x.shape)


def test_scores_are_the_same_in_both_rotary_orders() -> None:
    """Meta's rows rotated in neighbours give the same q·k as the permuted rows rotated in halves."""
    rng = np.random.default_rng(1)
    wq, wk, x = rng.normal(size=(24, 8)), rng.normal(size=(24, 8)), rng.normal(size=8)
    frequencies = 0.3 ** np.arange(4)

    def scores(q_rows: np.ndarray[Any, Any], k_rows: np.ndarray[Any, Any], neighbours: bool) -> Any:
        q = rotated((q_rows @ x).reshape(3, 8), 7 * frequencies, neighbours)
        k = rotated((k_rows @ x).reshape(3, 8), 2 * frequencies, neighbours)
        return (q * k).sum(-1)

    theirs = scores(wq, wk, neighbours=True)
    np.testing.assert_allclose(scores(half_split_rows(wq, 3), half_split_rows(wk, 3), neighbours=False), theirs)
    assert not np.allclose(scores(wq, wk, neighbours=False), theirs)


def test_only_metas_files_need_no_model_format(tmp_path: Path) -> None:
    write_release(tmp_path, tensors())
    assert "lm_head.weight" in open_checkpoint(tmp_path)
    assert read_hf_config(tmp_path)["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (
            {"dim": 4096, "multiple_of": 256, "norm_eps": 1e-6},
            {"intermediate_size": 11008, "max_position_embeddings": 2048},
        ),
        ({"dim": 4096, "multiple_of": 256}, {"intermediate_size": 11008, "max_position_embeddings": 4096}),
        (
            {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8},
            {"intermediate_size": 28672, "num_key_value_heads": 8, "head_dim": 128},
        ),
        ({"rope_theta": 1e6}, {"max_position_embeddings": 16384, "rope_theta": 1e6}),
        (
            {"vocab_size": 128256, "rope_theta": 5e5, "dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
            {
                "max_position_embeddings": 8192,
                "intermediate_size": 14336,
                "bos_token_id": 128000,
                "eos_token_id": 128001,
            },
        ),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, {"max_position_embeddings": 131072}),
    ],
)
def test_config_of_each_release(tmp_path: Path, params: dict[str, Any], expected: dict[str, Any]) -> None:
    """Sizes as in the Hugging Face conversions of Llama 1 7B, 2 7B, 2 70B, Code Llama, 3 8B and 3.1."""
    (tmp_path / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": 32000} | params))
    config = meta_config(tmp_path)
    assert {name: config[name] for name in expected} == expected
    assert ("rope_scaling" in config) == ("use_scaled_rope" in params)
    assert read_config(config).layers[0].positions.rope.kind == ("llama3" if "use_scaled_rope" in params else "default")


def test_tied_head_dtype_and_vocabulary_come_from_the_weights(tmp_path: Path) -> None:
    whole = {name: value.astype(np.float16) for name, value in tensors().items() if name != "output.weight"}
    config = meta_config(write_release(tmp_path, whole))
    assert (config["tie_word_embeddings"], config["dtype"], config["vocab_size"]) == (True, "float16", 12)


def test_missing_rank(tmp_path: Path) -> None:
    write_release(tmp_path, tensors(), ranks=2)
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "consolidated.02.pth")
    assert open_checkpoint(tmp_path).faults == ("consolidated.00.pth: missing; download it again",)
    with pytest.raises(CheckpointError, match=r"^model=.* cannot be read:\n  consolidated.00.pth: missing; download"):
        meta_config(tmp_path)


def test_tensor_that_not_all_ranks_have(tmp_path: Path) -> None:
    write_release(tmp_path, tensors(), ranks=2)
    write_torch_file(
        tmp_path / "consolidated.01.pth", {"norm.weight": np.ones(16, np.float32), "output.weight": np.ones((1, 2))}
    )
    faults = open_checkpoint(tmp_path).faults
    assert "tok_embeddings.weight: in 1 of 2 consolidated.*.pth; download them again" in faults
    assert "output.weight: differs in shape or dtype between consolidated.*.pth; download them again" in faults


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^model=.* has no params.json; model_format=llama needs Meta's original folder$"),
        ("[", r"^.*params.json: is not JSON \(.*\); download it again$"),
        ("[]", r"^.*params.json: is not a JSON object; download it again$"),
        ('{"dim": 3}', r"^.*params.json: n_layers, n_heads missing; download it again$"),
        (json.dumps(PARAMS), r"^model=.* has no consolidated.\*.pth; model_format=llama needs Meta's original folder$"),
    ],
)
def test_folder_that_is_none_of_metas(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "params.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, "llama")
