"""The rival from ComfyUI's core, if its package has it: called as it is, and its share of the work counted."""

import pytest
import torch

from comfyui_psa.workshop.quality import sol_attn


def test_density_is_that_of_the_rule():
    q, k = torch.randn(2, 1, 2, 500, 128, generator=torch.Generator().manual_seed(0)).unbind(0)
    shares = [float(sol_attn.density(q, k, tau)) for tau in (-100.0, 1.0, 100.0)]
    near = (3 * 8 - 2) / 64  # a block, and its neighbours on both sides
    assert shares[0] == 1
    assert shares[2] == pytest.approx(near + (1 - near) / 64)
    assert shares[2] < shares[1] < shares[0]


@pytest.mark.skipif(not sol_attn.available(), reason="comfy_kitchen without Sol-Attn")
def test_equals_dense_where_everything_is_seen():
    q, k, v = torch.randn(3, 1, 2, 500, 128, generator=torch.Generator().manual_seed(0)).unbind(0)
    output, density = sol_attn.sol_attention(q, k, v, -100.0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert density == 1
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not sol_attn.available(), reason="comfy_kitchen without Sol-Attn")
def test_density_is_that_of_the_package():
    import comfy_kitchen

    q, k = torch.randn(2, 1, 512, 2, 128, generator=torch.Generator().manual_seed(0)).unbind(0)
    # The values name the key blocks, so that the output tells which ones a query block has seen in full.
    blocks = torch.zeros(512, 128)
    blocks[torch.arange(512), torch.arange(512) // 64] = 1
    v = blocks[None, :, None].expand(1, -1, 2, -1).contiguous()
    seen = comfy_kitchen.sol_attn(q, k, v, tau=0.5, tail=False)[0, ::64, :, :8] > 0
    full = float(seen.float().mean())
    found = float(sol_attn.density(q.transpose(1, 2), k.transpose(1, 2), 0.5))
    assert found == pytest.approx(full + (1 - full) / 64)
    assert 22 / 64 < full < 0.9
