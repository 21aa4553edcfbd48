"""From an ``EngineConfig`` to a proposer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxdeploy.checkpoint.model import load_model
from jaxdeploy.checkpoint.source import read_hf_config, resolve_model
from jaxdeploy.config import EngineConfig
from jaxdeploy.engine.batch import step_shapes
from jaxdeploy.engine.kv_cache import CachePlan, allocate_pools
from jaxdeploy.engine.model_runner import ModelRunner
from jaxdeploy.engine.speculation import Proposer, Speculation
from jaxdeploy.engine.speculation.draft import DraftProposer, draft_shapes
from jaxdeploy.engine.speculation.ngram import NgramProposer
from jaxdeploy.errors import ConfigError
from jaxdeploy.models.config import ModelConfig
from jaxdeploy.models.decoder import Decoder
from jaxdeploy.models.registry import family_of
from jaxdeploy.parallel.sharding import check_divisible
from jaxdeploy.tokenizer import Tokenizer
