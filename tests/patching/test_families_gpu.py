"""Every family on a GPU, where the Triton kernels compute: nothing falls back, and everything in full is dense.

`PSA_TEST_DEVICE=cuda python dev.py test tests/patching/test_families_gpu.py`.
"""

import os

import pytest
import torch

from comfyui_psa.patching.patch import KEY, patch_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and os.environ.get("PSA_TEST_DEVICE") != "cuda",
        reason="needs PSA_TEST_DEVICE=cuda, which has ComfyUI sample on the GPU",
    ),
]

PATCH = {"preset": "auto", "mode": "topk", "min_tokens": 0, "start_percent": 0.0, "end_percent": 1.0}
KINDS = [
    "hunyuan", "hunyuan 1.5", "ltx 0.9", "ltx 13b", "ltx 2", "kandinsky 5 lite", "kandinsky 5 pro", "cosmos", "mochi",
    "minimax h3",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_on_a_gpu(kind, tiny_families):
    model = tiny_families.load(kind, torch.bfloat16)
    stock = tiny_families.sample(model, kind).float()
    full = patch_model(model, sparsity=0.01, pyramid="1: 1.0", **PATCH)
    assert (tiny_families.sample(full, kind).float() - stock).norm() / stock.norm() < 2e-2
    sparse = patch_model(model, sparsity=0.6, **PATCH)
    assert torch.isfinite(tiny_families.sample(sparse, kind)).all()
    report = sparse.get_attachment(KEY).report
    assert report["fallbacks"] == report["notes"] == []
    assert report["backend"] == "triton"
    assert report["steps"][0]["sparse_calls"] >= 2
