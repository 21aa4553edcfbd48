"""Training of the bundled demo model: settings, batches by seed and step, one jitted step, a resumable loop."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from optax.contrib import MuonDimensionNumbers
from tqdm import tqdm

from demo.dialogues import Dialogue, make_dialogue
from demo.tokenizer import encode_dialogue
from jaxdeploy.checkpoint.orbax import TrainingCheckpoints
from jaxdeploy.errors import ConfigError
from jaxdeploy.files.atomic import put_text
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Decoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IGNORE = -1


@dataclass(frozen=True)
class TrainConfig:
    """The keys of ``configs/train/demo.yaml``; see there."""

    seed: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rope_theta: float
    tokenizer_dialogues: int
    tokens_per_step: int
    length: int
    long_length: int
    long_share: float
    turns: tuple[int, int]
    long_turns: tuple[int, int]
    steps: int
    copying_steps: int
    sums_from: int
    memory_from: int
    learning_rate: float
    muon_learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta2: float
    clip_norm: float
    save_every: int
    eval_dialogues: int

    @classmethod
    def read(cls, path: Path, overrides: list[str]) -> TrainConfig:
        """The YAML file with ``key=value`` overrides. Raises ``ConfigError`` for unknown or missing keys."""
        import yaml

        settings: dict[str, Any] = yaml.safe_load(path.read_text())
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise ConfigError(f"override={override} is not key=value; write for example steps=1000")
            settings[key] = yaml.safe_load(value)
        known = {field.name for field in fields(cls)}
        if wrong := sorted(known ^ settings.keys()):
            raise ConfigError(f"{path}: keys {', '.join(wrong)} are unknown or missing; see configs/train/demo.yaml")
        pairs: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
        }
        return cls(**pairs)

    def as_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)

    @property
    def first_long_step(self) -> int:
        """The step from which rows are long."""
        return round(self.steps * (1.0 - self.long_share))


def batch(config: TrainConfig, tokenizer: Tokenizer, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of ``step``, int32 [B, T]; targets are ``IGNORE`` outside replies."""
    long = step >= config.first_long_step
    length, turns = (config.long_length, config.long_turns) if long else (config.length, config.turns)
    rng = random.Random(f"{config.seed}/{step}")
    late = "memory" if step >= config.memory_from else "sums" if step >= config.sums_from else None
    practise = "copying" if step < config.copying_steps else late
    make = partial(make_dialogue, rng, turns=turns, practise=practise)
    rows = [_row(make, tokenizer, length + 1) for _ in range(config.tokens_per_step // length)]
    tokens = np.array([ids for ids, _ in rows], np.int32)
    in_reply = np.array([owner for _, owner in rows]) > 0
    return tokens[:, :-1], np.where(in_reply, tokens, IGNORE)[:, 1:].astype(np.int32)


def _row(make: Callable[[], Dialogue], tokenizer: Tokenizer, length: int) -> tuple[list[int], list[int]]:
    """Whole dialogues one after the other, the last one cut; each begins with ``<s>``."""
    ids: list[int] = []
    owner: list[int] = []
    while len(ids) < length:
        more, owners = encode_dialogue(tokenizer, make())
        ids += more
        owner += owners
    return ids[:length], owner[:length]


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Muon (kellerjordan.github.io/posts/muon) for the layers' matrices, AdamW (arXiv:1711.05101) for the rest.

    Both follow the same warm-up and cosine; gradients are clipped by their global norm.
    """
    warmup = min(config.warmup_steps, config.steps // 2)

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps)

    muon = optax.contrib.muon(
        schedule(config.muon_learning_rate),
        weight_decay=config.weight_decay,
        adam_learning_rate=schedule(config.learning_rate),
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=_matrices,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), muon)


def _matrices(params: Any) -> Any:
    """For every weight of a layer which axes are its inputs and which its outputs; ``None`` leaves it to AdamW."""
    axes = {
        "wqkv": MuonDimensionNumbers((0,), (1, 2, 3)),
        "wo": MuonDimensionNumbers((0, 1), (2,)),
        "gate_up": MuonDimensionNumbers((0,), (1, 2)),
        "down": MuonDimensionNumbers((0,), (1,)),
    }
    return jax.tree_util.tree_map_with_path(lambda path, _: axes.get(path[-1].key), params)


def loss_of(graph: nnx.GraphDef[Decoder], params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy (nats) over the tokens of replies. ``tokens`` and ``targets`` int32 [B, T]."""
    logits = nnx.merge(graph, params)(tokens)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    counted = targets != IGNORE
    return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1)


Step = Callable[[Any, Any, np.ndarray, np.ndarray], tuple[Any, Any, jax.Array]]


def make_step(graph: nnx.GraphDef[Decoder], optimizer: optax.GradientTransformation) -> Step:
    """The jitted training step: (params, optimiser state, tokens, targets) → (params, optimiser state, loss)."""

    def step(params: Any, state: Any, tokens: Any, targets: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(lambda p: loss_of(graph, p, tokens, targets))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def train(
    config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer, work_dir: Path, start: Decoder | None = None
) -> tuple[Decoder, list[float]]:
    """Train to ``config.steps``, and resume from the newest checkpoint in ``work_dir`` if it has one.

    The first weights are those of ``start`` (float32), or random. Returns the decoder and the loss of every step.
    """
    graph, variables = nnx.split(start or Decoder(model, rngs=nnx.Rngs(config.seed)))
    params: Any = nnx.to_pure_dict(variables)
    if start is None:
        params = _rescaled(params)
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    log = work_dir / "losses.json"
    with TrainingCheckpoints(work_dir / "checkpoints", keep=2) as checkpoints:
        first, losses = checkpoints.latest() or 0, []
        if first:
            params, state = checkpoints.restore(first, (params, state))
            losses = json.loads(log.read_text())[:first]
        step = make_step(graph, optimizer)
        for number, (tokens, targets) in _batches(config, tokenizer, first):
            params, state, loss = step(params, state, tokens, targets)
            losses.append(float(loss))
            if (number + 1) % config.save_every == 0 or number + 1 == config.steps:
                put_text(log, json.dumps(losses))
                checkpoints.save(number + 1, (params, state))
    return merged(graph, params), losses


def _rescaled(params: Any) -> Any:
    """Fresh weights with those that read the residual stream brought from 0.02 to the usual 1/√D.

    Attention scores would otherwise start out flat, and heads that copy from earlier turns would form late.
    """

    def scaled(path: Any, weight: jax.Array) -> jax.Array:
        reads = getattr(path[-1], "key", None) in ("wqkv", "gate_up")
        return weight * (50.0 * weight.shape[0] ** -0.5) if reads else weight

    return jax.tree_util.tree_map_with_path(scaled, params)


def merged(graph: nnx.GraphDef[Decoder], params: Any) -> Decoder:
    """The decoder with ``params``, a pure dict."""
    _, like = nnx.split(nnx.eval_shape(lambda: nnx.merge(graph, params)))
    nnx.replace_by_pure_dict(like, params)
    return nnx.merge(graph, like)


def _batches(
    config: TrainConfig, tokenizer: Tokenizer, first: int
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Numbered batches from step ``first`` on, behind a progress bar in tokens."""
    todo = config.steps * config.tokens_per_step
    done = first * config.tokens_per_step
    with tqdm(total=todo, initial=done, unit="tok", unit_scale=True, desc="training", mininterval=2.0) as bar:
        for number in range(first, config.steps):
            yield number, batch(config, tokenizer, number)
            bar.update(config.tokens_per_step)
