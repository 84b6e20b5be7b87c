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


def test_equals_dense_where_everything_is_seen():
    q, k, v = torch.randn(3, 1, 2, 500, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for tau, extra in ((-100.0, 0), (100.0, 500)):
        output, density = sol_attn.sol_attention(q, k, v, tau, extra=extra)
        assert density == pytest.approx(1, abs=0.02)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tail", ["block", "row", "none"])
def test_is_the_rule_token_by_token(tail):
    """Against a loop over single queries, in float64."""
    q, k, v = torch.randn(3, 300, 16, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    found = sol_attn.sol_attention(*(x[None, None] for x in (q, k, v)), 0.8, tail=tail)[0][0, 0]
    blocks = [range(start, min(start + 64, 300)) for start in range(0, 300, 64)]
    mean = lambda x, block: x[list(block)].mean(0)  # noqa: E731
    middle = sum(mean(k, block) for block in blocks) / 5
    for i, queries in enumerate(blocks):
        centre = mean(q, queries)
        spread = sum((centre * (mean(k, block) - middle)).square() for block in blocks) / 5
        for t in (queries[0], queries[-1]):
            weights, values = [], []
            for j, block in enumerate(blocks):
                if abs(i - j) <= 1 or centre @ (mean(k, block) - middle) > 0.8 * spread.sum().sqrt():
                    weights += [(q[t] @ (k[s] - middle) / 4).exp() for s in block]
                    values += [v[s] for s in block]
                elif tail != "none":
                    who = q[t] if tail == "row" else centre
                    weights.append(len(block) * (who @ (mean(k, block) - middle) / 4).exp())
                    values.append(mean(v, block))
            expected = torch.stack(weights) @ torch.stack(values) / sum(weights)
            torch.testing.assert_close(found[t], expected)


def test_extra_tokens_are_those_that_the_mean_query_scores_highest():
    q, k, v = torch.randn(3, 1, 1, 640, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    q[0, 0, :64] += 2  # a block of queries that look for the same thing
    k[0, 0, 500] = 3  # one token of a block that is not seen in full
    v[0, 0, 500] = 10
    without, less = sol_attn.sol_attention(q, k, v, 100.0)
    output, more = sol_attn.sol_attention(q, k, v, 100.0, extra=1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    near = slice(0, 64)
    assert (output - expected)[:, :, near].norm() < 0.1 * (without - expected)[:, :, near].norm()
    assert float(more - less) == pytest.approx(1 / 640, rel=1e-3)


@pytest.mark.skipif(not sol_attn.available(), reason="comfy_kitchen without Sol-Attn")
@pytest.mark.parametrize("tail", ["block", "none"])
def test_is_what_the_package_computes(tail):
    q, k, v = torch.randn(3, 1, 2, 500, 128, generator=torch.Generator().manual_seed(0)).unbind(0)
    for tau in (0.5, 1.5):
        output, density = sol_attn.sol_attention(q, k, v, tau, tail=tail)
        expected, theirs = sol_attn.sol_attention(q, k, v, tau, tail=tail, package=True)
        assert density == theirs
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


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
