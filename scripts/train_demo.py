"""Train the bundled demo model from dialogues made up here, measure it on held-out ones, and write it to --out.

    python scripts/train_demo.py --config configs/train/demo.yaml [key=value ...] --work-dir ./work_dir

To teach a finished model new facts, train it for a few more steps:

    python scripts/train_demo.py --config configs/train/demo_update.yaml --start jaxdeploy/demo --work-dir ./work_dir

A run that was stopped resumes from its newest checkpoint when the same command is given again. Needs the [train] extra.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "scripts")]

from bench_record import picture_path, result_path  # noqa: E402
from demo.calibration_text import write_calibration_text  # noqa: E402
from demo.dialogues import make_dialogues  # noqa: E402
from demo.evaluation import evaluate, sample_conversation, write_results  # noqa: E402
from demo.export import export, plot_losses  # noqa: E402
from demo.tokenizer import IM_END, load_tokenizer, save_tokenizer, train_tokenizer  # noqa: E402
from demo.training import TrainConfig, train  # noqa: E402

from jaxdeploy.checkpoint.export import claim  # noqa: E402
from jaxdeploy.checkpoint.model import LoadOptions, load_model  # noqa: E402
from jaxdeploy.compress.texts import OWN_TEXT  # noqa: E402
from jaxdeploy.errors import JaxdeployError  # noqa: E402
from jaxdeploy.models.registry import read_config  # noqa: E402
from jaxdeploy.parallel.mesh import make_mesh  # noqa: E402

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MODEL_FILES = (*TOKENIZER_FILES, "config.json", "generation_config.json", "model.safetensors", OWN_TEXT)
RUN_FILES = (*TOKENIZER_FILES, "losses.json", "checkpoints")


def main() -> int:
    """The command; 0, or 2 with one line about what to mend."""
    args = parse_args()
    try:
        run(args)
    except JaxdeployError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the config file")
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs/train/demo.yaml", help="settings (YAML)")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="model to start from, with its tokenizer")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dir"), help="checkpoints and the loss log")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "jaxdeploy/demo", help="folder of the finished model")
    parser.add_argument("--steps", type=int, help="short for steps=N")
    parser.add_argument("--results", type=result_path, default=REPOSITORY / "benchmarks/results/demo_model.json")
    parser.add_argument("--plot", type=picture_path, default=REPOSITORY / "docs/images/demo_loss.png")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Tokenizer, training, export, then measuring what was exported."""
    overrides = args.overrides + ([f"steps={args.steps}"] if args.steps else [])
    config = TrainConfig.read(args.config, overrides)
    claim(args.out, "train_demo", MODEL_FILES)
    claim(args.work_dir, "train_demo", RUN_FILES)
    tokenizer = _tokenizer(config, args.work_dir) if args.start is None else load_tokenizer(args.start)
    hf = hf_config(config, tokenizer)
    model = read_config(hf)
    start = None
    if args.start is not None:
        start = load_model(args.start, hf, make_mesh(1), LoadOptions(jnp.dtype(jnp.float32)), model)
    decoder, losses = train(config, model, tokenizer, args.work_dir, start)
    save_tokenizer(tokenizer, args.out, max_length=config.max_position)
    export(decoder, hf, args.out)
    write_calibration_text(args.out)
    plot_losses(losses, config, args.plot)
    write_results(args.results, config, losses, evaluate(args.out, config), args.out)
    print(sample_conversation(args.out))


def _tokenizer(config: TrainConfig, work_dir: Path) -> Any:
    """The tokenizer of this run; kept in the work folder, so that a resumed run has the same one."""
    if not (work_dir / "tokenizer.json").exists():
        tokenizer = train_tokenizer(make_dialogues(config.seed, config.tokenizer_dialogues), config.vocab_size)
        save_tokenizer(tokenizer, work_dir, max_length=config.max_position)
    return load_tokenizer(work_dir)


def hf_config(config: TrainConfig, tokenizer: Any) -> dict[str, Any]:
    """``config.json`` of the model, in Hugging Face's words."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position,
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": [tokenizer.token_to_id(IM_END), tokenizer.token_to_id("</s>")],
        "pad_token_id": tokenizer.token_to_id("</s>"),
    }


if __name__ == "__main__":
    sys.exit(main())
