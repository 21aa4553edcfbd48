"""Write tests/goldens/models: tiny checkpoints, and what transformers computes with them. Needs the [parity] extra.

    python scripts/make_goldens.py [case ...]

Each case becomes a folder with config.json, model.safetensors (bfloat16) and expected.safetensors (float32, from the
same weights): every submodule's output, the logits and the greedy continuation. The metadata of expected.safetensors
holds the versions of torch and transformers. Weights come from numpy's frozen ``RandomState``, so that a second run
writes the same.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from golden_cases import CASES, GOLDENS, NEW_TOKENS, PROMPT_LENGTH, Case
from safetensors.numpy import save_file as save_arrays

try:
    import torch
    import transformers
    from safetensors.torch import save_file as save_tensors
except ModuleNotFoundError as error:
    MISSING: str | None = error.name
else:
    MISSING = None

Array = np.ndarray[Any, Any]
NEVER = 10**9
MIN_DISTINCT = 20  # a reply that repeats itself would show little
MIN_MARGIN = 2e-3  # between the two likeliest tokens: the reply must not hang on rounding
MAX_SEED = 200


def main() -> None:
    """Write the cases that are named; without any, all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="case", help="default: all")
    names = parser.parse_args().names
    if MISSING is not None:
        parser.error(f"{MISSING} is missing; pip install 'jaxdeploy[parity]'")
    unknown = set(names) - {case.name for case in CASES}
    if unknown:
        parser.error(f"{min(unknown)} is no case; choose from {', '.join(case.name for case in CASES)}")
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        if not names or case.name in names:
            folder = GOLDENS / case.name
            shutil.rmtree(folder, ignore_errors=True)
            expected = make_case(case, folder)
            save_arrays(expected, folder / "expected.safetensors", metadata=reference_versions())
            print(f"{case.name}: {sum(file.stat().st_size for file in folder.iterdir()) / 1000:.0f} kB")


def reference_versions() -> dict[str, str]:
    """Return the versions of torch and transformers, as the [parity] extra pins them."""
    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def make_case(case: Case, folder: Path) -> dict[str, Array]:
    """Write the checkpoint of ``case`` into ``folder``; return what transformers computes with it, by submodule.

    Raises ``ValueError`` if the case's seed gives a reply that shows little; the message names a better seed.
    """
    model = build(case)
    if reason := fault_of(model, case):
        raise ValueError(f"{case.name}: seed={case.seed} {reason}; write seed={better_seed(case)} in golden_cases.py")
    folder.mkdir(parents=True)
    (save_as_internlm2 if case.internlm2 else save_as_it_is)(model, folder)
    return measure(model, prompt_of(case))


def prompt_of(case: Case) -> Array:
    """The prompt, int32 [PROMPT_LENGTH]."""
    vocab = case.settings()["vocab_size"]
    return np.random.RandomState(7).randint(vocab, size=PROMPT_LENGTH).astype(np.int32)


