"""Settings of quantisation."""

from __future__ import annotations

from jaxdeploy.config.fields import FLOAT_TYPES, positive
from jaxdeploy.settings import Rule, ignored, setting, settings


@settings
class QuantConfig:
    """How a model is made small.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    method: str = setting(
        "awq",
        "awq and gptq: weights in few bits; rtn: the same, rounded to the nearest; smooth_quant: weights and "
        "activations in 8 bits; calibrate: ranges for a KV cache in 8 bits",
        choices=("awq", "gptq", "rtn", "smooth_quant", "calibrate"),
        flag=False,
    )
    work_dir: str = setting("./work_dir", "folder that the result is written to")
    overwrite: bool = setting(
        False, "replace an earlier result of jaxdeploy in work_dir; other files are never replaced"
    )
    calib_dataset: str | None = setting(
        None,
        "text to calibrate with: a .txt, .jsonl or .parquet file, or a data set of the hub: ptb, wikitext2, c4, "
        "pileval, gsm8k, neuralmagic_calibration, open-platypus, openwebtext; default: calibration.jsonl of the "
        "model's folder, or else a text that comes with jaxdeploy",
    )
    calib_samples: int | None = positive(
        "pieces of that text; 0: calibrate without data", 128, "0 works without data", minimum=0
    )
    calib_seqlen: int | None = positive("tokens in each piece", 2048, "512 to 2048 are usual", minimum=2)
    batch_size: int | None = positive("pieces that go through a layer together", 1, "1 needs the least memory")
    w_bits: int = setting(4, "bits of a weight", choices=(3, 4, 8), advice="4 is usual; 8 is for smooth_quant")
    w_group_size: int = setting(
        128,
        "inputs that share a scale; -1: all; where it does not divide a width, the largest of 128, 64 and 32 that does",
        choices=(32, 64, 128, -1),
    )
    w_sym: bool | None = setting(
        None, "symmetric: all zero points in the middle; default: in GPTQ files, which some engines read only so"
    )
    quant_dtype: str = setting("int8", "smooth_quant: type of weights and activations", choices=("int8",))
    search_scale: bool = setting(True, "awq: search how strongly activations count, for each layer; else by half")
    search_clip: bool = setting(True, "awq: search how far to clip weights")
    act_order: bool = setting(True, "gptq: round the inputs with the largest activations first")
    static_groups: bool = setting(True, "gptq: with act_order, keep groups of neighbouring inputs (faster to run)")
    true_sequential: bool = setting(True, "gptq: look at activations again after each linear map")
    damp: float = setting(
        0.01,
        "gptq: added to the diagonal of the Hessian, as a share of its mean",
        rule=Rule("must lie between 0 and 1", lambda value: 0 < value < 1),
        advice="0.01 is usual",
    )
    kv_bits: int = setting(8, "calibrate: bits of a cached key or value that the report is about", choices=(4, 8))
    format: str | None = setting(
        None,
        "layout of the result; default: awq for awq and 4-bit rtn, gptq for gptq and 3-bit rtn",
        choices=("awq", "gptq", "gptq_v2", "compressed-tensors", "smooth_quant"),
    )
    modules_to_not_convert: list[str] | None = setting(
        None, "modules that stay float, by name or last part of it, e.g. mlp.down_proj"
    )
    eval_dataset: str | None = setting(
        None, "text to measure the quality on, as calib_dataset; default: the end of the calibration text"
    )
    eval_samples: int | None = positive("pieces of that text; 0: no measurement", 8, "0 leaves it out", minimum=0)
    dtype: str = setting("auto", "type to compute in; auto: float32", choices=FLOAT_TYPES)
    tp: int = positive("devices that share the work", 1, "give the number of devices")
    load_format: str = setting(
        "auto", "auto: the checkpoint's weights; dummy: random ones from config.json", choices=("auto", "dummy")
    )
    num_layers: int | None = positive("stop after so many layers and write nothing: a trial", None, "leave it out")
    seed: int = setting(0, "of what is drawn at random")
    revision: str | None = setting(None, "branch, tag or commit of a model on the hub")
    download_dir: str | None = setting(None, "folder for models from the hub; default: the hub's own cache")

    device: str | None = ignored("JAX names the device: set JAX_PLATFORMS")
    trust_remote_code: bool | None = ignored("no code from a checkpoint is ever run")
