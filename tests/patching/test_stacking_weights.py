"""Weights that are not as in a plain checkpoint: LoRAs, hooks, fp8, low VRAM, packed ones."""

import pytest
import torch

from comfyui_psa.patching import core
from comfyui_psa.patching.patch import patch_model

from .core_nodes import lora, with_lora
from .patched import FULL, PATCH, distance, report, sparse_calls


def test_loras(model, sample):
    stacked = with_lora(with_lora(model), 0.5)
    dense = sample(stacked)
    assert distance(sample(model), dense) > 1e-6
    assert distance(sample(patch_model(stacked, **FULL)), dense) < 1e-4
    psa = patch_model(stacked, **PATCH)
    after = with_lora(with_lora(patch_model(model, **PATCH)), 0.5)
    assert torch.equal(sample(psa, steps=4), sample(after, steps=4))
    assert sparse_calls(psa) == sparse_calls(after) == [0, 2, 2, 2]
    assert torch.equal(sample(stacked), dense)


def test_hooks_and_masks(model, sample, tiny_wan):
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora(), 1.0, 0.0)
    mask = torch.zeros(1, 32, 32)
    mask[:, :, :16] = 1.0
    left = comfy.hooks.set_conds_props([tiny_wan.conditioning()], 1.0, "default", mask=mask, hooks=hooks)[0]
    right = comfy.hooks.set_conds_props([tiny_wan.conditioning(seed=8)], 1.0, "default", mask=1 - mask)[0]
    arguments = {"positive": left + right, "negative": tiny_wan.conditioning(seed=4), "cfg": 3.0}
    dense = sample(model, **arguments)
    assert distance(sample(patch_model(model, **FULL), **arguments), dense) < 1e-4
    psa = patch_model(model, **PATCH)
    sample(psa, steps=4, **arguments)
    calls = sparse_calls(psa)
    assert calls[0] == 0
    assert min(calls[1:]) >= 4, "the hooked prompt has a model call of its own"
    assert report(psa)["fallbacks"] == []
    assert torch.equal(sample(model, **arguments), dense)


def test_fp8_weights(tiny_wan, sample):
    import comfy.sd

    eight = comfy.sd.load_diffusion_model_state_dict(
        tiny_wan.state_dict("t2v"), model_options={"dtype": torch.float8_e4m3fn}
    )
    assert core.network_of(eight).blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn
    assert distance(sample(patch_model(eight, **FULL)), sample(eight)) < 1e-4
    psa = patch_model(eight, **PATCH)
    assert torch.isfinite(sample(psa, steps=4)).all()
    assert sparse_calls(psa) == [0, 2, 2, 2]


@pytest.mark.parametrize("with_loras", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.8])
def test_weights_that_stay_in_main_memory(tiny_wan, sample, monkeypatch, kept, with_loras):
    """As ComfyUI loads a model for a GPU that is full: a part of the layers, or none, the others layer by layer."""
    import comfy.model_patcher

    def load(self, device_to=None, lowvram_model_memory=0, *args, **kwargs):
        return real(self, device_to, max(0.1, kept * self.model_size()), *args, **kwargs | {"full_load": False})

    def loaded():
        model = tiny_wan.load("t2v")
        return with_lora(model) if with_loras else model

    expected = sample(patch_model(loaded(), **PATCH), steps=4)
    real = comfy.model_patcher.ModelPatcher.load
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load)
    offloaded = loaded()
    psa, cast = patch_model(offloaded, **PATCH), set()

    def look(*_):
        linear = (x for x in core.network_of(psa).modules() if isinstance(x, torch.nn.Linear))
        cast.update(layer.comfy_cast_weights for layer in linear)

    out = sample(psa, steps=4, callback=look)
    assert psa.model.model_lowvram
    assert cast == ({False, True} if kept else {True})
    if not kept:
        assert bool(psa.lowvram_patch_counter()) == with_loras, "LoRAs are added in every call"
    assert distance(out, expected) < 1e-5
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert distance(sample(patch_model(offloaded, **FULL)), sample(offloaded)) < 1e-4


def packed(model_state):
    """A MODEL as GGUF loaders make it: layers that hold packed weights and unpack them in every call, and a
    ModelPatcher of its own class, which hands LoRAs to the layers instead of adding them to the weights."""
    import comfy.lora
    import comfy.model_patcher
    import comfy.ops
    import comfy.sd
    import comfy.utils

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            patches = ()

            def _load_from_state_dict(self, state, prefix, *_):
                weight, bias = state[prefix + "weight"], state.get(prefix + "bias")
                self.step = weight.abs().amax(1, keepdim=True) / 127
                values = (weight / self.step).round().to(torch.int8)
                self.weight = torch.nn.Parameter(values, requires_grad=False)
                self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

            def forward(self, x):
                weight = self.weight.to(x) * self.step.to(x)
                if self.patches:
                    weight = comfy.lora.calculate_weight(self.patches, weight, "")
                return torch.nn.functional.linear(x, weight.to(x), None if self.bias is None else self.bias.to(x))

    class PackedPatcher(comfy.model_patcher.ModelPatcher):
        def patch_weight_to_device(self, key, *args, **kwargs):
            layer = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
            if not key.endswith(".weight") or not isinstance(layer, Operations.Linear):
                return super().patch_weight_to_device(key, *args, **kwargs)
            if key in self.patches:
                layer.patches = self.patches[key]
            return None

        def unpatch_model(self, device_to=None, unpatch_weights=True):
            for layer in self.model.modules() if unpatch_weights else ():
                if isinstance(layer, Operations.Linear):
                    layer.patches = ()
            return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

        def load(self, *args, force_patch_weights=False, **kwargs):
            super().load(*args, force_patch_weights=True, **kwargs)

        def clone(self, *args, **kwargs):
            own, self.__class__ = self.__class__, PackedPatcher
            clone = super().clone(*args, **kwargs)
            self.__class__ = own
            return clone

    model = comfy.sd.load_diffusion_model_state_dict(model_state, model_options={"custom_operations": Operations})
    return PackedPatcher.clone(model)


def test_packed_weights_and_a_patcher_of_their_own(tiny_wan, sample):
    model = packed(tiny_wan.state_dict("t2v"))
    assert core.network_of(model).blocks[0].self_attn.q.weight.dtype == torch.int8
    stock = sample(model)
    assert distance(stock, sample(tiny_wan.load("t2v"))) < 0.05
    psa = patch_model(model, **PATCH)
    assert type(psa) is type(model)
    assert distance(sample(patch_model(model, **FULL)), stock) < 1e-4
    plain = sample(psa, steps=4)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    before, after = patch_model(with_lora(model, 8.0), **PATCH), with_lora(patch_model(model, **PATCH), 8.0)
    with_it = sample(before, steps=4)
    assert torch.equal(with_it, sample(after, steps=4))
    assert sparse_calls(before) == sparse_calls(after) == [0, 2, 2, 2]
    assert not torch.equal(with_it, plain)
    assert torch.equal(sample(psa, steps=4), plain)
    assert torch.equal(sample(model), stock)
