"""The arguments of a call in addition to its prompts: for all prompts, or one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from jaxdeploy.api.arguments import config_of, split_settings, without_unused
from jaxdeploy.config import GenerationConfig
from jaxdeploy.errors import ConfigError
from jaxdeploy.files.stored import shown

GenConfigs: TypeAlias = (
    GenerationConfig | Mapping[str, Any] | Sequence[GenerationConfig | Mapping[str, Any] | None] | None
)
"""How to generate: for all prompts, or for each."""

AdapterNames: TypeAlias = str | Sequence[str | None] | None
"""One LoRA adapter for all prompts, or one for each; ``None`` is the model itself."""


@dataclass(frozen=True)
class CallOptions:
    """How prompts are answered.

    gen_config: for all prompts, or for each.
    do_preprocess: whether texts are put into the chat template.
    adapter_name: for all prompts, or for each.
    ending: how the text of messages ends, as ``ChatTemplate.render`` has it.
    session_id: the session of all prompts; ``None``: a new one for each.
    fields: fields of ``GenerationConfig`` that replace those of ``gen_config``.
    """

    gen_config: GenConfigs = None
    do_preprocess: bool = True
    adapter_name: AdapterNames = None
    ending: Mapping[str, bool | None] = field(default_factory=dict)
    session_id: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_call(
        cls, gen_config: GenConfigs, do_preprocess: Any, adapter_name: AdapterNames, options: Mapping[str, Any]
    ) -> CallOptions:
        """Return the options of a call. LMDeploy 0.3 has ``request_output_len`` before ``do_preprocess``.

        Raises ``ConfigError``.
        """
        given = {"adapter_name": adapter_name, **without_unused(options)}
        if isinstance(do_preprocess, bool):
            return cls.of(gen_config, {**given, "do_preprocess": do_preprocess})
        if isinstance(do_preprocess, int) and adapter_name is None:
            return cls.of(gen_config, {**given, "request_output_len": do_preprocess})
        raise ConfigError(
            f"do_preprocess={shown(do_preprocess)} must be true or false; name the arguments after gen_config"
        )

    @classmethod
    def of(cls, gen_config: GenConfigs, options: Mapping[str, Any]) -> CallOptions:
        """Return ``options`` by their names; those that are no options of a call are fields of the config."""
        fields = dict(options)
        ending = {name: fields.pop(name, None) for name in ("add_generation_prompt", "continue_final_message")}
        do_preprocess = fields.pop("do_preprocess", True)
        adapter_name = fields.pop("adapter_name", None)
        session_id = fields.pop("session_id", None)
        if "request_output_len" in fields:
            fields["max_new_tokens"] = fields.pop("request_output_len")
        return cls(gen_config, do_preprocess, adapter_name, ending, session_id, fields)

    def configs(self, count: int) -> list[GenerationConfig]:
        """Return a config for each of ``count`` prompts. Raises ``ConfigError``."""
        given = self.gen_config
        listed: Sequence[Any] = given if isinstance(given, list | tuple) else [given] * count
        several = [config_of(GenerationConfig, one, "gen_config") for one in listed]
        _check_count("gen_config", len(several), count)
        fields = {name: value for name, value in self.fields.items() if value is not None}
        return [config for one in several for config in split_settings(fields, one)]

    def adapters(self, count: int) -> list[str | None]:
        """Return an adapter for each of ``count`` prompts. Raises ``ConfigError``."""
        given = self.adapter_name
        several = [given] * count if given is None or isinstance(given, str) else list(given)
        _check_count("adapter_name", len(several), count)
        return several


def _check_count(name: str, count: int, prompts: int) -> None:
    if count != prompts:
        raise ConfigError(f"{name} has {count} entries for {prompts} prompts; give one for each, or one for all")
