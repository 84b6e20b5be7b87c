"""A kernel that computes nonsense on a user's machine never reaches a picture in ComfyUI.

The kernels run in Triton's interpreter; tests/kernels/test_interpreter.py starts this file there.
"""

import dataclasses
import os

import pytest
import torch

from comfyui_psa.patching.patch import patch_model

from .patched import PATCH, report, sparse_calls

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")

SIZE = (1, 16, 2, 32, 16)  # 256 tokens, two query blocks
WRONG = "the kernels compute wrong results on"


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """broken(part): a machine with an empty cache on which this part of the kernels goes wrong; returns its calls."""
    backend = pytest.importorskip("comfyui_psa.kernels.gpu.backend")
    self_check = pytest.importorskip("comfyui_psa.kernels.gpu.self_check")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    self_check.trust.cache_clear()
    calls = []

    def break_it(part):
        def attend_triton(q, *arguments, delta=None, **more):
            calls.append("attention")
            attend(q, *arguments, delta=ten_thousandfold(delta), **more)
            if part == "attention":
                arguments[-1].mul_(1.2)

        def reduced_softmax_triton(*arguments):
            calls.append("ranking")
            scores = reduce(*arguments)
            return 1 - scores if part == "ranking" else scores

        def undo_order_triton(x, order, out, delta=None):
            undo(x, order, out, ten_thousandfold(delta))

        def ten_thousandfold(delta):
            if part != "correction" or delta is None:
                return delta
            calls.append("correction")
            return dataclasses.replace(delta, scales=1e4 * delta.scales)

        attend, undo, reduce = backend.attend_triton, backend.undo_order_triton, backend.reduced_softmax_triton
        monkeypatch.setattr(backend, "reduced_softmax_triton", reduced_softmax_triton)
        monkeypatch.setattr(backend, "attend_triton", attend_triton)
        monkeypatch.setattr(backend, "undo_order_triton", undo_order_triton)
        return calls

    yield break_it
    self_check.trust.cache_clear()


def told(caplog):
    return [record.getMessage() for record in caplog.records if WRONG in record.getMessage()]


@pytest.mark.parametrize(("part", "correction"), [("attention", "auto"), ("attention", "off"), ("ranking", "off")])
def test_a_broken_kernel_leaves_the_picture_of_dense_attention(tiny_wan, broken, caplog, part, correction):
    model = tiny_wan.load("t2v")
    stock = tiny_wan.sample(model, steps=4, size=SIZE)
    psa = patch_model(model, **PATCH, correction=correction, backend="triton")
    calls = broken(part)
    assert torch.equal(tiny_wan.sample(psa, steps=4, size=SIZE), stock)
    (line,) = told(caplog)
    assert line.startswith("PSA: staying dense: ")
    assert "update the GPU's driver and Triton or delete the files comfyui_psa_check.json in Triton's cache" in line
    assert calls.count(part) == 1, "no call after the one that was wrong"
    assert sparse_calls(psa) == [0, 0, 0, 0]
    assert [entry["calls"] for entry in report(psa)["fallbacks"]] == [6]
    assert torch.equal(tiny_wan.sample(psa, steps=4, size=SIZE), stock)
    assert calls.count(part) == 1


def test_a_broken_correction_is_left_out_and_the_rest_is_sparse(tiny_wan, broken, caplog):
    model = tiny_wan.load("t2v")
    psa = patch_model(model, **PATCH, backend="triton")
    calls = broken("correction")
    assert torch.isfinite(tiny_wan.sample(psa, steps=3, size=SIZE)).all()
    (line,) = told(caplog)
    assert line.startswith("PSA: no correction from here on: ")
    assert calls.count("correction") == 1, "tried once"
    assert sparse_calls(psa) == [0, 2, 2]
    assert report(psa)["correction"]["corrected_calls"] == 0
    assert report(psa)["fallbacks"] == []
