"""What the throughput benchmark asks for, and what it makes of the answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from bench_throughput import Job, Ride, read_jobs, summary

from jaxdeploy.errors import ConfigError
from jaxdeploy.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,318,8
2023-11-16 18:17:05.4799600,7,27
2023-11-16 18:17:06.0000000,70,3
"""


def args(file: Path, **change: Any) -> argparse.Namespace:
    usual = {"num_prompts": 64, "prompt_scale": 1.0, "arrivals": False, "session_len": 1024, "model": None}
    return argparse.Namespace(file=str(file), **{**usual, **change})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_lengths_and_times_of_a_trace(trace: Path) -> None:
    jobs = read_jobs(args(trace, prompt_scale=1 / 16, arrivals=True), 100)
    assert [(len(job.prompt), job.new) for job in jobs] == [(300, 10), (19, 8), (1, 27), (4, 3)]
    assert [round(job.comes, 3) for job in jobs] == [0.0, 0.052, 1.5, 2.02]
    assert all(3 <= token < 100 for job in jobs for token in job.prompt)
    assert {job.comes for job in read_jobs(args(trace), 100)} == {0.0}


def test_what_does_not_fit_is_left_out(trace: Path) -> None:
    assert [job.new for job in read_jobs(args(trace, num_prompts=2), 100)] == [8, 27]
    with pytest.raises(ConfigError, match="has no request of at most session_len=9 tokens"):
        read_jobs(args(trace, session_len=9), 100)


def test_equal_lengths() -> None:
    jobs = read_jobs(args(Path("30+7"), num_prompts=3), 100)
    assert [(len(job.prompt), job.new) for job in jobs] == [(30, 7)] * 3
    assert jobs[0].prompt != jobs[1].prompt


def test_conversations(tmp_path: Path) -> None:
    """The first question and the length of its answer; what is too short, or has no answer, does not count."""
    question, answer = "What is the capital of France?", "The capital of France is Paris."
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}, {"from": "human", "value": "And?"}]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}, {"id": "nothing"}]))
    model = ROOT / "jaxdeploy/demo"
    tokenizer = Tokenizer.load(model)
    (job,) = read_jobs(args(path, model=str(model)), 100)
    assert job == Job(tuple(tokenizer.encode(question)), len(tokenizer.encode(answer, add_bos=False)))
    with pytest.raises(ConfigError, match="--model must name a checkpoint for texts"):
        read_jobs(args(path), 100)


def test_rates_and_waits() -> None:
    jobs = [Job((1, 2), 3), Job((1,), 1, comes=0.5)]
    ride = Ride(2.0, {0: [(0.5, 1), (1.0, 1), (1.5, 1)], 1: [(1.0, 1)]})
    found = summary(jobs, [ride])
    assert found["output_tok_s"]["p50"] == 2.0
    assert found["total_tok_s"]["p50"] == 3.5
    assert (found["ttft_s"]["p50"], found["itl_s"]["p50"], found["latency_s"]["p50"]) == (0.5, 0.5, 1.0)


def test_a_system_that_tells_only_the_end_has_no_first_token() -> None:
    found = summary([Job((1, 2), 3)], [Ride(2.0, {0: [(1.5, 3)]})])
    assert "ttft_s" not in found
    assert "itl_s" not in found


def test_no_token_may_be_missing() -> None:
    with pytest.raises(AssertionError, match="left tokens out"):
        summary([Job((1, 2), 3)], [Ride(2.0, {0: [(1.5, 2)]})])
