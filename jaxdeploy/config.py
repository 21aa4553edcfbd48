"""Every setting of jaxdeploy: the one source of Python arguments, YAML keys and command-line flags.

Field names are LMDeploy's. A field of LMDeploy's that has no meaning here is accepted and logs one line; one whose
feature is still to come is accepted by name and raises when it is used; any other name raises and names the nearest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdeploy.errors import CheckpointError, ConfigError
from jaxdeploy.files.atomic import check_replaceable, is_json, put_text
from jaxdeploy.files.stored import read_text, shown
from jaxdeploy.settings import alias, ignored, missing, secret, setting, settings

_XLA = "XLA chooses how the work is laid out"
_ONE_ENGINE = "there is one engine, for every device"
_ONLY_TP = "tp spreads a model over devices"
_NO_DIFFUSION = "no diffusion model is loaded"
_PREFIX_CACHE = "enable_prefix_caching is the one switch"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "WARN", "ERROR", "CRITICAL", "FATAL", "NOTSET")
MAX_DRAFTS = 16
SPECULATIVE_METHODS = ("ngram", "draft", "eagle3")
_REAL_NUMBERS = ("auto", "float32", "bfloat16", "float16")


def _positive(help: str, default: int | None, advice: str, *, least: int = 1, flag: bool = True) -> Any:
    return setting(
        default,
        help,
        holds=lambda value: least <= value < 2**31,
        rule=f"must be at least {least} and below 2^31",
        advice=advice,
        flag=flag,
    )


def _seconds(default: float, help: str) -> Any:
    return setting(default, help, holds=lambda value: value > 0, rule="must be more than 0", advice="give seconds")


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

    dtype: str = setting(
        "auto", "weights and activations; auto: as stored on GPU, float32 on CPU", choices=_REAL_NUMBERS
    )
    tp: int = _positive("devices that share each layer (tensor parallelism)", 1, "give the number of devices")
    session_len: int | None = _positive(
        "longest prompt plus reply, in tokens; default: what the model was made for, at most 8192",
        None,
        "give a number of tokens",
        least=2,
    )
    max_batch_size: int | None = _positive(
        "sequences that run at the same time; default: 128 on GPU, 8 on CPU", None, "give a number of sequences"
    )
    cache_max_entry_count: float = setting(
        0.8,
        "share of the device memory free after the weights that the KV cache takes; a whole number: that many blocks",
        holds=_valid_cache_share,
        rule="must be a share above 0 and at most 1.0, or a whole number of blocks",
        advice="0.8 is usual",
    )
    num_blocks: int | None = _positive(
        "KV cache blocks, in place of cache_max_entry_count", None, "give a number of blocks"
    )
    num_cpu_blocks: int | None = _positive(
        "blocks in host memory for what the device evicts; default: a quarter of what is free there, none on CPU",
        None,
        "0 computes again what was evicted",
        least=0,
    )
    block_size: int = setting(
        64,
        "tokens in a KV cache block",
        holds=lambda value: value >= 1 and value & (value - 1) == 0,
        rule="must be a power of two",
        advice="64 is usual",
    )
    enable_prefix_caching: bool = setting(
        True, "compute the beginning that prompts have in common once, and keep it for later ones"
    )
    quant_policy: int = setting(
        0,
        "KV cache: 0 as dtype says, 8 int8, 4 int4 (int8 where the model folder has KV parameters of LMDeploy 0.3)",
        choices=(0, 4, 8),
        words={"none": 0, "int4": 4, "int8": 8},
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
    max_prefill_token_num: int | None = _positive(
        "most prompt tokens in one engine step; default: 8192 on GPU, 512 on CPU", None, "give a number of tokens"
    )
    num_tokens_per_iter: int | None = _positive(
        "most tokens in a step that computes prompts beside replies, so that those do not stall; default: 2048 on GPU, "
        "128 on CPU",
        None,
        "give a number of tokens",
        least=0,
    )
    decode_steps: int = _positive(
        "tokens that every reply gets in one launch while nobody waits; more than 1 helps where the host is slower "
        "than the device",
        1,
        "1 is usual",
    )
    speculative_method: str | None = setting(
        None,
        "guess tokens and verify several in one step; the reply stays the same: ngram (what came behind the same words "
        "before), draft (a smaller model), eagle3 (a head trained for the model); default: draft where a "
        "speculative_model is given, else none",
        choices=SPECULATIVE_METHODS,
    )
    speculative_model: str | None = setting(
        None, "model that guesses, with the same tokenizer: a folder or a hub id; for draft and eagle3"
    )
    num_speculative_tokens: int | None = setting(
        None,
        "tokens guessed at a time; default: 7 for ngram, 3 for the others",
        holds=lambda value: 1 <= value <= MAX_DRAFTS,
        rule=f"must lie between 1 and {MAX_DRAFTS}",
        advice="3 and 7 are usual: with the token before them they fill up what is computed together",
    )
    adapters: dict[str, str] | None = setting(
        None,
        "LoRA adapters that requests may ask for: NAME=PATH for each, or PATH, whose name is then its last part",
        holds=_names_folders,
        rule="must be names with folders, none of them empty",
        advice="give NAME=PATH, the folder that PEFT saved an adapter to",
        reads=_named_folders,
    )
    max_loras: int | None = _positive(
        "adapters that may be in use at a time; default: 8 where there are adapters; without any, room for those that "
        "are loaded later",
        None,
        "8 is usual; others wait their turn",
    )
    max_lora_rank: int | None = _positive(
        "largest rank of an adapter; default: 16, or what those that are given need",
        None,
        "16 and 64 are usual",
    )
    rope_scaling_factor: float = setting(
        0.0,
        "stretch positions by this factor (dynamic NTK); 0: as the model's config.json says",
        holds=lambda value: value >= 0,
        rule="must be at least 0",
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


@settings
class SpeculativeConfig:
    """LMDeploy's form of the speculative settings of ``EngineConfig``, for ``pipeline``.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    method: str = setting("ngram", "speculative_method", choices=SPECULATIVE_METHODS)
    model: str | None = setting(None, "speculative_model")
    num_speculative_tokens: int | None = setting(None, "num_speculative_tokens")

    @property
    def fields(self) -> dict[str, Any]:
        """As fields of ``EngineConfig``."""
        count = self.num_speculative_tokens
        named = {"speculative_method": self.method, "speculative_model": self.model or None}
        return named if count is None else {**named, "num_speculative_tokens": count}


