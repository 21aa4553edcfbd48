"""Rules about the source itself: its imports, its sizes, and words that belong in one place only."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "jaxdeploy.engine"
MAX_PARAMETERS = 7
MAX_LINES = 400
MAX_ENGINE_LEVELS = 8

TRACED = (
    "jaxdeploy/models",
    "jaxdeploy/parallel/sharding.py",
    "jaxdeploy/compress/forward.py",
    "jaxdeploy/engine/device/step.py",
    "jaxdeploy/engine/device/step_weights.py",
    "jaxdeploy/engine/device/prompt_rows.py",
    "jaxdeploy/engine/device/sampler.py",
)
"""Files with code that runs while a step is traced."""

MUTATORS = frozenset({"add", "append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"})
"""Methods that change a list, a set or a dictionary."""

BUILD_TIME = {"jaxdeploy/models/fused_decode.py: refusal_of_call"}
"""Functions beside traced code that may catch: this one evaluates a step abstractly when the engine is built."""

SIGNATURES_OF_OTHERS = {
    "jaxdeploy/checkpoint/pickle_reader.py: _rebuild_tensor_v3": "the arguments in torch's files",
    "jaxdeploy/__init__.py: serve": "LMDeploy's signature",
    "jaxdeploy/api/loading.py: pipeline": "LMDeploy's signature",
}
"""Functions that may have more parameters, and why."""


@functools.cache
def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def sources(*tops: str) -> Iterator[tuple[str, Path]]:
    """The Python files of folders, or single files: path from the root, and the file."""
    for top in tops:
        start = ROOT / top
        assert start.exists(), f"{top} has moved"
        for file in [start] if start.suffix else sorted(start.rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), file


def lines_with(pattern: str, *tops: str) -> set[str]:
    """The files in which a line matches ``pattern``."""
    return {name for name, file in sources(*tops) if re.search(pattern, text_of(file))}


@functools.cache
def imports() -> Mapping[str, frozenset[str]]:
    """Module → the modules of this repository that it imports, in functions and for type checkers too."""
    graph = grimp.build_graph("jaxdeploy", "pallas_kernels", "tests", cache_dir=None)
    found = {module: frozenset(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    return found | script_imports()


def script_imports() -> dict[str, frozenset[str]]:
    """The same for ``scripts``, whose modules are imported without a package."""
    modules = {name.removesuffix(".py").replace("/", "."): file for name, file in sources("scripts")}
    return {
        module: frozenset(f"scripts.{name}" for name in _imported(file) if f"scripts.{name}" in modules)
        for module, file in modules.items()
    }


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(text_of(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def cycle_of(graph: Mapping[str, frozenset[str]]) -> list[str]:
    """The modules of one cycle, or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def engine_levels() -> dict[str, int]:
    """Module of the engine → 1 more than the highest level among the engine's modules that it imports."""
    modules = {module for module in imports() if module.startswith(f"{ENGINE}.")}
    inside = {module: imports()[module] & modules for module in modules}
    levels: dict[str, int] = {}
    for module in TopologicalSorter(inside).static_order():
        levels[module] = 1 + max((levels[name] for name in inside[module]), default=0)
    return levels


def nodes(*tops: str) -> Iterator[tuple[str, ast.AST]]:
    """Every syntax node of the Python files of ``tops``, with the path of its file."""
    for name, file in sources(*tops):
        for node in ast.walk(ast.parse(text_of(file))):
            yield name, node


