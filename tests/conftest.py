"""Fixtures for all tests: seeds, poisoned memory, the device that kernels run on.

Without a GPU the kernels run in Triton's interpreter on CPU tensors. It must be switched on before
Triton is imported, hence at the top of this file.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch
from poison import poison_memory

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# On CI a change is judged by the same examples each time; elsewhere new ones are searched for.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a GPU where there is none: not run, so not counted either.

    Of two workers each begins with one half of the rest. What takes minutes is spread over both,
    and comes first.
    """
    left_out = [] if HAS_GPU else [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    left = [item for item in items if item not in left_out]
    long = [item for item in left if item.name.startswith("test_kernels_compile_and_fit")]
    short = [item for item in left if item not in long]
    half = len(short) // 2
    items[:] = long[::2] + short[:half] + long[1::2] + short[half:]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile allows a function so many graphs, and many tests compile the same model."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def launched_kernels(request: pytest.FixtureRequest, record_property):
    """Note which kernels a GPU test launched; `make test-gpu` puts them into its record."""
    if not HAS_GPU or not request.node.get_closest_marker("gpu"):
        yield
        return
    from triton import knobs

    names = set()
    hook = lambda metadata: names.add(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    yield
    knobs.runtime.launch_enter_hook.remove(hook)
    torch.cuda.empty_cache()  # other test processes share the GPU
    record_property("kernels", sorted(names))


@pytest.fixture
def device() -> str:
    """Where kernels run: a GPU, or the CPU under Triton's interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def forbid_waiting() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Makes a context in which whatever waits for the GPU raises."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
    """Tests change what plans depend on and no key says, such as functions of modules."""
    from entropy_attn.kernels.plans import forget_plans

    forget_plans()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch.setattr)
