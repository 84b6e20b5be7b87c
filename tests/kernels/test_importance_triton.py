"""The importance kernel against `importance.reduced_softmax`: every kind of representatives, both reductions."""

import pytest
import torch

from comfyui_psa.kernels.importance import pooled, reduced_softmax, sampled

SHAPES = [
    (64, 64, 32, 32),
    (1, 1, 32, 32),
    (31, 33, 32, 64),
    (129, 200, 128, 64),
    (65, 257, 32, 128),
    (300, 63, 64, 32),
    (700, 900, 128, 64),
]


def representatives(kind, x, block):
    if kind == "pooled":
        return pooled(x, block, 8)
    if kind == "means":
        return pooled(x, block, block)
    # An odd number of rows a block leaves padding between them.
    return sampled(x, block, kind, torch.Generator(device=x.device).manual_seed(1))


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("kind", ["pooled", "means", 0.25, 0.16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reduced_softmax(triton_device, half_types, random_tensor, shape, kind, reduction):
    from comfyui_psa.kernels.gpu.importance import reduced_softmax_triton

    length_q, length_k, block_q, block_kv = shape
    for dtype in (torch.float32, *half_types):
        q, k = (
            (2 * random_tensor(1, 2, n, 16, seed=n)).to(triton_device, dtype) for n in (length_q, length_k)
        )  # fmt: skip
        chosen = representatives(kind, q, block_q), representatives(kind, k, block_kv)
        for norm in [None, pooled(k, block_kv, 32)] if kind == "pooled" else [None]:
            scores = reduced_softmax_triton(*chosen, 0.25, reduction, norm)
            expected = reduced_softmax(*chosen, 0.25, reduction, norm)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4 if dtype == torch.float32 else 1e-2)


def test_head_sizes_are_padded(triton_device, random_tensor):
    from comfyui_psa.kernels.gpu.importance import reduced_softmax_triton

    for dim in (5, 48, 128):
        q, k = (random_tensor(2, 1, 100, dim, seed=s).to(triton_device) for s in (1, 2))
        chosen = pooled(q, 32, 8), pooled(k, 64, 8)
        expected = reduced_softmax(*chosen, 0.3, "max")
        torch.testing.assert_close(reduced_softmax_triton(*chosen, 0.3, "max"), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("most", [60, 120, 400])
def test_weights_of_logits_that_rise_or_fall_along_the_sequence(triton_device, half_types, most, way, reduction):
    """Whatever the tile that the sum begins with holds, the others may be any factor above it."""
    from comfyui_psa.kernels.gpu.importance import reduced_softmax_triton

    length = 4096 if triton_device == "cpu" else 65_536
    k = torch.zeros(1, 1, length, 16)
    k[..., 0] = way * torch.arange(length) // 64 * (64 * most / length)
    for dtype in half_types:
        q, keys = torch.ones(1, 1, 64, 16).to(triton_device, dtype), k.to(triton_device, dtype)
        for norm in (None, pooled(keys, 64, 32)):
            chosen = pooled(q, 64, 8), pooled(keys, 64, 8)
            scores = reduced_softmax_triton(*chosen, 1.0, reduction, norm)
            expected = reduced_softmax(*chosen, 1.0, reduction, norm)
            torch.testing.assert_close(scores, expected, atol=1e-30, rtol=1e-2)


def test_a_last_tile_of_infinite_keys_leaves_the_others_their_weights(triton_device):
    from comfyui_psa.kernels.gpu.importance import reduced_softmax_triton

    q, k = torch.ones(1, 1, 64, 16, device=triton_device), torch.zeros(1, 1, 1024, 16, device=triton_device)
    k[:, :, 512:] = -torch.inf
    chosen = pooled(q, 64, 8), pooled(k, 64, 8)
    expected = reduced_softmax(*chosen, 1.0, "max")
    assert expected.isfinite().all()
    torch.testing.assert_close(reduced_softmax_triton(*chosen, 1.0, "max"), expected)
