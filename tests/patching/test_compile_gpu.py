"""Compiled models on a GPU: generated code, and CUDA graphs, which repeat what they have recorded.

ComfyUI takes one device for a whole process: `PSA_TEST_DEVICE=cuda python dev.py test tests/patching`.
"""

import pytest
import torch

from comfyui_psa.patching.patch import patch_model

from . import patched
from .patched import calls, distance

pytestmark = pytest.mark.gpu(comfyui=True)
PATCH = patched.PATCH | {"sparsity": 0.9, "correction": "full"}
LAYERS = 3
BLOCKS = [f"diffusion_model.blocks.{block}" for block in range(LAYERS)]
ROUNDING = 4e-3
"""Relative error of a float16 model whose sums are taken in another order; what PSA changes here is over 1.7e-2."""


@pytest.mark.parametrize("keys", [None, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize(
    "how",
    [
        {"backend": "inductor", "fullgraph": True},
        {"backend": "inductor", "fullgraph": True, "mode": "reduce-overhead"},
        {"backend": "cudagraphs"},
    ],
    ids=["inductor", "reduce-overhead", "cudagraphs"],
)
@pytest.mark.parametrize("correction", ["full", "off"])
def test_every_step_is_as_without_a_compiler(tiny_wan, compiler, keys, how, correction):
    """Dense, learning, sparse and corrected steps, several runs in turn with the model without PSA."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    if keys and how != {"backend": "inductor", "fullgraph": True}:
        pytest.skip("CUDA graphs of single blocks overwrite each other's outputs, without PSA too")
    model = tiny_wan.load("t2v", torch.float16, num_layers=LAYERS)
    psa = patch_model(model, **PATCH | {"correction": correction})
    expected, stock = tiny_wan.sample(psa, steps=6), tiny_wan.sample(model, steps=6)
    wanted = calls(psa)
    assert distance(stock, expected) > 3 * ROUNDING, "PSA shows in the result"
    for clone in (psa, model):
        set_torch_compile_wrapper(model=clone, keys=keys, **how)
    for _ in range(3):  # CUDA graphs are recorded in the second and repeated in the third
        assert distance(tiny_wan.sample(psa, steps=6), expected) < ROUNDING
        assert calls(psa) == wanted
        assert distance(tiny_wan.sample(model, steps=6), stock) < ROUNDING
    assert not (how.get("fullgraph") and compiler["graph_break"])


def test_inductor_and_cuda_graphs_by_hand(compiler):
    """The operator in a graph without ComfyUI: what it decides is decided again in every call."""
    from comfyui_psa.patching.operator import attention_operator, model_call

    operator, asked = attention_operator(), []

    def attend(func, q, k, v, *_, **__):
        asked.append(len(asked))
        return q + len(asked)

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def network(x):
        q = x * 2
        return operator(q, q, q, "torch.nn.functional:gelu:0", [], [2], [], "int", -1, "") * 3

    x = torch.ones(1, 64, 256, device="cuda", dtype=torch.bfloat16)
    for number in range(1, 6):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), model_call(attend, {}):
            assert torch.equal(network(x), torch.full_like(x, 3.0 * (2 + number)))
