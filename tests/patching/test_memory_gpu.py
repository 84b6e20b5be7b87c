"""The most memory that a run takes on a GPU, with PSA and without: one block of Wan 14B at 1280x720, 81 frames.

ComfyUI takes one device for a whole process, and -s shows the figures:
`PSA_TEST_DEVICE=cuda python dev.py test -s tests/patching/test_memory_gpu.py`.
"""

import pytest
import torch

from comfyui_psa.patching.patch import patch_model

from .patched import report, sparse_calls

pytestmark = pytest.mark.gpu(comfyui=True)
SIZE = (1, 16, 21, 90, 160)  # 75,600 tokens
WAN_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 1}
SMALL = 32 * 2**20
"""Bytes for what depends on neither heads nor layers: token orders and the figures of the run."""


def most_memory(tiny_wan, model):
    """Bytes that a run of three steps takes at most, besides what was there before."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tiny_wan.sample(model, steps=3, size=SIZE)
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def model(request, tiny_wan):
    model = tiny_wan.load("t2v", request.param, 0.02, **WAN_14B)
    # Loads the weights; the dense attention of a process's first run also differs from all others, and what it takes.
    tiny_wan.sample(model, steps=3, size=SIZE)
    return model


@pytest.mark.parametrize("settings", [{}, {"order": "raster"}, {"reuse_steps": 2}], ids=["default", "raster", "kept"])
def test_psa_takes_no_more_memory_than_its_correction_says(tiny_wan, model, settings):
    without = most_memory(tiny_wan, model)
    for correction in ("off", "auto"):
        inputs = {"sparsity": 0.85, "preset": "auto", "start_percent": 0.25, "end_percent": 1.0, **settings}
        psa = patch_model(model, **inputs, correction=correction)
        tiny_wan.sample(psa, steps=3, size=SIZE)  # compiles
        most = most_memory(tiny_wan, psa)
        assert sparse_calls(psa) == [0, 1, 1]
        losses = report(psa)["correction"] or {}
        held = losses.get("bytes", 0) if losses.get("where") == "GPU memory" else 0
        print(f"{correction}: {most / 2**20:.0f} MiB, without PSA {without / 2**20:.0f}, held {held / 2**20:.0f}")
        assert most <= without + held + SMALL
