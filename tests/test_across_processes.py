"""Across processes: what is shared, what cannot be, and what a worker's error says where it arrives."""

import concurrent.futures
import copy
import inspect
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest

from sparse_engine import SparseEngine, errors
from sparse_engine.errors import NonFiniteError, SparseEngineError, UnsupportedError
from sparse_engine.tactics import cache_folder


def test_the_cache_is_where_the_user_means_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("SPARSE_ENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "sparse-engine"
    monkeypatch.setenv("XDG_CACHE_HOME", "/absolute")
    assert cache_folder() == Path("/absolute/sparse-engine")


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_engine_is_not_copied(engine: SparseEngine, copied: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be copied or sent to another process.*\n.*pass the path"):
        copied(engine)


@pytest.mark.parametrize(
    "kind", [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SparseEngineError)]
)
def test_an_error_survives_the_way_to_another_process(kind: Any) -> None:
    error = kind("what", "fix", (3, 4), 7) if kind is NonFiniteError else kind("what", "fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), vars(again)) == (str(error), vars(error))


def fail(number: int) -> None:
    raise NonFiniteError("what", "fix", (number,), 2)


def test_a_workers_error_reaches_its_parent() -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        error = pool.submit(fail, 5).exception(timeout=60)
    assert isinstance(error, NonFiniteError)
    assert (error.what, error.fix, error.images, error.step) == ("what", "fix", (5,), 2)
