"""What a run says that could not be as it was set: why, and what to do."""

import re
import sys

import pytest
import torch

from comfyui_psa.patching.patch import patch_model

from .patched import PATCH, kinds, report


def test_importance_that_is_not_finite_is_told(tiny_wan, sample, caplog):
    model = tiny_wan.load("t2v")
    with torch.no_grad():
        model.get_model_object("diffusion_model").blocks[1].self_attn.q.weight[0, 0] = torch.inf
    patched = patch_model(model, **PATCH)
    sample(patched, steps=4)
    (note,) = report(patched)["notes"]
    assert "was not a finite number" in note
    assert "bfloat16" in note
    assert note in caplog.text


def test_too_few_tokens_say_the_size_and_what_to_do(model, sample):
    psa = patch_model(model, **PATCH | {"min_tokens": 12288, "start_percent": 0.0})
    sample(psa, size=(1, 16, 2, 32, 48))
    (entry,) = report(psa)["fallbacks"]
    assert entry["reason"].startswith("768 tokens (5 frames of 384x256) are fewer than min_tokens 12288")
    assert "set min_tokens to 768 or less" in entry["reason"]


@pytest.mark.parametrize("sparsity", [0.97, 0.95])
def test_a_sparsity_that_a_short_video_cannot_have(model, sample, sparsity):
    patch = PATCH | {"start_percent": 0.0, "block_kv": "128"}
    psa = patch_model(model, **patch | {"sparsity": sparsity})
    size = (1, 16, 2, 32, 32)
    assert torch.equal(sample(psa, steps=2, size=size), sample(model, steps=2, size=size))
    (entry,) = report(psa)["fallbacks"]
    assert "Error" not in entry["reason"]
    assert "512 video tokens (5 frames of 256x256)" in entry["reason"]
    most = float(re.search(r"(0\.\d\d) is the most there", entry["reason"])[1])
    psa = patch_model(model, **patch | {"sparsity": most})
    sample(psa, steps=2, size=size)
    assert kinds(psa) == ["sparse", "sparse"], "what was proposed can be had"
    psa = patch_model(model, **patch | {"sparsity": most + 0.01})
    sample(psa, steps=2, size=size)
    assert kinds(psa) == ["dense", "dense"], "and it is the most"


def test_triton_that_is_not_there(model, sample, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or ".kernels.gpu" in name]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    psa = patch_model(model, **PATCH | {"backend": "triton"})
    assert torch.equal(sample(psa, steps=2), sample(model, steps=2))
    (entry,) = report(psa)["fallbacks"]
    assert "Error" not in entry["reason"]
    assert "install Triton" in entry["reason"]
