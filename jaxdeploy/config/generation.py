"""Settings of one reply."""

from __future__ import annotations

from typing import Any

from jaxdeploy.config.fields import positive
from jaxdeploy.settings import Rule, ignored, missing, setting, settings

MAX_ALTERNATIVES = 128


def _share(help: str, *, flag: bool = True) -> Any:
    return setting(None, help, rule=Rule("must lie between 0 and 1", lambda value: 0 <= value <= 1), flag=flag)


def _penalty(help: str) -> Any:
    return setting(None, help, rule=Rule("must lie between -2 and 2", lambda value: -2 <= value <= 2))


@settings
class GenerationConfig:
    """How one reply is generated.

    ``None`` means not set: ``jaxdeploy.generation.resolved`` says what then holds.

    Raises:
        ConfigError: a value breaks its rule, or a name is unknown.
    """

    n: int | None = setting(
        None,
        "alternative replies to each prompt",
        rule=Rule(f"must lie between 1 and {MAX_ALTERNATIVES}", lambda value: 1 <= value <= MAX_ALTERNATIVES),
        advice="give a number of replies",
        flag=False,
    )
    max_new_tokens: int | None = positive("longest reply, in tokens; default 512", None, "give a number of tokens")
    do_sample: bool | None = setting(None, "draw tokens at random; false: always the most likely one")
    top_p: float | None = _share("draw from the likeliest tokens that make up this probability")
    top_k: int | None = positive(
        "draw from this many likeliest tokens; 0: all, 1: greedy", None, "0 keeps all", minimum=0
    )
    min_p: float | None = _share("draw from tokens at least this likely, relative to the likeliest")
    temperature: float | None = setting(
        None,
        "spread of the draw; 0: greedy",
        rule=Rule("must lie between 0 and 100", lambda value: 0 <= value <= 100),
        advice="0 is greedy, 1 leaves the model's distribution as it is",
    )
    repetition_penalty: float | None = setting(
        None,
        "make tokens of prompt and reply less likely (above 1)",
        rule=Rule("must be above 0 and at most 100", lambda value: 0 < value <= 100),
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
    min_new_tokens: int | None = positive("shortest reply, in tokens", None, "0 sets no minimum", minimum=0)
    skip_special_tokens: bool | None = setting(None, "leave special tokens out of the text; default true")
    spaces_between_special_tokens: bool | None = setting(
        None, "put spaces between special tokens that are shown; default true", flag=False
    )
    logprobs: int | None = positive(
        "alternatives whose log-probabilities are reported with each token",
        None,
        "0 reports the chosen token alone",
        minimum=0,
        flag=False,
    )
    prompt_logprobs: int | None = positive(
        "the same for the tokens of the prompt", None, "0 reports the prompt's tokens alone", minimum=0, flag=False
    )
    logit_bias: dict[int, float] | None = setting(
        None, "token id → what is added to its logit; -100 forbids, 100 all but forces it", flag=False
    )
    include_stop_str_in_output: bool | None = setting(None, "keep the text that ended the reply", flag=False)
    num_speculative_tokens: int | None = positive(
        "draft tokens per step, at most the number of the engine, which is the default",
        None,
        "0 drafts none",
        minimum=0,
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
