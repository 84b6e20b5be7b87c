"""PSA in ComfyUI on a GPU, where the Triton kernels compute: every layout of the tokens, and nothing changed when off.

ComfyUI takes one device for a whole process:
`PSA_TEST_DEVICE=cuda python dev.py test tests/patching/test_patch_gpu.py`.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.kernels.delta import Delta
from comfyui_psa.kernels.levels import BlockLists
from comfyui_psa.kernels.order import TokenOrder
from comfyui_psa.patching.patch import patch_model
from comfyui_psa.sampling import self_attention

from .patched import FULL, PATCH, distance, report, sparse_calls

pytestmark = pytest.mark.gpu(comfyui=True)
ROUNDING = 2e-2
"""Relative error of a bfloat16 model whose sums are taken in another order."""
FRAME = 256


@pytest.fixture(scope="module")
def model(tiny_wan):
    return tiny_wan.load("t2v", torch.bfloat16)


@dataclasses.dataclass
class Call:
    """A call that PSA took: its layout and backend, and its distance to the torch reference, and to dense attention."""

    layout: tuple
    backend: str
    from_reference: float
    from_dense: float


@pytest.fixture
def calls(monkeypatch):
    """Every call that PSA takes, computed again on the host in float32, at the levels that the GPU chose."""
    seen = []

    def attention(q, k, v, config, **arguments):
        result = pyramid_sparse_attention(q, k, v, config, **arguments)
        q, k, v = (x.float().cpu() for x in (q, k, v))
        layout, lists, order = arguments["layout"], result.lists, arguments["order"]
        lists = BlockLists(
            lists.blocks.cpu(), lists.ends.cpu(), lists.levels, lists.density.cpu(), key_blocks=lists.key_blocks
        )
        delta = arguments.get("delta")
        delta = None if delta is None else Delta(delta.values.cpu(), delta.scales.cpu(), delta.group)
        order = TokenOrder(*(None if x is None else x.cpu() for x in (order.index, order.inverse)))
        expected = pyramid_sparse_attention(
            q, k, v, config, layout=layout, order=order, lists=lists, delta=delta, backend="torch"
        )
        dense = F.scaled_dot_product_attention(q, k, v)
        place = layout.before, layout.grid, layout.after
        distances = distance(result.output, expected.output), distance(result.output, dense)
        seen.append(Call(place, result.backend, *distances))
        return result

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    return seen


def reference(tiny):
    return {"reference_latents": [tiny.normal(1, 16, 1, 32, 32, seed=5)]}


def appended(tiny):
    return {"time_dim_concat": tiny.normal(1, 16, 2, 32, 32, seed=5)}


def both(tiny):
    references = [tiny.normal(1, 16, 1, 32, 32, seed=seed) for seed in (5, 6)]
    return {"reference_latents": references, "pose_video_latent": tiny.normal(1, 16, 3, 16, 16, seed=7)}


VARIANTS = {
    "nothing beside the grid": ("t2v", (1, 16, 3, 32, 32), None, (0, (3, 16, 16), 0)),
    "odd sizes": ("t2v", (1, 16, 3, 31, 33), None, (0, (3, 16, 17), 0)),
    "a reference before it": ("fun", (1, 16, 3, 32, 32), reference, (FRAME, (3, 16, 16), 0)),
    "the first frame": ("animate", (1, 16, 4, 32, 32), None, (FRAME, (3, 16, 16), 0)),
    "frames after it": ("t2v", (1, 16, 3, 32, 32), appended, (0, (3, 16, 16), 2 * FRAME)),
    "before and after it": ("scail", (1, 16, 3, 32, 32), both, (2 * FRAME, (3, 16, 16), 192)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_before_and_after_the_grid(tiny_wan, sample, calls, name):
    kind, size, extra, layout = VARIANTS[name]
    model, extra = tiny_wan.load(kind, torch.bfloat16), extra and extra(tiny_wan)
    psa = patch_model(model, **PATCH | {"start_percent": 0.0})
    assert torch.isfinite(sample(psa, size=size, extra=extra, cfg=3.0)).all()
    assert {(call.layout, call.backend) for call in calls} == {(layout, "triton")}
    assert max(call.from_reference for call in calls) < 1e-2
    calls.clear()
    full = sample(patch_model(model, **FULL), size=size, extra=extra, cfg=3.0)
    assert max(call.from_dense for call in calls) < 1e-2
    assert distance(full, sample(model, size=size, extra=extra, cfg=3.0)) < ROUNDING


def test_the_text_of_cogvideox_comes_first(comfyui, tiny_wan, sample, calls):
    import comfy.ldm.cogvideo.model
    import comfy.ops
    import comfy.sd

    blank = comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel(
        num_attention_heads=2, num_layers=2, text_embed_dim=4096, use_rotary_positional_embeddings=True,
        operations=comfy.ops.disable_weight_init, dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    state = {key: (tiny_wan.normal(*x.shape) * 0.05).bfloat16() for key, x in blank.state_dict().items()}
    model = comfy.sd.load_diffusion_model_state_dict(state)
    psa = patch_model(model, **PATCH | {"start_percent": 0.0})
    extra = {"positive": tiny_wan.conditioning(226), "negative": tiny_wan.conditioning(226, seed=4)}
    assert torch.isfinite(sample(psa, **extra)).all()
    assert {(call.layout, call.backend) for call in calls} == {((226, (3, 16, 16), 0), "triton")}
    assert max(call.from_reference for call in calls) < 1e-2


def test_bypassed_and_sparsity_0_are_stock_bit_for_bit(model, sample):
    stock = sample(model, steps=4)
    psa = patch_model(model, **PATCH)
    assert not torch.equal(sample(psa, steps=4), stock)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert report(psa)["time"]["sparse_attention"] > 0
    assert torch.equal(sample(model, steps=4), stock)
    assert torch.equal(sample(patch_model(model, **PATCH | {"sparsity": 0.0}), steps=4), stock)


def test_figures_of_every_step_arrive(model, sample):
    told = []
    sample(patch_model(model, **PATCH, on_step=told.append), steps=4)
    assert [figures["step"] for figures in told] == [0, 1, 2, 3]
    assert [figures["sparsity"] is None for figures in told] == [True, False, False, False]
