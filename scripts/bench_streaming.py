#!/usr/bin/env python
"""What HTTP costs: tokens a second of a server's streams, beside those of ``pipeline`` on the same prompts, in one run.

A model of a built-in shape with random weights, and a vocabulary of words, so that every token is text that a stream
has to carry. The two take turns.

    python scripts/bench_streaming.py --out benchmarks/results/streaming_cpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
from bench_generation import SHAPES, write_shape
from bench_record import result_path, spread, write_result
from tqdm import tqdm

from jaxdeploy import EngineConfig, GenerationConfig, Pipeline, pipeline

PIPELINE, SERVER = "pipeline", "server"


def main() -> None:
    """Run the benchmark."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        write_shape(folder, args.shape, args.session_len)
        write_words(folder, SHAPES[args.shape]["vocab_size"])
        prompts = np.random.default_rng(0).integers(3, 1000, (args.batch, args.prompt)).tolist()
        with server(folder, args) as url, local(folder, args) as pipe:
            rates = measure(url, pipe, prompts, args)
    metrics = {f"{name}_tok_s": spread(rates[name]) for name in rates}
    ratio = metrics[f"{SERVER}_tok_s"]["p50"] / metrics[f"{PIPELINE}_tok_s"]["p50"]
    print(json.dumps({**metrics, "server / pipeline": round(ratio, 3)}, indent=1))
    if args.out:
        config = {key: value for key, value in vars(args).items() if key != "out"}
        write_result(args.out, "streaming/1", config, metrics, {"server / pipeline": round(ratio, 3)})


def parse_args() -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-110m", help="a built-in shape (default: llama-110m)")
    parser.add_argument("--batch", type=int, default=16, help="requests at a time (default: 16)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt (default: 32)")
    parser.add_argument("--new", type=int, default=64, help="tokens of each reply (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--session-len", type=int, default=256)
    parser.add_argument("--out", type=result_path, help="JSON file to write, usually under benchmarks/results/")
    return parser.parse_args()


def write_words(folder: Path, size: int) -> None:
    """A tokenizer with ``size`` words for its tokens."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f" w{number}": number for number in range(3, size)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.decoder = decoders.Fuse()
    words.save(str(folder / "tokenizer.json"))


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The same for both."""
    return EngineConfig(
        load_format="dummy",
        session_len=args.session_len,
        max_batch_size=args.batch,
        enable_prefix_caching=False,  # every round asks the same
    )


@contextmanager
def local(folder: Path, args: argparse.Namespace) -> Iterator[Pipeline]:
    """The model in this process."""
    with pipeline(str(folder), backend_config=engine_config(args)) as pipe:
        yield pipe


@contextmanager
def server(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """The model behind HTTP; its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    config = engine_config(args)
    names = ("load_format", "session_len", "max_batch_size")
    flags = [text for name in names for text in (f"--{name}", str(getattr(config, name)))]
    flags += ["--no-enable-prefix-caching", "--server-port", str(port), "--log-level", "WARNING"]
    command = [sys.executable, "-m", "jaxdeploy", "serve", "api_server", str(folder), "--server-name", "127.0.0.1"]
    with subprocess.Popen([*command, *flags]) as running:
        url = f"http://127.0.0.1:{port}"
        while not answers(url):
            if running.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        yield url
        running.terminate()


def answers(url: str) -> bool:
    """Whether the server is there."""
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False


def measure(url: str, pipe: Pipeline, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens a second of both, round by round, after one to get warm; all is compiled by then."""
    rates: dict[str, list[float]] = {PIPELINE: [], SERVER: []}
    for round_ in tqdm(range(args.rounds + 1), desc="rounds"):
        for name in rates:
            start = time.perf_counter()
            if name == PIPELINE:
                tokens = run_pipeline(pipe, prompts, args)
                seconds = time.perf_counter() - start
            else:
                bodies = asyncio.run(run_server(url, prompts, args))
                seconds = time.perf_counter() - start
                tokens = sum(map(count_texts, bodies))
            assert tokens == args.batch * args.new, f"{name} left tokens out: {tokens}"
            if round_:
                rates[name].append(tokens / seconds)
    return rates


def run_pipeline(pipe: Pipeline, prompts: list[list[int]], args: argparse.Namespace) -> int:
    """All replies at once; their tokens."""
    config = GenerationConfig(max_new_tokens=args.new, ignore_eos=True, temperature=0.0)
    pieces = pipe.stream_infer([{"prompt_token_ids": ids} for ids in prompts], config)
    return sum(len(piece.token_ids) for piece in pieces)


async def run_server(url: str, prompts: list[list[int]], args: argparse.Namespace) -> list[bytes]:
    """All replies at once, each a stream; the bodies. They are looked at later: the client is not what is measured."""
    host, port = url.removeprefix("http://").split(":")
    asked = {"max_tokens": args.new, "ignore_eos": True, "temperature": 0, "stream": True}

    async def one(ids: list[int]) -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"prompt": ids, **asked})
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        )
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = await reader.read()
        writer.close()
        return answer

    return await asyncio.gather(*map(one, prompts))


def count_texts(body: bytes) -> int:
    """Events with text in them."""
    events = [line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith(b"data: {")]
    return sum(bool(json.loads(event)["choices"][0]["text"]) for event in events)


if __name__ == "__main__":
    main()
