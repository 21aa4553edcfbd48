"""LMDeploy's Python surface: arguments in the order of any version, settings at their defaults, names."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest

import jaxdeploy
from jaxdeploy import (
    ChatTemplateConfig,
    EngineConfig,
    GenerationConfig,
    Pipeline,
    PytorchEngineConfig,
    ServerConfig,
    SpeculativeConfig,
    TurbomindEngineConfig,
    pipeline,
)
from jaxdeploy.engine.front.generator import Generator
from jaxdeploy.errors import ConfigError, JaxdeployError, RequestError
from tests.fake_generator import FakeGenerator, fake_pipeline

ENGINE, TEMPLATE = EngineConfig(session_len=99), ChatTemplateConfig(model_name="vicuna")

DEFAULTS: dict[str, dict[str, Any]] = {
    "turbomind": {
        **dict.fromkeys(("dp", "cp", "ep", "nnodes", "max_prefill_iters", "async_", "cache_prompt_boundary_skip"), 1),
        **dict.fromkeys(("attn_tp_size", "attn_cp_size", "attn_dp_size", "mlp_tp_size", "mlp_dp_size")),
        **dict.fromkeys(("outer_dp_size", "device_num", "dist_init_addr", "devices", "hf_overrides")),
        **dict.fromkeys(("empty_init", "language_model_only", "use_logn_attn", "disable_vision_encoder"), False),
        "node_rank": 0,
        "cache_chunk_size": -1,
        "cache_checkpoint_interval": 4096,
        "cache_prompt": "auto",
        "cache_generation": "auto",
        "communicator": "nccl",
        "enable_metrics": True,
        "cache_block_seq_len": 64,
        "num_tokens_per_iter": 0,
    },
    "pytorch": {
        **dict.fromkeys(("dp", "ep"), 1),
        **dict.fromkeys(("dp_rank", "num_cpu_blocks", "num_gpu_blocks", "prefix_cache_state_budget"), 0),
        **dict.fromkeys(("prefix_cache_decode_state_interval",), 0),
        **dict.fromkeys(("attn_tp_size", "mlp_tp_size", "moe_tp_size", "custom_module_map", "logprobs_mode")),
        **dict.fromkeys(("dllm_block_length", "dllm_denoising_steps", "cudagraph_capture_batch_sizes")),
        **dict.fromkeys(("thread_safe", "eager_mode", "empty_init", "enable_microbatch", "enable_eplb"), False),
        **dict.fromkeys(("enable_return_routed_experts", "enable_transfer_obj_ref", "enable_mp_engine"), False),
        "prefill_interval": 16,
        "kernel_block_size": -1,
        "device_type": "cuda",
        "distributed_executor_backend": None,
        "mp_engine_backend": "mp",
        "eviction_type": "recompute",
        "dllm_unmasking_strategy": "low_confidence_dynamic",
        "dllm_confidence_threshold": 0.85,
        "role": "Hybrid",
        "migration_backend": "DLSlime",
    },
    "generation": {
        **dict.fromkeys(("logits_processors", "output_logits", "output_last_hidden_state", "migration_request")),
        **dict.fromkeys(("return_ppl", "with_cache", "preserve_cache", "return_routed_experts"), False),
        "repetition_ngram_size": 0,
        "repetition_ngram_threshold": 0,
    },
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(TurbomindEngineConfig, "turbomind"), (PytorchEngineConfig, "pytorch"), (GenerationConfig, "generation")],
)
def test_settings_at_lmdeploys_defaults(kind: type[Any], name: str) -> None:
    counted = {field: 0 for field in ("num_tokens_per_iter", "num_cpu_blocks") if field in DEFAULTS[name]}
    assert kind(**DEFAULTS[name]) == kind(**counted)


def test_a_default_is_taken_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "jaxdeploy"):
        EngineConfig(cp=1, dp=1, nnodes=1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cp", 2),
        ("dp", 2),
        ("ep", 8),
        ("nnodes", 2),
        ("hf_overrides", {"a": 1}),
        ("role", "Prefill"),
        ("empty_init", True),
    ],
)
def test_other_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=.* is not there yet; "):
        EngineConfig(**{name: value})


class LoadedError(Exception):
    """What would be loaded."""

    def __init__(self, config: EngineConfig, template: Any) -> None:
        self.config, self.template = config, template


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_model: str, config: EngineConfig, *, chat_template: Any, **_: Any) -> None:
        raise LoadedError(config, chat_template)

    monkeypatch.setattr(Generator, "from_pretrained", load)


@pytest.mark.parametrize(
    ("positional", "named"),
    [
        ((ENGINE, TEMPLATE), {}),
        ((ENGINE, TEMPLATE, "ERROR"), {}),
        ((ENGINE, TEMPLATE, "ERROR", None, False, None), {}),
        ((None, ENGINE, TEMPLATE, "ERROR"), {}),
        (("internlm-chat-7b", ENGINE, TEMPLATE, "ERROR"), {}),
        (("internlm-chat-7b", ENGINE), {"chat_template_config": TEMPLATE, "trust_remote_code": True}),
        ((), {"backend_config": ENGINE, "chat_template_config": TEMPLATE, "allowed_media_domains": None}),
        ((), {"backend_config": {"session_len": 99}, "chat_template_config": {"model_name": "vicuna"}}),
        ((), {"backend_config": ENGINE, "chat_template_config": TEMPLATE, "vision_config": None, "max_log_len": 10}),
    ],
)
def test_pipelines_arguments_in_the_order_of_any_version(
    loads: None, positional: tuple[Any, ...], named: dict[str, Any]
) -> None:
    with pytest.raises(LoadedError) as loaded:
        pipeline("model", *positional, **named)
    assert (loaded.value.config, loaded.value.template) == (ENGINE, TEMPLATE)


def test_more_of_pipelines_arguments(loads: None) -> None:
    with pytest.raises(LoadedError) as loaded:
        pipeline("model", tp=2, speculative_config=SpeculativeConfig(method="ngram"))
    assert (loaded.value.config.tp, loaded.value.config.speculative_method) == (2, "ngram")
    with pytest.raises(LoadedError) as named:
        pipeline("model", "vicuna")
    assert named.value.template == "vicuna"


@pytest.mark.parametrize(
    ("positional", "named", "says"),
    [
        ((ENGINE, ENGINE), {}, "backend_config is given twice"),
        ((5,), {}, "backend_config=5 must be a EngineConfig"),
        ((), {"backend_config": {"tpp": 1}}, "tpp=1 is not a setting of EngineConfig"),
        ((), {"vision_config": object()}, "vision_config=.* is not there; models read text only"),
        ((), {"sesion_len": 5}, "the nearest one is session_len"),
        ((), {"log_level": "LOUD"}, "log_level='LOUD'"),
    ],
)
def test_wrong_arguments_of_pipeline(
    loads: None, positional: tuple[Any, ...], named: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        pipeline("model", *positional, **named)


@pytest.mark.parametrize(
    ("positional", "named"),
    [
        (("name", "turbomind", ENGINE, TEMPLATE, "127.0.0.1", 5, "ERROR", ["k"], False), {}),
        (("name",), {"backend_config": ENGINE, "chat_template_config": TEMPLATE, "server_name": "127.0.0.1"}),
        ((ENGINE, ServerConfig(server_name="127.0.0.1")), {"chat_template_config": TEMPLATE, "model_name": "name"}),
        ((ENGINE,), {"chat_template_config": TEMPLATE, "server_name": "127.0.0.1", "model_name": "name"}),
        ((), {"session_len": 99, "chat_template_config": TEMPLATE, "server_name": "127.0.0.1", "model_name": "name"}),
    ],
)
def test_serves_arguments(monkeypatch: pytest.MonkeyPatch, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    served: dict[str, Any] = {}

    def serve(model: str, engine: EngineConfig, server: ServerConfig, **options: Any) -> None:
        served.update(options, model=model, engine=engine, server=server)

    monkeypatch.setattr("jaxdeploy.server.serve", serve)
    jaxdeploy.serve("model", *positional, **named)
    assert served["engine"] == EngineConfig(session_len=99, model_name="name")
    assert served["chat_template"] == TEMPLATE
    assert served["server"].server_name == "127.0.0.1"
    with pytest.raises(ConfigError, match="EngineConfig or ServerConfig; the nearest one is server_port"):
        jaxdeploy.serve("model", sever_port=5)
    with pytest.raises(ConfigError, match="backend='vllm'"):
        jaxdeploy.serve("model", backend="vllm")


def test_names_of_lmdeploys_that_are_not_there() -> None:
    with pytest.raises(ImportError, match=r"Pipeline\.tokenizer"):
        from jaxdeploy import Tokenizer  # noqa: F401
    assert not hasattr(jaxdeploy, "nothing")
    with pytest.raises(JaxdeployError, match="cannot be reached"):
        jaxdeploy.client("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "function",
    [
        jaxdeploy.pipeline,
        jaxdeploy.serve,
        jaxdeploy.client,
        Pipeline.__call__,
        Pipeline.stream_infer,
        Pipeline.chat,
    ],
)
def test_help_shows_arguments(function: Any) -> None:
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    assert inspect.Parameter.VAR_POSITIONAL not in kinds
    assert len(kinds) > 1


@pytest.mark.parametrize(
    ("positional", "named"),
    [
        ((GenerationConfig(max_new_tokens=3),), {}),
        (({"max_new_tokens": 3},), {}),
        (([{"max_new_tokens": 3}],), {}),
        ((None, 3), {}),
        ((None, True, None), {"request_output_len": 3}),
        ((), {"gen_config": {"max_new_tokens": 9}, "max_new_tokens": 3, "use_tqdm": False}),
    ],
)
def test_arguments_of_a_call(positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    pipe, _ = fake_pipeline(template="base")
    reply = pipe(["abcdef"], *positional, **named)
    assert isinstance(reply, list)
    assert reply[0].generate_token_len == 3
    pieces = list(pipe.stream_infer("abcdef", *positional[:1], max_new_tokens=3, stream_response=True))
    assert len(pieces) == 3


@pytest.mark.parametrize(
    ("prompts", "named", "says"),
    [
        ("a", {"gen_config": 5}, "gen_config=5 must be a GenerationConfig"),
        ("a", {"gen_config": {"max_new_tokenz": 3}}, "the nearest one is max_new_tokens"),
        ("a", {"gen_config": "abc"}, "gen_config='abc' must be a GenerationConfig"),
        ("a", {"do_preprocess": "no"}, "do_preprocess='no' must be true or false"),
        ("a", {"sessions": [1]}, "sessions=.*Pipeline.chat"),
    ],
)
def test_wrong_arguments_of_a_call(prompts: Any, named: dict[str, Any], says: str) -> None:
    pipe, generator = fake_pipeline(template="base")
    with pytest.raises((ConfigError, RequestError), match=says):
        pipe(prompts, **named)
    assert isinstance(generator, FakeGenerator)
    assert not generator.submitted