TurbomindEngineConfig = EngineConfig
PytorchEngineConfig = EngineConfig


def _share(help: str, *, flag: bool = True) -> Any:
    return setting(None, help, holds=lambda value: 0 <= value <= 1, rule="must lie between 0 and 1", flag=flag)


def _penalty(help: str) -> Any:
    return setting(None, help, holds=lambda value: -2 <= value <= 2, rule="must lie between -2 and 2")


@settings
class GenerationConfig:
    """How one reply is generated.

    ``None`` means not set: ``jaxdeploy.generation.resolved`` says what then holds.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    n: int | None = _positive("alternative replies to each prompt", None, "give a number of replies", flag=False)
    max_new_tokens: int | None = _positive("longest reply, in tokens; default 512", None, "give a number of tokens")
    do_sample: bool | None = setting(None, "draw tokens at random; false: always the most likely one")
    top_p: float | None = _share("draw from the likeliest tokens that make up this probability")
    top_k: int | None = _positive(
        "draw from this many likeliest tokens; 0: all, 1: greedy", None, "0 keeps all", least=0
    )
    min_p: float | None = _share("draw from tokens at least this likely, relative to the likeliest")
    temperature: float | None = setting(
        None,
        "spread of the draw; 0: greedy",
        holds=lambda value: 0 <= value <= 100,
        rule="must lie between 0 and 100",
        advice="0 is greedy, 1 leaves the model's distribution as it is",
    )
    repetition_penalty: float | None = setting(
        None,
        "make tokens of prompt and reply less likely (above 1)",
        holds=lambda value: 0 < value <= 100,
        rule="must be above 0 and at most 100",
        advice="1 changes nothing",
    )
    presence_penalty: float | None = _penalty("subtract this from the logit of each token already in the reply")
    frequency_penalty: float | None = _penalty("subtract this for every time a token is already in the reply")
    ignore_eos: bool | None = setting(None, "go on past the end that the model sets")
    random_seed: int | None = setting(None, "makes a random reply repeatable; default: another one each time")
    stop_words: list[str] | None = setting(None, "texts that end the reply")
    bad_words: list[str] | None = setting(None, "texts that must not appear")
    stop_token_ids: list[int] | None = setting(None, "tokens that end the reply", flag=False)
    bad_token_ids: list[int] | None = setting(None, "tokens that must not appear", flag=False)
    min_new_tokens: int | None = _positive("shortest reply, in tokens", None, "0 sets no minimum", least=0)
    skip_special_tokens: bool | None = setting(None, "leave special tokens out of the text; default true")
    spaces_between_special_tokens: bool | None = setting(
        None, "put spaces between special tokens that are shown; default true", flag=False
    )
    logprobs: int | None = _positive(
        "alternatives whose log-probabilities are reported with each token",
        None,
        "0 reports the chosen token alone",
        least=0,
        flag=False,
    )
    prompt_logprobs: int | None = _positive(
        "the same for the tokens of the prompt", None, "0 reports the prompt's tokens alone", least=0, flag=False
    )
    logit_bias: dict[int, float] | None = setting(
        None, "token id → what is added to its logit; -100 forbids, 100 all but forces it", flag=False
    )
    include_stop_str_in_output: bool | None = setting(None, "keep the text that ended the reply", flag=False)
    num_speculative_tokens: int | None = _positive(
        "tokens guessed at a time, at most as many as the engine does; default: as many",
        None,
        "0 guesses none",
        least=0,
        flag=False,
    )
    response_format: dict[str, Any] | None = setting(
        None, "form that the reply has to have; see jaxdeploy.grammar.response_format", flag=False
    )

    logits_processors: list[Any] | None = missing("bad_words and the penalties change logits")
    output_logits: str | None = missing("logprobs and prompt_logprobs report log-probabilities")
    output_last_hidden_state: str | None = missing("Pipeline.embed gives the hidden states of prompts, pooled")

    repetition_ngram_size: int | None = missing("repetition_penalty makes repetitions less likely", 0)
    repetition_ngram_threshold: int | None = missing("repetition_penalty makes repetitions less likely", 0)
    return_ppl: bool | None = missing("Pipeline.get_ppl has it", False)

    migration_request: Any = ignored("prompts and replies run on the same devices")
    preserve_cache: bool | None = ignored("the cache is freed when the reply ends")
    with_cache: bool | None = ignored("the cache is freed when the reply ends")
    return_routed_experts: bool | None = ignored("no family here has experts")


@settings
class ServerConfig:
    """How the HTTP server listens, whom it lets in, and how much it takes.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    server_name: str = setting("0.0.0.0", "address to listen on; 127.0.0.1: this machine alone")
    server_port: int = setting(
        23333,
        "port to listen on; a proxy's default is 8000",
        holds=lambda value: 0 <= value < 65536,
        rule="must lie between 0 and 65535",
    )
    api_keys: list[str] | None = secret(
        "keys of which every request must bring one; default: those of the environment's JAXDEPLOY_API_KEYS, with "
        "spaces between them, else none is needed"
    )
    api_keys_file: str | None = setting(None, "file with a key on each line, in place of api_keys")
    separate_keys: bool = setting(
        True,
        "where there are several keys, requests share cached prompts, sessions and stored responses only with those of "
        "the same key, end only those, and have no priority over others",
    )
    ssl: bool = setting(False, "speak HTTPS")
    ssl_certfile: str | None = setting(None, "certificate chain (PEM); default: the environment's SSL_CERTFILE")
    ssl_keyfile: str | None = setting(None, "its private key (PEM); default: the environment's SSL_KEYFILE")
    allow_origins: list[str] | None = setting(
        None, "web pages of these origins may ask (CORS), * all; default: none but the server's own"
    )
    allow_credentials: bool = setting(False, "CORS: requests may bring cookies")
    allow_methods: list[str] | None = setting(None, "CORS: methods; default: all")
    allow_headers: list[str] | None = setting(None, "CORS: headers; default: all")
    tool_call_parser: str | None = setting(
        None, "how the model writes calls: hermes, llama3, internlm2 or mistral; default: as its chat template tells"
    )
    reasoning_parser: str | None = setting(
        None, "how the model writes thoughts: think; default: as its chat template tells"
    )
    max_concurrent_requests: int = _positive(
        "replies that are generated or wait; what is more is turned away with 429", 1024, "give a number of replies"
    )
    max_body_size: int = _positive("largest body of a request, in bytes", 32 * 1024**2, "give a number of bytes")
    disable_fastapi_docs: bool = setting(False, "have no /docs and /openapi.json")
    log_format: str = setting("text", "how a line of the log reads", choices=("text", "json"))
    proxy_url: str | None = setting(None, "proxy to register this server with, as long as it runs")
    proxy_api_key: str | None = secret(
        "one of this proxy's --operator-keys; it is told the first of --api-keys; default: JAXDEPLOY_PROXY_API_KEY"
    )
    node_url: str | None = setting(
        None, "address at which the proxy reaches this server; default: that of the network towards it"
    )


