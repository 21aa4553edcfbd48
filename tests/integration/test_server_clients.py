"""A server process with other people's clients: OpenAI's, Anthropic's, LangChain, lm-eval; and schemathesis."""

from __future__ import annotations

import functools
import itertools
import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from jaxdeploy import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from jaxdeploy.bundled import bundled_model
from tests.integration.test_server_process import started

pytestmark = pytest.mark.slow

NAME = "jaxdeploy-demo"
FLAGS = (
    "--session-len",
    "256",
    "--max-batch-size",
    "4",
    "--no-warmup",
    "--tool-call-parser",
    "hermes",
    "--reasoning-parser",
    "think",
)
TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }}{{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The chat template of the bundled model, extended by tools and calls."""
LAST_NUMBER = {"function": "regex", "regex_pattern": r"(\d+)\D*$"}
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server process over the bundled model, whose chat template gets a place for tools and calls."""
    folder = tmp_path_factory.mktemp("server")
    template = folder / "tools.jinja"
    template.write_text(TEMPLATE)
    with started(folder / "log", *FLAGS, "--chat-template", str(template)) as (_, address):
        yield address


class Answer(BaseModel):
    """The result of a sum."""

    result: Literal[41, 42, 43]


ASK: Any = [{"role": "user", "content": "What is 6 times 7?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"left": {"enum": [1, 2, 3]}, "right": {"enum": [1, 2, 3]}},
            "required": ["left", "right"],
            "additionalProperties": False,
        },
    },
}


def test_openai(url: str) -> None:
    """Everything that its client has and a model of texts can do."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list().data] == [NAME]
    options: Any = {"model": NAME, "messages": ASK, "temperature": 0, "max_tokens": 20}
    create = client.chat.completions.create
    whole = create(**options, logprobs=True, top_logprobs=2).choices[0]
    assert whole.message.content == "6 x 7 = 42."
    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert "".join(token.token for token in whole.logprobs.content[:-1]) == whole.message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in create(**options, stream=True)]
    assert "".join(pieces) == whole.message.content
    assert [choice.index for choice in create(**options, n=3).choices] == [0, 1, 2]
    assert create(**options, stop=["="]).choices[0].message.content == "6 x 7 "
    options["max_tokens"] = 150
    parsed = client.chat.completions.parse(**options, response_format=Answer).choices[0].message.parsed
    assert isinstance(parsed, Answer)
    (call,) = (
        create(**options, tools=[TOOL], tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
    )
    assert call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"left", "right"}
    first = client.responses.create(model=NAME, input="What is 6 times 7?", temperature=0)
    assert first.output_text == whole.message.content
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert len(client.embeddings.create(model=NAME, input=["a", "b"]).data) == 2
    assert client.completions.create(model=NAME, prompt="The cat", max_tokens=3, temperature=0).choices[0].text
    with pytest.raises(openai.NotFoundError):
        create(**{**options, "model": "other"})
    with pytest.raises(openai.BadRequestError) as wrong:
        create(**{**options, "messages": [{"role": "user", "content": "word " * 300}]})
    assert wrong.value.code == "context_length_exceeded"


def test_anthropic(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    options: Any = {"model": NAME, "max_tokens": 20, "messages": ASK, "extra_body": {"temperature": 0}}
    (block,) = client.messages.create(**options).content
    assert block.type == "text"
    assert block.text == "6 x 7 = 42."
    with client.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == block.text
    assert client.messages.count_tokens(model=NAME, messages=ASK).input_tokens > 5
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**options, "model": "other"})


def test_langchain(url: str) -> None:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": NAME}
    model = ChatOpenAI(**options, temperature=0, max_tokens=150)
    whole = model.invoke("What is 6 times 7?")
    assert "42" in str(whole.content)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0
    pieces = list(model.stream("What is 6 times 7?"))
    assert len(pieces) > 3
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    said = [str(reply.content) for reply in model.batch(["What is 6 times 7?", "What is 2 plus 2?"])]
    assert said[0] == whole.content
    filled: Any = model.with_structured_output(Answer, method="json_schema").invoke("What is 6 times 7?")
    assert isinstance(filled, Answer)
    vectors = OpenAIEmbeddings(**options, check_embedding_ctx_length=False).embed_documents(["a cat", "a dog"])
    assert len(vectors) == 2
    assert sum(value * value for value in vectors[0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain_sends_its_own_replies_back(url: str, responses: bool) -> None:
    """Whole and streamed: text, a call with its result, and a thought."""
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": NAME, "temperature": 0}
    model = ChatOpenAI(**options, max_tokens=150, use_responses_api=responses)
    short = ChatOpenAI(**options, max_tokens=16, use_responses_api=responses)
    thought = {"type": "regex_schema", "regex_schema": "<think>six</think>42"}
    thinks = model.bind(extra_body={"text": {"format": thought}} if responses else {"response_format": thought})
    calls = model.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False)
    ask, again = HumanMessage("What is 6 times 7?"), HumanMessage("And?")
    for kind in (model, thinks, calls):
        for reply in (kind.invoke([ask]), functools.reduce(operator.add, kind.stream([ask]))):
            results = [ToolMessage("4", tool_call_id=call["id"]) for call in reply.tool_calls]
            assert bool(results) == (kind is calls)
            assert short.invoke([ask, reply, *results, again]).response_metadata
            assert ("42" in reply.text) == (kind is not calls)
            has_thought = any(block["type"] == "reasoning" for block in reply.content_blocks)
            assert has_thought == (responses and kind is thinks), "LangChain drops the thoughts of chat completions"


def write_task(file: Path) -> dict[str, Any]:
    """Sums with four answers to choose from, and the same as texts to write, for lm-eval."""
    lines = []
    for left, right in itertools.product(range(2, 8), range(3, 9)):
        choices = [f"{left} x {right} = {left * right + off}." for off in (0, 1, -2, 10)]
        place = (left + right) % 4
        choices[0], choices[place] = choices[place], choices[0]
        question = f"<|im_start|>user\nWhat is {left} times {right}?<|im_end|>\n<|im_start|>assistant\n"
        lines.append({"question": question, "choices": choices, "answer": place, "text": str(left * right)})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }


def tasks(folder: Path) -> list[dict[str, Any]]:
    """One of choices, by their log-probabilities, and one of texts."""
    common = write_task(folder / "sums.jsonl")
    choices = {
        **common,
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    texts = {
        **common,
        "task": "texts",
        "output_type": "generate_until",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "temperature": 0.0, "do_sample": False},
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": r"(\d+)\D*$"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    return [choices, texts]


def through_pipeline(pipe: Pipeline) -> Any:
    """A model for lm-eval that asks ``pipe``."""
    from lm_eval.api.model import TemplateLM

    def answers(prompts: Sequence[Any], **options: Any) -> list[Response]:
        replies = pipe(list(prompts), do_preprocess=False, use_tqdm=False, **options)
        return replies if isinstance(replies, list) else [replies]

    class ThroughPipeline(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return int(pipe.tokenizer.eos_token_id or 0)

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return pipe.tokenizer.encode(string, add_bos=False)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(list(before), list(after)) for _text, before, after in requests]
            prompts = [{"prompt_token_ids": before + after} for before, after in pairs]
            found = []
            replies = answers(prompts, gen_config=GenerationConfig(max_new_tokens=1, prompt_logprobs=1))
            for (_before, after), reply in zip(pairs, replies, strict=True):
                told = list(zip((reply.prompt_logprobs or [])[-len(after) :], after, strict=True))
                greedy = all(score[token] == max(score.values()) for score, token in told)
                found.append((sum(score[token] for score, token in told), greedy))
            return found

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            config = GenerationConfig(max_new_tokens=24, stop_words=["\n"], do_sample=False)
            return [reply.text for reply in answers([item.args[0] for item in requests], gen_config=config)]

    return ThroughPipeline()


@pytest.mark.standard_promotion
def test_lm_eval_has_the_same_scores_through_the_server_and_through_pipeline(url: str, tmp_path: Path) -> None:
    import lm_eval

    where = f"model={NAME},base_url={url}/v1/completions,tokenizer={bundled_model()},max_length=256,num_concurrent=4"
    with pipeline(
        bundled_model(), backend_config=EngineConfig(session_len=256, max_batch_size=4, warmup=False)
    ) as pipe:
        found: list[dict[str, Any]] = [
            lm_eval.simple_evaluate(model=model, model_args=given, tasks=tasks(tmp_path), bootstrap_iters=0)
            for model, given in (("local-completions", where), (through_pipeline(pipe), None))
        ]
    results = [{name: scores(of) for name, of in each["results"].items()} for each in found]
    assert results[0] == results[1]
    assert results[0]["choices"]["acc,none"] > 0.5
    assert results[0]["texts"]["exact_match,number"] > 0.5
    for server, here in zip(*(each["samples"]["choices"] for each in found), strict=True):
        for mine, theirs in zip(server["filtered_resps"], here["filtered_resps"], strict=True):
            assert float(mine[0]) == pytest.approx(float(theirs[0]), abs=2e-3)


def scores(of: dict[str, Any]) -> dict[str, float]:
    """Without names, and errors that were not computed."""
    return {name: value for name, value in of.items() if isinstance(value, float)}


def test_schemathesis(url: str, tmp_path: Path) -> None:
    """No request that the description allows, or does not, gets an answer that it does not tell of."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", "25"),
        *("--generation-deterministic", "--continue-on-failure", "--request-timeout", "120", "--no-color"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "120"})
    assert ran.returncode == 0, ran.stdout[-6000:]
