"""Fixtures of all tests, and the environment they run in."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quick
from hypothesis import settings
from inputs import Inputs

from megatron_npd.distributed.parallel import Parallel
from megatron_npd.hardware import device

pytest.register_assert_rewrite("finished_run", "megatron_runs", "npd_runs")  # they assert on behalf of tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["NPD_CACHE"] = tempfile.mkdtemp(prefix="npd_cache_")  # nothing a user has, and no run before, is seen
atexit.register(shutil.rmtree, os.environ["NPD_CACHE"], ignore_errors=True)
device.settle()  # before any test asks torch for a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread costs more than it does
# Whoever started the tests in the background had SIGINT ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says nothing on a machine that others use too.
settings.register_profile("npd", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=20)
settings.load_profile("npd")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="what needs neither torch nor transformers (`quick.py`)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        settings.load_profile("quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = not config.getoption("--quick") or collection_path.suffix != ".py" or quick.is_quick_file(collection_path)
    return None if wanted else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        chosen = [item for item in items if quick.is_quick(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(autouse=True)
def stays_quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --quick, a test that imports torch must say so by the marker `heavy`."""
    before = quick.imported_heavily()
    yield
    if request.config.getoption("--quick"):
        assert quick.imported_heavily() == before, (
            f"{request.node.name} imports {quick.imported_heavily()}: mark it heavy"
        )


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    """Megatron's groups, of this process alone."""
    from megatron_npd.mcore.model_parallel import initialize, shutdown

    yield initialize()
    shutdown()


@pytest.fixture(scope="session")
def engines_live_on() -> Iterator[None]:
    """Keep every vLLM engine of this process: deleting one tears down what vLLM shares between them."""
    from megatron_npd.vllm_engine.engine import RolloutEngine

    engines, make = [], RolloutEngine.__init__

    def keep_and_make(self: RolloutEngine, *arguments: Any) -> None:
        engines.append(self)
        make(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutEngine, "__init__", keep_and_make)
        yield
        patch.setattr(gc, "collect", lambda *_: 0)  # vLLM collects three times for each engine: half a minute
        if engines:
            from vllm.v1.engine import core

            # For good, as finalizers call it too: other tests of this process have left torch.distributed since.
            core.cleanup_dist_env_and_memory = lambda: None
        for engine in engines:
            if hasattr(engine, "_llm"):  # not where its start was refused
                engine._llm.engine_core.shutdown()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher` and `student`, made once; tests copy it."""
    from tiny_models import make_llama
    from tiny_tokenizer import make_tokenizer

    root = tmp_path_factory.mktemp("checkpoints")
    for seed, (name, layers) in enumerate({"teacher": 2, "student": 1}.items()):
        make_llama(root / name, seed, num_hidden_layers=layers)
        make_tokenizer(root / name)
    return root


@pytest.fixture
def inputs(checkpoints: Path, tmp_path: Path) -> Inputs:
    """Good inputs in a folder of their own."""
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    return Inputs(tmp_path)
