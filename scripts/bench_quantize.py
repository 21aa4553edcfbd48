"""How long a 7B model takes to quantise, from a few of its layers with random weights and little text.

A layer's time is a part that does not depend on the text, and one that grows with its tokens; two runs with different
amounts of text tell them apart. Peak memory holds one layer and what the text adds to it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench_record import ROOT, result_path, write_result

from jaxdeploy.compress.quantize import quantize
from jaxdeploy.compress.report import Report
from jaxdeploy.config import QuantConfig
from jaxdeploy.errors import JaxdeployError

INTERNLM2_7B: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "bias": False,
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "vocab_size": 92544,
}
LAYERS = INTERNLM2_7B["num_hidden_layers"]
FULL = (128, 2048)
RESULT = ROOT / "benchmarks/results/quantize_7b_dry_run.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["awq", "gptq"], metavar="METHOD")
    parser.add_argument("--layers", type=int, default=2, help="layers to quantise (default: 2)")
    parser.add_argument("--samples", type=int, default=16, help="pieces of text (default: 16)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in each (default: 512)")
    parser.add_argument("--out", type=result_path, default=RESULT, help="JSON to write")
    args = parser.parse_args(argv)
    config = {"model": "InternLM2-7B shapes, random weights", "layers": args.layers, "samples": args.samples}
    config |= {"seqlen": args.seqlen, "full": FULL}
    found: dict[str, dict[str, float]] = {}
    try:
        for method in args.methods:
            found[method] = one = measure(method, args.layers, args.samples, args.seqlen)
            ratios = {f"{name}_full_over_ten_minutes": its["full_run_minutes"] / 10 for name, its in found.items()}
            write_result(args.out, "quantize_dry_run/1", config, found, ratios)
            print(
                f"{method}: {one['layer_s']:.1f} s a layer at {args.samples} x {args.seqlen} tokens, "
                f"peak {one['peak_gib']:.1f} GiB; {LAYERS} layers at {FULL[0]} x {FULL[1]}: "
                f"about {one['full_run_minutes']:.0f} minutes"
            )
    except JaxdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(method: str, layers: int, samples: int, seqlen: int) -> dict[str, float]:
    """Seconds of a layer and peak memory with all of the text, and what a whole run would take."""
    less = _report(method, layers, samples // 4, seqlen)
    full = _report(method, layers, samples, seqlen)
    layer, small = (median(report.seconds_per_layer[1:] or report.seconds_per_layer) for report in (full, less))
    per_token = max(layer - small, 0.0) / ((samples - samples // 4) * seqlen)
    fixed = layer - per_token * samples * seqlen
    whole = LAYERS * (fixed + per_token * FULL[0] * FULL[1])
    return {
        "layer_s": layer,
        "first_layer_s": full.seconds_per_layer[0],
        "fixed_s": fixed,
        "per_1000_tokens_s": 1000 * per_token,
        "peak_gib": (full.peak_memory or 0) / 2**30,
        "full_run_minutes": whole / 60,
    }


def _report(method: str, layers: int, samples: int, seqlen: int) -> Report:
    config = QuantConfig(
        method=method,
        load_format="dummy",
        num_layers=layers,
        calib_samples=samples,
        calib_seqlen=seqlen,
        eval_samples=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(INTERNLM2_7B))
        return quantize(folder, config, progress=True)


if __name__ == "__main__":
    sys.exit(main())
