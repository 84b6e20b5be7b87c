"""Every family of video models besides Wan and CogVideoX in whole runs: guidance, LoRAs, fp8, correction, compiler."""

import pytest
import torch

from comfyui_psa.patching.family import find_family
from comfyui_psa.patching.patch import patch_model

from ..tiny_families import ONE_OF_EACH
from .core_nodes import compiled
from .patched import FULL, SPARSE, by_step, distance, report, reports_nothing


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("tokens", [13, 21])
def test_guidance_batched_or_split_is_sparse(kind, tokens, models, tiny_families):
    model, tiny = models(kind), tiny_families
    negative = tiny.conditioning(kind, tokens, seed=4)
    stock = tiny.sample(model, kind, cfg=4.0, negative=negative)
    full = patch_model(model, **FULL)
    assert distance(tiny.sample(full, kind, cfg=4.0, negative=negative), stock) < 1e-5
    assert by_step(full, "dense_calls") == [0]
    assert reports_nothing(full)
    assert len(report(full)["layers"]) == find_family(model).blocks


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_lora_before_or_after_is_the_same(kind, models, tiny_families):
    import comfy.sd

    model, tiny = models(kind), tiny_families
    weights = model.get_model_object("diffusion_model").state_dict()
    ends = tuple(f"{name}.weight" for name in ("qkv", "qkv_x", "qkv_proj", "to_q", "to_query", "q_proj"))
    key = next(key for key in weights if "blocks.1." in key and key.endswith(ends))
    wide, deep = weights[key].shape
    lora = {
        f"diffusion_model.{key.removesuffix('.weight')}.lora_A.weight": tiny.normal(4, deep, seed=8),
        f"diffusion_model.{key.removesuffix('.weight')}.lora_B.weight": tiny.normal(wide, 4, seed=9),
    }

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]

    stock, bent = tiny.sample(model, kind), tiny.sample(with_lora(model), kind)
    assert distance(bent, stock) > 1e-4
    before, after = patch_model(with_lora(model), **FULL), with_lora(patch_model(model, **FULL))
    assert distance(tiny.sample(before, kind), bent) < 1e-5
    assert distance(tiny.sample(after, kind), bent) < 1e-5
    assert reports_nothing(before)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_fp8_weights(kind, tiny_families):
    model = tiny_families.load(kind, torch.float8_e4m3fn)
    stock, full = tiny_families.sample(model, kind), patch_model(model, **FULL)
    assert torch.isfinite(stock).all()
    assert distance(tiny_families.sample(full, kind), stock) < 1e-5
    assert reports_nothing(full)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_what_is_lost_is_given_back(kind, models, tiny_families):
    model = models(kind)
    # Steps so short that the model sees almost the same in all of them, and so loses the same.
    run = {"steps": 4, "sigmas": torch.tensor([0.5, 0.499, 0.498, 0.497, 0.496])}
    stock = tiny_families.sample(model, kind, **run)
    off, on = (patch_model(model, **SPARSE | {"sparsity": 0.8, "correction": size}) for size in ("off", "full"))
    lost = distance(tiny_families.sample(off, kind, **run), stock)
    assert distance(tiny_families.sample(on, kind, **run), stock) < 0.8 * lost
    assert by_step(on, "corrected_calls") == [0, *[find_family(model).blocks] * 3]


@pytest.mark.parametrize("kind", ["hunyuan", "hunyuan 1.5"])
def test_double_and_single_blocks_have_numbers_of_their_own(kind, models, tiny_families):
    sparse = patch_model(models(kind), **SPARSE | {"dense_blocks": "0, 3"})
    tiny_families.sample(sparse, kind)
    assert list(report(sparse)["layers"]) == ["1", "2"]


@pytest.mark.slow(seconds=15)
def test_blocks_of_both_kinds_keep_their_numbers_in_a_compiled_network(models, tiny_families, compiler):
    sparse = patch_model(models("hunyuan"), **SPARSE | {"dense_blocks": "0, 3"})
    expected = tiny_families.sample(sparse, "hunyuan")
    assert distance(tiny_families.sample(compiled(sparse), "hunyuan"), expected) < 1e-3
    assert list(report(sparse)["layers"]) == ["1", "2"]
    assert report(sparse)["notes"] == []