def functions(*tops: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the Python files of ``tops``, with the path of its file."""
    for name, node in nodes(*tops):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node


def asks_type_of_context(node: ast.AST) -> bool:
    """Whether a node is ``isinstance(context, ...)``, ``type(context)`` or ``match context``, under any name of one."""
    if isinstance(node, ast.Match):
        subject = node.subject
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type"):
        subject = node.args[0]
    else:
        return False
    return "context" in ast.unparse(subject).lower()


def filled_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The places where a function changes the content of one of its parameters, other than ``self``."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    known = {argument.arg for argument in (*named, arguments.vararg, arguments.kwarg) if argument} - {"self", "cls"}
    for node in ast.walk(function):
        target: ast.AST | None = None
        if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            target = node.value
        elif isinstance(node, ast.AugAssign):
            target = node.target
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            target = node.func.value
        if isinstance(target, ast.Name) and target.id in known:
            yield f"{function.name}: {ast.unparse(node)}"


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of parameters, keyword-only ones too, without ``self`` and ``cls``."""
    arguments = function.args
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    bound = named[:1] in (["self"], ["cls"])
    return len(named) - bound + len(arguments.kwonlyargs) + bool(arguments.vararg) + bool(arguments.kwarg)


def wide_functions(*tops: str) -> set[str]:
    """``file: function`` for every function with more than ``MAX_PARAMETERS``."""
    return {
        f"{name}: {function.name}" for name, function in functions(*tops) if parameters_of(function) > MAX_PARAMETERS
    }


def long_files(*tops: str) -> set[str]:
    """The files with more than ``MAX_LINES`` lines."""
    return {name for name, file in sources(*tops) if text_of(file).count("\n") > MAX_LINES}


def test_sizes_are_asked_of_a_named_axis() -> None:
    """A mesh may have other axes than ``tp``. ``per_device`` asks whether there is more than one device at all."""
    sized = lines_with(r"\bmesh(\.devices)?\.size\b|len\([\w.]*mesh\.|\bdevice_count\(", "jaxdeploy")
    assert sized == {"jaxdeploy/parallel/sharding.py", "jaxdeploy/compress/report_files.py"}
    assert not lines_with(r"\bmesh\.size\b", *sized)


def test_names_of_linear_maps_stay_in_models() -> None:
    """In code, strings and text files alike."""
    package = ROOT / "jaxdeploy"
    files = (file for file in package.rglob("*") if file.is_file() and file.suffix not in (".safetensors", ".pyc"))
    naming = {file.relative_to(package).as_posix() for file in files if re.search(r"[wb]qkv|gate_up", text_of(file))}
    assert {name for name in naming if not name.startswith("models/")} == set()
    assert "models/mlp.py" in naming


def test_the_engine_knows_no_cache_geometry() -> None:
    """Layouts describe pools. The engine and the checkpoint ask them."""
    assert lines_with("kv_pool|QuantizedPool|num_kv_heads", "jaxdeploy/engine", "jaxdeploy/checkpoint") == set()


def test_traced_code_does_not_log() -> None:
    assert lines_with(r"\b(logg(ing|er)|warnings|print)\b", *TRACED) == set()


def test_traced_code_does_not_branch_on_the_type_of_a_context() -> None:
    assert {name for name, node in nodes(*TRACED) if asks_type_of_context(node)} == set()


def test_traced_code_catches_nothing() -> None:
    catching = {
        f"{name}: {function.name}"
        for name, function in functions(*TRACED)
        if any(isinstance(node, ast.Try | ast.TryStar) for node in ast.walk(function))
    }
    assert catching == BUILD_TIME


def test_traced_code_fills_no_parameter() -> None:
    """Results are returned. A list or a dictionary of the caller is not filled on the way."""
    filled = {f"{name}: {fault}" for name, function in functions(*TRACED) for fault in filled_parameters(function)}
    assert filled == set()


@pytest.mark.parametrize(
    "line",
    [
        "noted['features'] = x",
        "noted[0] += x",
        "noted.append(x)",
        "noted.setdefault('features', []).append(x)",
        "noted.features = x",
        "noted |= {'features': x}",
        "del noted['features']",
        "for index, noted['features'] in x: pass",
    ],
)
def test_filled_parameters_are_found(line: str) -> None:
    for source in (f"def f(x, *, noted):\n {line}", f"def f(noted, x):\n {line}"):
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef)
        assert list(filled_parameters(function))
    (function,) = ast.parse("def f(x):\n noted = {}\n noted['x'] = x.at[0].add(1)").body
    assert isinstance(function, ast.FunctionDef)
    assert not list(filled_parameters(function))


def test_the_engine_names_no_model_class() -> None:
    assert lines_with(r"\bDecoder\b", "jaxdeploy/engine") == set()


def test_the_engine_has_few_levels() -> None:
    levels = engine_levels()
    assert levels[f"{ENGINE}.front.engine"] > 3
    assert {module: level for module, level in levels.items() if level > MAX_ENGINE_LEVELS} == {}


def test_imports_have_no_cycle() -> None:
    graph = imports()
    assert {"jaxdeploy.engine.front.engine", "tests.conftest", "scripts.demo.topics"} <= graph.keys()
    assert cycle_of(graph) == []


def test_every_module_has_a_layer() -> None:
    """A module in no layer of the import contract would be free to import anything."""
    contracts = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    named = {name.strip(" ()") for layer in layers for name in re.split("[:|]", layer)}
    modules = {module for module in imports() if module.startswith(("jaxdeploy", "pallas_kernels"))}
    free = {module for module in modules if not any(f"{module}.".startswith(f"{name}.") for name in named)}
    assert free == {"jaxdeploy", "jaxdeploy.__main__", "jaxdeploy.api", "jaxdeploy.chat"}


def test_cycles_are_found() -> None:
    assert cycle_of({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a")})


def test_functions_have_few_parameters() -> None:
    assert wide_functions("jaxdeploy", "scripts", "benchmarks") == set(SIGNATURES_OF_OTHERS)


def test_files_are_short() -> None:
    assert long_files("jaxdeploy", "pallas_kernels", "scripts") == set()