def build(case: Case) -> Any:
    """The transformers model, float32, with weights that bfloat16 can hold."""
    config = getattr(transformers, f"{case.reference}Config")(**case.settings())
    model = getattr(transformers, f"{case.reference}ForCausalLM")(config)
    random = np.random.RandomState(case.seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.from_numpy(draw(random, name, tuple(parameter.shape)))
            parameter.copy_(values.to(torch.bfloat16).float())
    return model.eval()


def fault_of(model: Any, case: Case) -> str | None:
    """Return why the greedy reply of ``model`` to the prompt of ``case`` shows little, or ``None`` if it is good."""
    tokens, logits = reply(model, torch.from_numpy(prompt_of(case).astype(np.int64))[None])
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    distinct, margin = len(set(tokens.tolist())), float((first - second).min())
    if distinct < MIN_DISTINCT or margin < MIN_MARGIN:
        return f"gives a reply of {distinct} distinct tokens with margin {margin:.1e}"
    return None


def better_seed(case: Case) -> int:
    """Return the lowest seed that gives ``case`` a good reply. Raises ``ValueError`` if none does."""
    for seed in range(MAX_SEED + 1):
        seeded = dataclasses.replace(case, seed=seed)
        if fault_of(build(seeded), seeded) is None:
            return seed
    raise ValueError(f"{case.name}: no seed up to {MAX_SEED} gives a good reply; change the case's options")


def draw(random: np.random.RandomState, name: str, shape: tuple[int, ...]) -> Array:
    """Weights of order one at work: sharp enough attention, norms away from 1, biases that matter."""
    values = random.standard_normal(shape).astype(np.float32)
    if name.endswith("bias"):
        return 0.25 * values
    if len(shape) == 1:
        return 1.0 + 0.3 * values
    if "embed" in name:
        return 0.1 * values  # small beside what layers add: a tied head would else repeat the last token for ever
    gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
    return gain * values / np.float32(np.sqrt(shape[1]))


def save_as_it_is(model: Any, folder: Path) -> None:
    """Write what transformers writes, in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def save_as_internlm2(model: Any, folder: Path) -> None:
    """Write a Llama under InternLM2's names, query, key and value grouped per KV head, and the older configuration."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in internlm2_tensors(model).items()}
    save_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(internlm2_config(model.config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def internlm2_config(config: Any) -> dict[str, Any]:
    """The same model in the words of InternLM2's configuration."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act")
    rope = config.rope_parameters
    scaling = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        **{name: getattr(config, name) for name in (*names, *more)},
        "bias": config.attention_bias,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "torch_dtype": "bfloat16",
    }


def internlm2_tensors(model: Any) -> dict[str, Any]:
    """The Llama's tensors, renamed and regrouped."""
    state = model.state_dict()
    tensors = {
        "model.tok_embeddings.weight": state["model.embed_tokens.weight"],
        "model.norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    kinds = ("weight", "bias") if model.config.attention_bias else ("weight",)
    for index in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        for kind in kinds:
            qkv = [state[f"{prefix}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            tensors[f"{prefix}.attention.wqkv.{kind}"] = grouped(qkv, model.config.head_dim)
            tensors[f"{prefix}.attention.wo.{kind}"] = state[f"{prefix}.self_attn.o_proj.{kind}"]
        for ours, theirs in INTERNLM2_NAMES.items():
            tensors[f"{prefix}.{ours}.weight"] = state[f"{prefix}.{theirs}.weight"]
    return tensors


INTERNLM2_NAMES: Mapping[str, str] = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def grouped(qkv: list[Any], head_dim: int) -> Any:
    """Rows of query, key and value → per KV head its queries, its key, its value, one after the other."""
    kv_heads = qkv[1].shape[0] // head_dim
    parts = [tensor.reshape(kv_heads, -1, *tensor.shape[1:]) for tensor in qkv]
    return torch.cat(parts, dim=1).flatten(0, 1)


def measure(model: Any, prompt: Array) -> dict[str, Array]:
    """Every submodule's output over ``prompt``, the logits, and the greedy continuation."""
    outputs: dict[str, Any] = {}
    handles = [module.register_forward_hook(_keep(outputs, name)) for name, module in _watched(model).items()]
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    cos, sin = outputs.pop("rope")
    half = cos.shape[-1] // 2
    outputs |= {"rope.cos": cos[..., :half], "rope.sin": sin[..., :half]}
    arrays = {name: np.ascontiguousarray(tensor[0].numpy()) for name, tensor in outputs.items()}
    return {**arrays, "prompt": prompt, "greedy": reply(model, ids)[0]}


def reply(model: Any, ids: Any) -> tuple[Array, Array]:
    """Return the NEW_TOKENS greedy tokens after ``ids``, int32, and their logits [NEW_TOKENS, V].

    Dynamic NTK keeps the frequencies of the prompt, as the engine does: transformers would change them with every token
    and leave the keys in its cache behind.
    """
    with torch.no_grad():
        model(ids)
    embedding = model.model.rotary_emb
    if embedding.rope_type == "dynamic" and ids.shape[1] > embedding.original_max_seq_len:
        embedding.max_seq_len_cached = NEVER
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
    tokens = out.sequences[0, ids.shape[1] :].numpy().astype(np.int32)
    return np.ascontiguousarray(tokens), torch.cat(out.logits).numpy()


def _watched(model: Any) -> dict[str, Any]:
    """Our names → the submodules whose outputs are compared."""
    named = {
        "embed": model.model.embed_tokens,
        "rope": model.model.rotary_emb,
        "norm": model.model.norm,
        "logits": model.lm_head,
    }
    for index, layer in enumerate(model.model.layers):
        prefix = f"layers.{index}"
        named |= {f"{prefix}.attention": layer.self_attn, f"{prefix}.mlp": layer.mlp, prefix: layer}
    return named


def _keep(outputs: dict[str, Any], name: str) -> Callable[[Any, Any, Any], None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        first = isinstance(output, tuple) and name != "rope"
        outputs[name] = output[0] if first else output

    return hook


if __name__ == "__main__":
    main()
