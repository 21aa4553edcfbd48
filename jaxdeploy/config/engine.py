"""Settings of the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdeploy.config.fields import FLOAT_TYPES, positive
from jaxdeploy.config.speculative import MAX_DRAFTS, SPECULATIVE_METHODS
from jaxdeploy.errors import ConfigError
from jaxdeploy.settings import Rule, alias, ignored, missing, setting, settings

_ONE_ENGINE = "there is one engine, for every device"
_ONLY_TP = "tp spreads a model over devices"
_NO_DIFFUSION = "no diffusion model is loaded"
_PREFIX_CACHE = "enable_prefix_caching is the one switch"


def _named_folders(given: Any) -> Any:
    """A mapping of texts like ``name=folder``; a folder alone is named by its last part. Others stay as they are."""
    if isinstance(given, Mapping):
        return {
            name: os.fspath(folder) if isinstance(folder, os.PathLike) else folder for name, folder in given.items()
        }
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return given
    folders: dict[str, str] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals:
            name, folder = Path(text).name, text
        if name in folders:
            raise ConfigError(f"adapters={given!r} names {name!r} twice; give each a name of its own, as NAME=PATH")
        folders[name] = folder
    return folders


def _names_folders(adapters: dict[Any, Any]) -> bool:
    return all(isinstance(text, str) and text for pair in adapters.items() for text in pair)


def _valid_cache_share(value: float) -> bool:
    return value > 0 and (isinstance(value, int) or value <= 1)


@settings
class EngineConfig:
    """How the engine holds a model and its KV cache.

    ``None`` leaves the choice to the engine.
    ``TurbomindEngineConfig`` and ``PytorchEngineConfig`` are this same class.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    dtype: str = setting("auto", "weights and activations; auto: as stored on GPU, float32 on CPU", choices=FLOAT_TYPES)
    tp: int = positive("devices that share each layer (tensor parallelism)", 1, "give the number of devices")
    session_len: int | None = positive(
        "longest prompt plus reply, in tokens; default: what the model was made for, at most 8192",
        None,
        "give a number of tokens",
        minimum=2,
    )
    max_batch_size: int | None = positive(
        "sequences that run at the same time; default: 128 on GPU, 8 on CPU", None, "give a number of sequences"
    )
    cache_max_entry_count: float = setting(
        0.8,
        "share of the device memory free after the weights that the KV cache takes; a whole number: that many blocks",
        rule=Rule("must be a share above 0 and at most 1.0, or a whole number of blocks", _valid_cache_share),
        advice="0.8 is usual",
    )
    num_blocks: int | None = positive(
        "KV cache blocks, in place of cache_max_entry_count", None, "give a number of blocks"
    )
    num_cpu_blocks: int | None = positive(
        "blocks in host memory for what the device evicts; default: a quarter of what is free there, none on CPU",
        None,
        "0 computes again what was evicted",
        minimum=0,
    )
    block_size: int = setting(
        64,
        "tokens in a KV cache block",
        rule=Rule("must be a power of two", lambda value: value >= 1 and value & (value - 1) == 0),
        advice="64 is usual",
    )
    enable_prefix_caching: bool = setting(
        True, "compute the beginning that prompts have in common once, and keep it for later ones"
    )
    quant_policy: int = setting(
        0,
        "KV cache: 0 as dtype says, 8 int8, 4 int4 (int8 where the model folder has KV parameters of LMDeploy 0.3)",
        choices=(0, 4, 8),
        reads={"none": 0, "int4": 4, "int8": 8},
        advice="8 halves the KV cache of a 16-bit model",
    )
    model_format: str | None = setting(
        None,
        "layout of the checkpoint: hf (Hugging Face), llama (Meta's consolidated.*.pth), or how its weights are "
        "quantised; default: look",
        choices=("hf", "llama", "awq", "gptq", "gptq_v2", "compressed-tensors", "smooth_quant"),
        advice="leave it out, and config.json decides",
    )
    load_format: str = setting(
        "auto",
        "auto: the checkpoint's weights; dummy: random ones from config.json alone, to measure speed",
        choices=("auto", "dummy"),
    )
    max_prefill_token_num: int | None = positive(
        "most prompt tokens in one engine step; default: 8192 on GPU, 512 on CPU", None, "give a number of tokens"
    )
    num_tokens_per_iter: int | None = positive(
        "most tokens in a step that computes prompts beside replies, so that those do not stall; default: 2048 on GPU, "
        "128 on CPU",
        None,
        "give a number of tokens",
        minimum=0,
    )
    decode_steps: int = positive(
        "tokens that every reply gets in one launch while nobody waits; more than 1 helps where the host is slower "
        "than the device",
        1,
        "1 is usual",
    )
    speculative_method: str | None = setting(
        None,
        "draft tokens and verify several in one step; the reply stays the same: ngram (what followed the same tokens "
        "before), draft (a smaller model), eagle3 (a head trained for the model); default: draft where a "
        "speculative_model is given, else none",
        choices=SPECULATIVE_METHODS,
    )
    speculative_model: str | None = setting(
        None, "model that drafts, with the same tokenizer: a folder or a hub id; for draft and eagle3"
    )
    num_speculative_tokens: int | None = setting(
        None,
        "draft tokens per step; default: 7 for ngram, 3 for the others",
        rule=Rule(f"must lie between 1 and {MAX_DRAFTS}", lambda value: 1 <= value <= MAX_DRAFTS),
        advice="3 and 7 are usual: with the token before them they fill up what is computed together",
    )
    adapters: dict[str, str] | None = setting(
        None,
        "LoRA adapters that requests may ask for: NAME=PATH for each, or PATH, whose name is then its last part",
        rule=Rule("must be names with folders, none of them empty", _names_folders),
        advice="give NAME=PATH, the folder that PEFT saved an adapter to",
        reads=_named_folders,
    )
    max_loras: int | None = positive(
        "adapters that may be in use at a time; default: 8 where there are adapters; without any, room for those that "
        "are loaded later",
        None,
        "8 is usual; others wait their turn",
    )
    max_lora_rank: int | None = positive(
        "largest rank of an adapter; default: 16, or what those that are given need",
        None,
        "16 and 64 are usual",
    )
    rope_scaling_factor: float = setting(
        0.0,
        "stretch positions by this factor (dynamic NTK); 0: as the model's config.json says",
        rule=Rule("must be at least 0", lambda value: value >= 0),
        advice="0 leaves positions alone",
    )
    revision: str | None = setting(None, "branch, tag or commit of a model on the hub")
    download_dir: str | None = setting(None, "folder for models from the hub; default: the hub's own cache")
    warmup: bool = setting(True, "compile and run every shape before the first request")
    compilation_cache_dir: str | None = setting(
        None, "folder where compiled programs are kept; default: ~/.cache/jaxdeploy"
    )
    model_name: str | None = setting(None, "name of a built-in chat template, as in LMDeploy 0.3")

    cache_block_seq_len: int | None = alias("block_size")
    num_gpu_blocks: int | None = alias("num_blocks")
    speculative_algorithm: str | None = alias("speculative_method")
    speculative_draft_model: str | None = alias("speculative_model")
    speculative_num_draft_tokens: int | None = alias("num_speculative_tokens")

    hf_overrides: dict[str, Any] | None = missing("edit a copy of config.json")
    attn_cp_size: int | None = missing(_ONLY_TP, 1)
    attn_dp_size: int | None = missing(_ONLY_TP, 1)
    attn_tp_size: int | None = missing(_ONLY_TP, 1)
    cp: int | None = missing(_ONLY_TP, 1)
    device_num: int | None = missing(_ONLY_TP)
    dist_init_addr: str | None = missing("the devices of one machine are used")
    dp: int | None = missing("start several servers and a proxy", 1)
    dp_rank: int | None = missing("start several servers and a proxy", 0)
    ep: int | None = missing(_ONLY_TP, 1)
    mlp_dp_size: int | None = missing(_ONLY_TP, 1)
    mlp_tp_size: int | None = missing(_ONLY_TP, 1)
    moe_tp_size: int | None = missing(_ONLY_TP, 1)
    nnodes: int | None = missing("the devices of one machine are used", 1)
    node_rank: int | None = missing("the devices of one machine are used", 0)
    outer_dp_size: int | None = missing("start several servers and a proxy", 1)
    custom_module_map: Any = missing("add a family to jaxdeploy.models.registry")
    dllm_block_length: int | None = missing(_NO_DIFFUSION)
    dllm_confidence_threshold: float | None = missing(_NO_DIFFUSION, 0.85)
    dllm_denoising_steps: int | None = missing(_NO_DIFFUSION)
    dllm_unmasking_strategy: str | None = missing(_NO_DIFFUSION, "low_confidence_dynamic")
    empty_init: bool | None = missing("load_format='dummy' starts without a checkpoint's weights", False)
    enable_eplb: bool | None = missing("no family here has experts", False)
    enable_microbatch: bool | None = missing("a step runs as one batch", False)
    enable_return_routed_experts: bool | None = missing("no family here has experts", False)
    logprobs_mode: str | None = missing("log-probabilities are those before penalties and temperature", "raw_logprobs")
    role: Any = missing("prompts and replies run on the same devices", "Hybrid")

    cache_checkpoint_interval: int | None = ignored(_PREFIX_CACHE)
    cache_generation: str | None = ignored(_PREFIX_CACHE)
    cache_prompt: str | None = ignored(_PREFIX_CACHE)
    cache_prompt_boundary_skip: int | None = ignored(_PREFIX_CACHE)
    disable_vision_encoder: bool | None = ignored("only language models are loaded")
    enable_transfer_obj_ref: bool | None = ignored(_ONE_ENGINE)
    migration_backend: Any = ignored("prompts and replies run on the same devices")
    prefix_cache_decode_state_interval: int | None = ignored(_PREFIX_CACHE)
    prefix_cache_state_budget: int | None = ignored(_PREFIX_CACHE)
    async_: int | None = ignored("steps always overlap as far as the device allows")
    cache_chunk_size: int | None = ignored("the KV cache is one array per layer")
    communicator: str | None = ignored("XLA brings its own collectives")
    cudagraph_capture_batch_sizes: list[int] | None = ignored("shapes are compiled at warm-up")
    device_type: str | None = ignored("JAX names the device: set JAX_PLATFORMS")
    devices: list[int] | None = ignored("JAX names the devices: set CUDA_VISIBLE_DEVICES")
    distributed_executor_backend: str | None = ignored(_ONE_ENGINE)
    eager_mode: bool | None = ignored("every step is compiled")
    enable_metrics: bool | None = ignored("metrics belong to the server")
    enable_mp_engine: bool | None = ignored(_ONE_ENGINE)
    eviction_type: str | None = ignored("blocks go to host memory, or are computed again, whichever is faster")
    kernel_block_size: int | None = ignored("kernels take block_size as it is")
    language_model_only: bool | None = ignored("only language models are loaded")
    max_log_len: int | None = ignored("prompts are not logged")
    max_prefill_iters: int | None = ignored("prompts are cut by max_prefill_token_num")
    mp_engine_backend: str | None = ignored(_ONE_ENGINE)
    prefill_interval: int | None = ignored("prompts and replies share every step")
    thread_safe: bool | None = ignored("calls from several threads are always safe")
    trust_remote_code: bool | None = ignored("no code from a checkpoint is ever run")
    use_logn_attn: bool | None = ignored("no family here has it")
