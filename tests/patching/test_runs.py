"""Whole runs as users make them: sizes, steps, guidance, experts, LoRAs and previews that change from run to run."""

import gc
import weakref

import pytest
import torch

from comfyui_psa.patching.patch import patch_model
from comfyui_psa.sampling.run import Run

from .core_nodes import lora
from .patched import FULL, PATCH, distance, kinds, report, reports_nothing


def test_size_a_then_b_then_a(model, sample, monkeypatch):
    runs = []
    genuine = Run.__init__

    def made(self, *args, **kwargs):
        genuine(self, *args, **kwargs)
        runs.append(weakref.ref(self))

    monkeypatch.setattr(Run, "__init__", made)
    psa = patch_model(model, **PATCH | {"reuse_steps": 2})
    sizes = [(1, 16, 3, 32, 32), (1, 16, 2, 48, 32), (1, 16, 3, 32, 32)]
    outputs = []
    for size in sizes:
        outputs.append(sample(psa, steps=4, size=size))
        assert report(psa)["grid"] == [size[2], size[3] // 2, size[4] // 2]
        gc.collect()
        assert [run() for run in runs] == [None] * len(runs), "nothing of a run outlives it"
    assert torch.equal(outputs[0], outputs[2])


def test_two_samplers_of_other_sizes_and_steps_and_guidance(model, sample):
    psa = patch_model(model, **PATCH)
    for steps, size, cfg in ((4, (1, 16, 3, 32, 32), 1.0), (7, (1, 16, 2, 32, 48), 6.0), (4, (1, 16, 3, 32, 32), 6.0)):
        sample(psa, steps=steps, size=size, cfg=cfg)
        found = report(psa)
        assert (len(found["steps"]), found["grid"]) == (steps, [size[2], size[3] // 2, size[4] // 2])
        dense = sum(step["kind"] == "dense" for step in found["steps"])
        assert kinds(psa) == ["dense"] * dense + ["sparse"] * (steps - dense)
        assert reports_nothing(psa)


def test_two_experts_that_share_a_schedule(tiny_wan, sample):
    high, low = (patch_model(tiny_wan.load("t2v"), **PATCH | {"start_percent": 0.4}) for _ in range(2))
    latent = sample(high, steps=4, last_step=2, force_full_denoise=False)
    sample(low, steps=4, start_step=2, disable_noise=True, noise=torch.zeros_like(latent), latent=latent)
    assert kinds(high) == ["dense", "dense"]
    assert kinds(low) == ["sparse", "sparse"]
    assert report(low)["steps"][0]["index"] == 0


def test_two_experts_with_one_lora_at_two_strengths(tiny_wan, sample):
    """Wan 2.2: each half has its own strength, and neither knows of the other's."""
    from comfyui_psa.loading.lora import patch_with_lora

    base = tiny_wan.load("t2v")
    both = [patch_with_lora(base, lora(), "one", strength)[0] for strength in (3.0, 1.5)]
    patches = [patch_model(model, **PATCH) for model in both]
    alone = [sample(psa, steps=4) for psa in patches]
    assert not torch.equal(*alone)
    for model, psa, expected in zip(reversed(both), reversed(patches), reversed(alone), strict=True):
        assert torch.equal(sample(psa, steps=4), expected)
        assert distance(sample(patch_model(model, **FULL)), sample(model)) < 1e-4
        assert kinds(psa) == ["dense", *["sparse"] * 3]


@pytest.mark.parametrize("loader_first", [True, False])
def test_weight_hooks_after_psa_and_the_lora_loader(model, sample, tiny_wan, loader_first):
    import comfy.hooks

    from comfyui_psa.loading.lora import patch_with_lora

    hooks = comfy.hooks.create_hook_lora(lora(0.08), 1.0, 0.0)
    hooked = comfy.hooks.set_conds_props([tiny_wan.conditioning()], 1.0, "default", hooks=hooks)[0]
    with_lora = patch_with_lora(model, lora(), "one", 1.0)[0]
    if loader_first:
        psa = patch_model(with_lora, **PATCH)
    else:
        psa = patch_with_lora(patch_model(model, **PATCH), lora(), "one", 1.0)[0]
    plain = sample(psa, steps=4)
    out = sample(psa, steps=4, positive=hooked)
    assert not torch.equal(out, plain)
    assert kinds(psa) == ["dense", *["sparse"] * 3]
    assert reports_nothing(psa)
    assert torch.equal(sample(psa, steps=4), plain), "the hook leaves nothing on the weights"
    full = patch_model(with_lora, **FULL)
    assert distance(sample(full, positive=hooked), sample(with_lora, positive=hooked)) < 1e-4


def test_a_latent_preview_changes_nothing(model, sample):
    import latent_preview
    from comfy.cli_args import args

    method, args.preview_method = args.preview_method, latent_preview.LatentPreviewMethod.Latent2RGB
    try:
        callback = latent_preview.prepare_callback(model, 4)
        psa = patch_model(model, **PATCH)
        assert torch.equal(sample(psa, steps=4, callback=callback), sample(psa, steps=4))
    finally:
        args.preview_method = method
