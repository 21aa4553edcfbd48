"""What the kernels shall reach on an H200, as ratios of figures from one run of ``bench_kernels.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Row = Mapping[str, Any]
"""One measurement of ``bench_kernels.py``, or of the torch peers: a line of its JSON."""

_Op = TypeVar("_Op")

CUBLAS = "jnp.dot bf16"
"""The peer of every matrix product, timed beside it: cuBLAS on a GPU."""

LINEARS = ((4096, 14336), (14336, 4096))
"""K and N whose W4A16 products have goals."""

DECODE_ROWS = (1, 2, 4, 8, 16)
PREFILL_ROWS = 4096
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}
DECODE_ATTENTION = {**HEADS, "sequences": 64, "queries": 1, "contexts": [4095]}
PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Goal:
    """``value`` shall be at least ``bar``; it is ``None`` where something for it was not measured."""

    name: str
    bar: float
    value: float | None

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.value is None:
            return "not measured"
        return "held" if self.value >= self.bar else "missed"


def wanted(op: str, fields: Mapping[str, Any]) -> bool:
    """Whether a goal needs this shape."""
    if op == "w4a16_matmul":
        return (fields["k"], fields["n"]) in LINEARS and fields["m"] in (*DECODE_ROWS, PREFILL_ROWS)
    if op == "paged_attention":
        return _fits(fields, DECODE_ATTENTION) or _is_prefill(fields)
    return False


def in_turn(shapes: Mapping[_Op, Sequence[Any]]) -> list[tuple[_Op, Any]]:
    """Every op with each of its shapes: those that goals need, then the first of each op, the second of each, and on.

    A run that stops early has the most important, and something of everything.
    """
    ranked = [
        ((not wanted(str(op), asdict(shape)), index), op, shape)
        for op, found in shapes.items()
        for index, shape in enumerate(found)
    ]
    return [(op, shape) for _, op, shape in sorted(ranked, key=lambda entry: entry[0])]


def goals(rows: Sequence[Row], peers: Sequence[Row]) -> list[Goal]:
    """Every goal, with its value where ``rows`` (ours) and ``peers`` (torch's) have what it needs."""
    return [*_matmul_goals(rows, peers), *_attention_goals(rows, peers)]


def torch_name(k: int, n: int) -> str:
    """What the torch peers call the linear of these sizes."""
    return f"K{k}N{n}"


def _matmul_goals(rows: Sequence[Row], peers: Sequence[Row]) -> Iterator[Goal]:
    for k, n in LINEARS:
        for m in (*DECODE_ROWS, PREFILL_ROWS):
            mine, cublas = (
                _find(rows, "w4a16_matmul", backend, {"m": m, "k": k, "n": n}) for backend in (None, CUBLAS)
            )
            name = f"w4a16_matmul M={m} K={k} N={n}"
            if m == PREFILL_ROWS:
                yield Goal(f"{name} vs {CUBLAS}", 0.85, _speedup(mine, _seconds(cublas)))
                continue
            torch = _torch_seconds(peers, "linear_int4_tinygemm", f"{torch_name(k, n)} M={m} K={k} N={n}")
            yield Goal(f"{name} share of copy bandwidth", 0.75, _copy_share(mine))
            yield Goal(f"{name} vs {CUBLAS}", 3.2, _speedup(mine, _seconds(cublas)))
            yield Goal(f"{name} vs torch int4", 1.0, _speedup(mine, torch))


def _attention_goals(rows: Sequence[Row], peers: Sequence[Row]) -> Iterator[Goal]:
    plain, int8 = (
        _find(rows, "paged_attention", None, {**DECODE_ATTENTION, "kv": kv, "block_size": 64})
        for kv in ("bf16", "int8")
    )
    name = "paged_attention batch 64 context 4096"
    yield Goal(f"{name} bf16 share of copy bandwidth", 0.8, _copy_share(plain))
    yield Goal(f"{name} int8 vs bf16", 1.7, _speedup(int8, _seconds(plain)))
    prefill = [row for row in rows if row["op"] == "paged_attention" and _is_prefill(row["fields"])]
    mine = min((row for row in prefill if "us" in row), key=lambda row: row["us"]["p50"], default=None)
    torch = _torch_seconds(peers, "prefill_sdpa_flash", f"S={PREFILL_TOKENS} heads=32/8 d=128")
    yield Goal(f"paged_attention prefill {PREFILL_TOKENS} tokens vs torch flash SDPA", 0.8, _speedup(mine, torch))


def _is_prefill(fields: Mapping[str, Any]) -> bool:
    """One sequence of ``PREFILL_TOKENS`` from its beginning on, in rows of any length."""
    first = {**HEADS, "sequences": 1, "contexts": [0], "kv": "bf16"}
    return _fits(fields, first) and fields["rows"] * fields["queries"] == PREFILL_TOKENS


def _fits(fields: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(_listed(fields[name]) == value for name, value in wanted.items())


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _find(rows: Sequence[Row], op: str, backend: str | None, fields: Mapping[str, Any]) -> Row | None:
    """The first timed row of ``op`` with these fields; without a backend, the one of ours that the op prefers."""
    for row in rows:
        ours = row["backend"] != CUBLAS if backend is None else row["backend"] == backend
        if row["op"] == op and ours and "us" in row and _fits(row["fields"], fields):
            return row
    return None


def _seconds(row: Row | None) -> float | None:
    return row["us"]["p50"] * 1e-6 if row else None


def _copy_share(row: Row | None) -> float | None:
    return row["copy_share"] if row else None


def _torch_seconds(peers: Sequence[Row], name: str, shape: str) -> float | None:
    for row in peers:
        if row["name"] == name and re.fullmatch(re.escape(shape), row["shape"]) and row["ms_median"]:
            return float(row["ms_median"]) * 1e-3
    return None


def _speedup(mine: Row | None, theirs: float | None) -> float | None:
    seconds = _seconds(mine)
    return None if seconds is None or theirs is None else theirs / seconds
