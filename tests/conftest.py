"""Fixtures that several test files use. Functions and constants that they share are in `helpers/`."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partialmethod
from typing import Any

# set before torch is imported: test workers that each use every core wait for each other and take four times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the tests need no hub; without a network, the client would repeat each request for a minute or more
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from helpers.models import CONFIGS, build
from helpers.raw_hooks import n_hooks
from helpers.tape import use_tapes
from helpers.tasks import write_tasks
from lm_eval.models.huggingface import HFLM
from torch.utils import collect_env
from transformers import AutoTokenizer

from AutomaticEval.models.checkpoint.loaded_model import LoadedModel
from AutomaticEval.models.checkpoint.model_sources import DEMO_FOLDER

# pytest then shows the values of a failed assertion in these files, as it does in test files
pytest.register_assert_rewrite(*(f"helpers.{name}" for name in ("samples", "plain_lm_eval", "runs", "mutants")))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-families", action="store_true", help="write docs/families.md as tests/test_families.py finds it"
    )


def pytest_collection_finish() -> None:
    """What is imported stays: no garbage collection need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_FOLDER)


@pytest.fixture(scope="session", params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tiny(family: str, tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS[family]()), tokenizer, family)


@pytest.fixture(scope="session")
def tiny_llama(tokenizer: Any) -> LoadedModel:
    return LoadedModel(build(CONFIGS["llama"]()), tokenizer, "llama")


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    from AutomaticEval.models.loading import load_model

    return load_model("demo")


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of tasks, one of every type of request."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def environment_is_described_once() -> Iterator[None]:
    """lm-eval asks pip for the packages after every evaluation, which takes longer than most of ours."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(collect_env, "get_env_info", cache(collect_env.get_env_info))
        yield


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """batch_size="auto" tries batches of 8 whole contexts, not of 64, in lm-eval's model and in ours."""
    monkeypatch.setattr(HFLM, "__init__", partialmethod(HFLM.__init__, max_batch_size=8))


@pytest.fixture(autouse=True)
def no_hook_stays_on_a_shared_model(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that leaves a hook on a shared model, so that no later test fails in its place."""
    yield
    for name, value in (getattr(request.node, "funcargs", None) or {}).items():
        if isinstance(value, LoadedModel):
            assert not n_hooks(value.model), f"{n_hooks(value.model)} hooks stay on {name}"


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device has graphs, which are tapes; none is kept from before, nor for later."""
    from AutomaticEval.capture.graph import kept_steps

    use_tapes(monkeypatch)
    kept_steps.drop_all()
    yield
    kept_steps.drop_all()


@pytest.fixture
def same_hooks_after() -> Iterator[Callable[[Any], None]]:
    """Gives watch(model). The test fails if the model's number of hooks differs after the test."""
    watched: list[tuple[Any, int]] = []
    yield lambda model: watched.append((model, n_hooks(model)))
    for model, before in watched:
        assert n_hooks(model) == before


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
