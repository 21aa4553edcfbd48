"""The head of EAGLE-3 from its folder, as its authors store it or as vLLM's ``speculators`` do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxdeploy.checkpoint.loader import load_params
from jaxdeploy.checkpoint.tensor_ref import Array
from jaxdeploy.checkpoint.tensors import open_checkpoint
from jaxdeploy.errors import CheckpointError
from jaxdeploy.models.eagle3 import Eagle3, Eagle3Config, eagle3_weights
from jaxdeploy.models.weights import Source
from jaxdeploy.parallel.sharding import sharding_of

LAYER_NAMES = ("midlayer", "layers.0")
MASK = "t2d"
"""Which of the model's tokens the head knows: nothing that the other table does not say."""
OFFSETS = "d2t"


def load_eagle3(
    folder: Path, config: Eagle3Config, embedding: jax.Array, mesh: Mesh, dtype: jnp.dtype, *, progress: bool = False
) -> Eagle3:
    """The head in ``folder``; ``embedding`` [V, D] is the model's, for one that has none of its own.

    Raises ``CheckpointError`` that lists every tensor that is missing, unexpected or has another shape.
    """
    files = open_checkpoint(folder)
    files = replace(files, tensors={name: ref for name, ref in files.items() if name != MASK})
    layer = next((name for name in LAYER_NAMES if f"{name}.hidden_norm.weight" in files), LAYER_NAMES[0])
    table = eagle3_weights(config, layer, own_embedding="embed_tokens.weight" in files)
    if OFFSETS in files:
        table["tokens",] = _offsets(config.draft_vocab_size, config.layer.vocab_size)
    head = nnx.eval_shape(lambda: Eagle3(config, rngs=nnx.Rngs(0), dtype=dtype))
    shapes: Any = dict(nnx.to_flat_state(nnx.state(head, nnx.Param)))
    place = partial(sharding_of, mesh)
    arrays = load_params({path: shapes[path] for path in table}, table, files, sharding_of=place, progress=progress)
    arrays.setdefault(("embedding", "table"), embedding)
    arrays.setdefault(("tokens",), jnp.arange(config.draft_vocab_size, dtype=jnp.int32))
    nnx.update(head, nnx.from_flat_state({path: shape.replace(arrays[path]) for path, shape in shapes.items()}))
    return head


def _offsets(count: int, vocab_size: int) -> Source:
    """The tensor holds the number of a token in the model less its number in the head."""
    numbers = np.arange(count)

    def assemble(arrays: Sequence[Array]) -> Array:
        tokens: Array = arrays[0] + numbers
        if not ((tokens >= 0) & (tokens < vocab_size)).all():
            raise CheckpointError(
                f"{OFFSETS}: names tokens that are not below vocab_size={vocab_size}; download it again"
            )
        return tokens

    return Source(
        (OFFSETS,),
        ((count,),),
        assemble,
        lambda value: [value - numbers],
        integers=frozenset({OFFSETS}),
    )