PROXY_PORT = 8000
"""Where a proxy listens unless told otherwise; LMDeploy's."""


@settings
class ProxyConfig:
    """How a proxy chooses among the servers (nodes) behind it, and when it gives one up.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    nodes: list[str] | None = setting(None, "addresses of servers to begin with; others are added while it runs")
    node_api_key: str | None = secret(
        "the key that --nodes ask for; servers that register bring their own; default: JAXDEPLOY_NODE_API_KEY"
    )
    operator_keys: list[str] | None = secret(
        "keys for /nodes, /metrics and abort_all; default: JAXDEPLOY_OPERATOR_KEYS, else these routes are closed if "
        "there are other keys, and open if there are none"
    )
    routing_strategy: str = setting(
        "least_loaded",
        "least_loaded: fewest requests that run; latency: the same, weighed by how fast replies begin; prefix: where a "
        "prompt that begins alike went, unless that node is much busier; random. LMDeploy's min_expected_latency is "
        "least_loaded, its min_observed_latency is latency",
        choices=("least_loaded", "latency", "prefix", "random"),
        words={"min_expected_latency": "least_loaded", "min_observed_latency": "latency"},
    )
    heartbeat_interval: float = _seconds(2.0, "seconds between two looks at a node")
    heartbeat_timeout: float = _seconds(20.0, "seconds after which a node that gives no sign of life is given up")
    read_timeout: float = _seconds(600.0, "seconds that a node which is well may be silent in the middle of a reply")
    max_attempts: int = _positive(
        "nodes that may die or fail with one request before it is answered with an error", 2, "2 is one retry"
    )


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
    calib_samples: int | None = _positive(
        "pieces of that text; 0: calibrate without data", 128, "0 works without data", least=0
    )
    calib_seqlen: int | None = _positive("tokens in each piece", 2048, "512 to 2048 are usual", least=2)
    batch_size: int | None = _positive("pieces that go through a layer together", 1, "1 needs the least memory")
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
        holds=lambda value: 0 < value < 1,
        rule="must lie between 0 and 1",
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
    eval_samples: int | None = _positive("pieces of that text; 0: no measurement", 8, "0 leaves it out", least=0)
    dtype: str = setting("auto", "type to compute in; auto: float32", choices=_REAL_NUMBERS)
    tp: int = _positive("devices that share the work", 1, "give the number of devices")
    load_format: str = setting(
        "auto", "auto: the checkpoint's weights; dummy: random ones from config.json", choices=("auto", "dummy")
    )
    num_layers: int | None = _positive("stop after so many layers and write nothing: a trial", None, "leave it out")
    seed: int = setting(0, "of what is drawn at random")
    revision: str | None = setting(None, "branch, tag or commit of a model on the hub")
    download_dir: str | None = setting(None, "folder for models from the hub; default: the hub's own cache")

    device: str | None = ignored("JAX names the device: set JAX_PLATFORMS")
    trust_remote_code: bool | None = ignored("no code from a checkpoint is ever run")


@settings
class ChatTemplateConfig:
    """Which chat template, and pieces that replace parts of it.

    ``None`` leaves a piece as it is. ``model_name`` is a name that ``jaxdeploy list`` shows, ``None`` the checkpoint's
    own template. One turn reads ``system + meta_instruction + eosys + user + text + eoh + assistant + reply + eoa +
    separator``.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    model_name: str | None = setting(None, "name of a built-in chat template (jaxdeploy list)")
    system: str | None = setting(None, "before the system prompt")
    meta_instruction: str | None = setting(None, "the system prompt; empty: none, not even the template's default")
    eosys: str | None = setting(None, "after the system prompt")
    user: str | None = setting(None, "before what the user says")
    eoh: str | None = setting(None, "after what the user says")
    assistant: str | None = setting(None, "before a reply")
    eoa: str | None = setting(None, "after a reply")
    tool: str | None = setting(None, "before a tool's result")
    eotool: str | None = setting(None, "after a tool's result")
    separator: str | None = setting(None, "between two turns")
    capability: str | None = setting(
        None,
        "what a text prompt is: a chat message, or raw text to complete",
        choices=("chat", "completion", "infilling", "python"),
    )
    stop_words: list[str] | None = setting(None, "texts that end a reply")

    model_path: str | None = ignored("the template comes from the model that is loaded")

    @classmethod
    def from_json(cls, file_or_string: str | Path) -> ChatTemplateConfig:
        """Read LMDeploy's JSON form, from a file or from a text that holds it. Raises ``ConfigError``."""
        text = str(file_or_string)
        if not text.lstrip().startswith("{"):
            text = _read_text(Path(text))
        try:
            pieces = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"chat_template={shown(str(file_or_string))} is not JSON ({error}); mend it") from None
        if not isinstance(pieces, dict):
            raise ConfigError(f"chat_template={shown(str(file_or_string))} must hold a JSON object; mend it")
        return cls(**pieces)

    def to_json(self, file_path: str | Path | None = None) -> str:
        """The pieces that are set, as JSON; written to ``file_path`` too if it is given. Raises ``ConfigError``."""
        pieces = {name: value for name, value in vars(self).items() if value is not None}
        text = json.dumps(pieces, ensure_ascii=False, indent=2)
        if file_path is not None:
            _write_text(Path(file_path), text + "\n")
        return text


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, CheckpointError) as error:
        raise ConfigError(f"chat_template={str(path)!r} cannot be read ({error}); name a JSON file") from None


def _write_text(path: Path, text: str) -> None:
    try:
        check_replaceable(path, is_json(dict))
        put_text(path, text)
    except OSError as error:
        raise ConfigError(f"file_path={str(path)!r} cannot be written ({error.strerror}); name another file") from None
