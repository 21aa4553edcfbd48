"""The finished demo model as a folder in Hugging Face layout, and the plot of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from bench_record import save_figure
from flax import nnx

from demo.training import TrainConfig
from jaxdeploy.checkpoint.export import save_checkpoint
from jaxdeploy.checkpoint.loader import load_params
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.files.atomic import put_text
from jaxdeploy.models.decoder import Decoder, abstract_params, decoder_from
from jaxdeploy.models.registry import family_of, read_config


def export(decoder: Decoder, hf: dict[str, Any], folder: Path) -> None:
    """Weights in bfloat16, ``config.json`` and a greedy ``generation_config.json``."""
    params: dict[Any, Any] = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}
    save_checkpoint(folder, params, family_of(hf).weights(decoder.config), hf, dtype=ml_dtypes.bfloat16)
    generation = {
        "bos_token_id": hf["bos_token_id"],
        "eos_token_id": hf["eos_token_id"],
        "pad_token_id": hf["pad_token_id"],
        "do_sample": False,
        "max_new_tokens": 256,
    }
    put_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def load(folder: Path) -> Decoder:
    """The exported model, in float32 as it runs on a CPU."""
    hf = json.loads((folder / "config.json").read_text())
    config = read_config(hf)
    table = family_of(hf).weights(config)
    abstract = abstract_params(config, np.dtype(np.float32))
    return decoder_from(config, load_params(abstract, table, open_checkpoint(folder, None), dtype=np.float32))


def plot_losses(losses: list[float], config: TrainConfig, file: Path) -> None:
    """Loss over tokens: every step, and the mean of 50."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tokens = np.arange(1, len(losses) + 1) * config.tokens_per_step / 1e6
    width = min(50, len(losses))
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=110)
    axes.semilogy(tokens, losses, color="#c5d3e8", linewidth=0.6, label="step")
    mean = np.convolve(losses, np.full(width, 1 / width), "valid")
    axes.semilogy(tokens[width - 1 :], mean, color="#24548f", linewidth=1.4, label=f"mean of {width} steps")
    axes.axvline(config.first_long_step * config.tokens_per_step / 1e6, color="#999999", linestyle=":", linewidth=1)
    axes.set(xlabel="million tokens", ylabel="cross-entropy of replies (nats)", title="Training of the demo model")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    save_figure(figure, file, dpi=110)
    pyplot.close(figure)
