"""Every family on a GPU, where the Triton kernels compute: nothing falls back, and everything in full is dense.

`PSA_TEST_DEVICE=cuda python dev.py test tests/patching/test_families_gpu.py`.
"""

import pytest
import torch

from comfyui_psa.patching.patch import patch_model

from .patched import FULL, PATCH, distance, report, reports_nothing, sparse_calls

pytestmark = pytest.mark.gpu(comfyui=True)

KINDS = [
    "hunyuan", "hunyuan 1.5", "ltx 0.9", "ltx 13b", "ltx 2", "kandinsky 5 lite", "kandinsky 5 pro", "cosmos", "mochi",
    "minimax h3",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_on_a_gpu(kind, tiny_families):
    model = tiny_families.load(kind, torch.bfloat16)
    stock, full = tiny_families.sample(model, kind), patch_model(model, **FULL)
    assert distance(tiny_families.sample(full, kind), stock) < 2e-2
    sparse = patch_model(model, **PATCH | {"start_percent": 0.0})
    assert torch.isfinite(tiny_families.sample(sparse, kind)).all()
    assert reports_nothing(sparse)
    assert report(sparse)["backend"] == "triton"
    assert sparse_calls(sparse)[0] >= 2
