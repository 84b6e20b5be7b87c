"""A kernel that computes nonsense on a user's machine never reaches a picture in diffusers.

The kernels run in Triton's interpreter; tests/kernels/test_interpreter.py starts this file there.
"""

import os

import pytest
import torch

from comfyui_psa.for_diffusers import apply_psa

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")

SIZE = (1, 16, 2, 32, 16)  # 256 tokens, two query blocks


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A machine with an empty cache on which attention goes wrong: the list of its calls."""
    backend = pytest.importorskip("comfyui_psa.kernels.gpu.backend")
    self_check = pytest.importorskip("comfyui_psa.kernels.gpu.self_check")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    self_check.trust.cache_clear()
    genuine, calls = backend.attend_triton, []

    def attend_triton(q, *arguments, **more):
        calls.append(1)
        genuine(q, *arguments, **more)
        arguments[-1].mul_(1.2)

    monkeypatch.setattr(backend, "attend_triton", attend_triton)
    yield calls
    self_check.trust.cache_clear()


@pytest.mark.parametrize("correction", ["auto", "off"])
def test_a_broken_kernel_leaves_the_picture_of_dense_attention(pipes, broken, caplog, correction):
    pipe = pipes.pipeline(pipes.wan())
    stock = pipes.run(pipe, 3, SIZE)
    settings = {"sparsity": 0.6, "mode": "topk", "min_tokens": 0, "warm_up": 1, "correction": correction}
    applied = apply_psa(pipe, **settings, backend="triton")
    for _ in range(2):
        assert torch.equal(pipes.run(pipe, 3, SIZE), stock)
    assert len(broken) == 1, "no call after the one that was wrong"
    assert applied.sparse_calls == 0
    ((reason, count),) = applied.fallbacks.items()
    assert "the kernels compute wrong results on" in reason
    assert count == 2 * 4
    assert [record.getMessage() for record in caplog.records if "wrong results" in record.getMessage()] == [
        f"PSA: staying dense: {reason}"
    ]
