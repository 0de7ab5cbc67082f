"""The fused form by the interpreter of triton on the CPU, in a process of its own: the interpreter is chosen at import."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from contralto.errors import UsageError
from contralto.losses.contrast import contrast

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def worst():
    """Largest error of a kind, relative to the largest number of the result."""
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("fused_cases.py")], capture_output=True, text=True, timeout=600,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


@needs_triton
@pytest.mark.parametrize(
    ("kind", "most"),
    [("torch.float32", 2e-5), ("torch.bfloat16", 3e-2), ("torch.float16", 2e-3), ("no positives", 2e-5), ("extreme", 1e-4),
     ("nothing left", 2e-5)],
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_dense_form_in_double_precision(worst, kind, most):
    assert worst[kind] < most


@needs_triton
def test_a_second_derivative_is_refused(worst):
    assert "dense" in worst["second derivative"]


@pytest.mark.parametrize(
    "wrong",
    [{"coupled": True}, {"weights": torch.ones(4)}, {"positives": torch.eye(4)}, {"temperature": torch.ones(4, 4)}],
)
def test_what_it_does_not_take_is_said(wrong):
    q = torch.randn(4, 3)
    with pytest.raises(UsageError, match="fused"):
        contrast(q, q, **{"positives": torch.arange(4), "form": "fused"} | wrong)


def test_where_it_does_not_work_is_said_once(monkeypatch):
    module = sys.modules["contralto.losses.contrast"]
    module._fused.cache_clear()

    def broken(*_args, **_options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "eye", broken)
    with pytest.warns(
        UserWarning, match="tiled one is taken: no compiler" if importlib.util.find_spec("triton") else "tiled"
    ):
        assert not module._fused()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not module._fused()
    module._fused.cache_clear()


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs it")
def test_without_cuda_it_is_refused_when_asked_for():
    with pytest.raises(UsageError, match="CUDA"):
        contrast(torch.randn(4, 3), torch.randn(4, 3), positives=torch.arange(4), form="fused")
