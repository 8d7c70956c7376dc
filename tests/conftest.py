"""Fixtures that several test files use. What they import from each other's place is in `helpers/`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

# set before torch is imported: workers whose threads wait for each other's cores take four times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the tests need no hub; without a network, each request to it would be repeated for a minute and more
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from helpers.models import CONFIGS, build
from helpers.raw_hooks import n_hooks
from helpers.tasks import write_tasks
from transformers import AutoTokenizer

from AutomaticEval.models.loading import DEMO_FOLDER, LoadedModel

# a failed assertion there shows its values, as one in a test file does
pytest.register_assert_rewrite(*(f"helpers.{name}" for name in ("samples", "plain_lm_eval", "runs", "mutants")))


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


@pytest.fixture(autouse=True)
def no_hook_stays_on_a_shared_model(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that leaves a hook on a model that other tests share fails itself, not they."""
    yield
    for name, value in (getattr(request.node, "funcargs", None) or {}).items():
        if isinstance(value, LoadedModel):
            assert not n_hooks(value.model), f"{n_hooks(value.model)} hooks stay on {name}"


@pytest.fixture
def same_hooks_after() -> Iterator[Callable[[Any], None]]:
    """watch(model): the test fails when it leaves more or fewer hooks than it found."""
    watched: list[tuple[Any, int]] = []
    yield lambda model: watched.append((model, n_hooks(model)))
    for model, before in watched:
        assert n_hooks(model) == before
