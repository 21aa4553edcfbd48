"""What every test shares: eight fake CPU devices, strict dtypes, the folder beside the checkout, a watch on skips."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

# Read by JAX when it is imported, or at the latest when it opens its first device: so before anything else here.
XLA_FLAGS: dict[str, object] = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_backend_optimization_level": 0,  # the suite spends its time compiling, not computing
}
if version("jaxlib").startswith("0.10."):  # compiles faster; later ones have no such flag
    XLA_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
COMPILATION_CACHE = Path.home() / ".cache/jaxdeploy/test-xla"
for _flag, _value in XLA_FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILATION_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402

if TYPE_CHECKING:
    from jaxdeploy.engine.front.async_engine import AsyncEngine
    from tests.served import RunningServer

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MAPPINGS = Path("/proc/self/maps")
MAX_MAPPINGS = 10_000
"""Linux allows 65,530; the programs of one file take fewer than the rest."""
ALLOWED_SKIPS = ("needs ../shared", "needs torch", "needs a GPU", "needs Chromium", "the backend refuses")


def pytest_configure(config: pytest.Config) -> None:
    """Make JAX refuse to mix dtypes silently, in every thread, and watch what is skipped."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    config.pluginmanager.register(SkipAccount())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying what is missing."""
    missing = {}
    if find_spec("torch") is None:
        missing["parity"] = pytest.mark.skip(reason="needs torch")
    if "cuda" not in os.environ["JAX_PLATFORMS"]:
        missing["gpu"] = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        for name, skip in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip a call that a kernel backend refuses, unless the backend must take every call."""
    from pallas_kernels.dispatch import NoBackendError
    from tests.selection import COMPLETE_BACKENDS

    try:
        return (yield)
    except NoBackendError as refusal:
        callspec = getattr(item, "callspec", None)
        if callspec is None or callspec.params.get("backend", "reference") in COMPLETE_BACKENDS:
            raise
        pytest.skip(f"the backend refuses: {refusal}")


@pytest.fixture
def shared() -> Path:
    """The folder of real inputs beside the checkout."""
    if not (SHARED / "assets").is_dir():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    """The bundled model, for a whole file of tests."""
    from tests.served import demo_engine

    made = demo_engine()
    yield made
    made.close()


@pytest.fixture(scope="module")
def _one_server(engine: AsyncEngine) -> Iterator[RunningServer]:
    from tests.served import running

    with running(engine) as made:
        yield made


@pytest.fixture
def server(_one_server: RunningServer) -> Iterator[RunningServer]:
    """A server over it, in which no test leaves anything behind."""
    from tests.served import until

    yield _one_server
    assert until(_one_server.idle), "a test left something behind"


@pytest.fixture(autouse=True)
def _dtype_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lift strict promotion for tests that drive third-party code."""
    mode = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
    with jax.numpy_dtype_promotion(mode):
        yield


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs() -> Iterator[None]:
    """Let go of compiled programs before they fill the process's table of memory mappings: then LLVM crashes."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()


class SkipAccount:
    """Fails the run when a test was skipped for a reason that is not on the list: none may fall silent unnoticed."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Look at a test, or its set-up; an expected failure counts as no skip."""
        if not hasattr(report, "wasxfail"):
            self._account(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Look at a whole file."""
        self._account(report)

    def _account(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not reason.startswith(ALLOWED_SKIPS):
                self.notes.append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Set the exit status."""
        if self.notes:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the offenders."""
        for note in self.notes:
            terminalreporter.write_line(f"skip reason not among {ALLOWED_SKIPS}: {note}", red=True)
