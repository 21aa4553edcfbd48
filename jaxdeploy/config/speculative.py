"""Settings of speculative decoding."""

from __future__ import annotations

from typing import Any

from jaxdeploy.settings import setting, settings

MAX_DRAFTS = 16
SPECULATIVE_METHODS = ("ngram", "draft", "eagle3")


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
