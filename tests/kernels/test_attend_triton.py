"""The Triton kernel against `attend_reference` on injected maps: in the interpreter, and on a GPU where there is one.

The cases are the same. Triton decides at import whether it interprets, so without a GPU one test starts this file again
in a process of its own with TRITON_INTERPRET=1; bfloat16 is left to the GPU, the interpreter mishandles it.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig, TokenLayout, pyramid_sparse_attention
from comfyui_psa.kernels.attend import attend_reference, attend_streaming
from comfyui_psa.kernels.pyramid import build_pyramid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available() and HAS_TRITON and not INTERPRETED
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# length_q, length_k, head size, block_q, block_kv, choices of the map, extra tokens
CASES = [
    (64, 64, 64, 32, 32, (0, 1, 2, 4, 8), 0),
    (65, 129, 64, 32, 32, (0, 1, 2, 4, 8, 32), 0),
    (129, 300, 64, 128, 64, (0, 1, 2, 4, 8, 64), 0),
    (63, 300, 128, 128, 128, (0, 1, 2, 4, 8, 128), 5),
    (300, 129, 48, 128, 64, (1, 2, 4, 8, 16, 32, 64), 0),
    (64, 63, 48, 32, 64, (0, 8, 64), 70),
    (1, 1, 64, 32, 32, (1,), 0),
    (1, 1, 64, 32, 64, (8,), 3),
    (1, 300, 128, 32, 32, (0, 1, 8), 0),
    (129, 1, 64, 128, 128, (1, 2, 128), 0),
    (33, 65, 64, 32, 64, (1, 8), 0),
    (33, 65, 64, 32, 128, (2, 4), 0),
    (64, 300, 64, 32, 32, (8,), 0),
    (64, 300, 64, 32, 64, (0, 8), 0),
    (64, 300, 64, 32, 128, (0, 8), 0),
    (64, 129, 64, 32, 64, (64,), 1),
    (40, 100, 80, 64, 32, (0, 1, 4, 32), 65),
    (40, 100, 16, 32, 32, (0, 1, 4), 0),
    (40, 100, 5, 32, 32, (0, 1, 4), 2),
]


def check(case, dtype, device, random_tensor, random_factors, poisoned, batch=2, heads=2):
    from comfyui_psa.kernels.attend_triton import attend_triton

    length_q, length_k, dim, block_q, block_kv, choices, extra = case
    q, k, v, more_k, more_v = (
        poisoned(random_tensor(batch, heads, length, dim, seed=seed).to(device=device, dtype=dtype))
        for seed, length in enumerate((length_q, length_k, length_k, extra, extra))
    )
    more = (more_k, more_v) if extra else (None, None)
    shape = (batch, heads, -(-length_q // block_q), -(-length_k // block_kv))
    factors = random_factors(shape, choices, seed=length_k).to(device)
    pyramid = build_pyramid(k, v, tuple(sorted({*choices} - {0})), block_kv)
    scale = dim**-0.5
    out = attend_triton(q, pyramid, factors, block_q, scale, *more)
    form = attend_reference if length_q * length_k < 2**20 else attend_streaming
    expected = form(q, pyramid, factors, block_q, scale, *more)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(attend_triton(q, pyramid, factors, block_q, scale, *more), out)


def check_nothing_seen(device):
    from comfyui_psa.kernels.attend_triton import attend_triton

    x = torch.ones(1, 1, 64, 64, device=device)
    factors = torch.tensor([[0, 0], [0, 1]], dtype=torch.int16, device=device).view(1, 1, 2, 2)
    out = attend_triton(x, build_pyramid(x, x, (1, 8), 32), factors, 32, 0.1)
    assert torch.equal(out[:, :, :32], torch.zeros_like(out[:, :, :32]))
    torch.testing.assert_close(out[:, :, 32:], x[:, :, 32:])


def check_whole_call(device, random_tensor):
    layout = TokenLayout((3, 8, 9), before=5, after=3)
    q, k, v = (random_tensor(1, 2, layout.length, 64, seed=s).to(device) for s in (1, 2, 3))
    config = PyramidConfig(sparsity=0.7, block_q=32, block_kv=32, order="curve")
    first, second = (
        pyramid_sparse_attention(q, k, v, config, layout=layout, backend=name) for name in ("triton", "torch")
    )
    assert (first.backend, second.backend) == ("triton", "torch")
    assert torch.equal(first.factors, second.factors)
    torch.testing.assert_close(first.output, second.output, atol=2e-5, rtol=2e-5)


if INTERPRETED:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_interpreted(case, dtype, random_tensor, random_factors, poisoned):
        heads = 2 if dtype == torch.float32 else 1
        check(case, dtype, "cpu", random_tensor, random_factors, poisoned, batch=2 // heads, heads=heads)

    def test_interpreted_whole_call(random_tensor):
        check_whole_call("cpu", random_tensor)

    def test_interpreted_row_that_sees_nothing():
        check_nothing_seen("cpu")

else:

    @pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
    def test_the_sequence_length_is_no_compile_time_constant():
        """The official kernel is compiled anew for every resolution."""
        from comfyui_psa.kernels.attend_triton import _attend

        constant = {parameter.name for parameter in _attend.params if parameter.is_constexpr}
        running = {"length_q", "length_k", "n_q", "n_k", "extra", "heads"}
        assert constant
        assert running <= {parameter.name for parameter in _attend.params} - constant

    @pytest.mark.slow
    @pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
    def test_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", str(Path(__file__))]
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        root = Path(__file__).resolve().parents[2]
        run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
        passed = re.search(r"(\d+) passed", run.stdout)
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
        assert passed
        assert int(passed.group(1)) >= 2 * len(CASES)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device and triton")]
LARGE = [
    (4096, 4096, 128, 128, 64, (0, 0, 1, 2, 8, 64), 226),
    (5000, 7001, 64, 128, 32, (0, 0, 1, 2, 4, 8, 32), 0),
]


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    def test_cases(self, dtype, random_tensor, random_factors, poisoned):
        for case in (*CASES, *LARGE):
            check(case, dtype, "cuda", random_tensor, random_factors, poisoned)

    def test_whole_call(self, random_tensor):
        check_whole_call("cuda", random_tensor)

    def test_row_that_sees_nothing(self):
        check_nothing_seen("cuda")

    def test_offsets_past_two_to_the_31(self, random_tensor):
        from comfyui_psa.kernels.attend_triton import attend_triton

        length, stride = 70_000, 32_768
        if torch.cuda.mem_get_info()[0] < 3 * 2 * length * stride:
            pytest.skip("needs 14 GB of free GPU memory")
        wide = torch.empty(1, length, 1, stride, dtype=torch.float16, device="cuda")
        for x, start, seed in ((wide, 0, 1), (wide, 64, 2)):
            x[..., start : start + 64] = random_tensor(1, length, 1, 64, seed=seed).to(x)
        k, v = wide[..., :64].transpose(1, 2), wide[..., 64:128].transpose(1, 2)
        assert (length - 1) * k.stride(2) > 2**31
        q = random_tensor(1, 1, 128, 64, seed=3, dtype=torch.float16).cuda()
        factors = torch.zeros(1, 1, 1, -(-length // 64), dtype=torch.int16, device="cuda")
        factors[..., 0] = factors[..., -3:] = 1
        pyramid = build_pyramid(k, v, (1,), 64)
        out = attend_triton(q, pyramid, factors, 128, 0.125)
        expected = attend_streaming(q, pyramid, factors, 128, 0.125)
        torch.testing.assert_close(out.float(), expected.float(), atol=4e-3, rtol=4e-3)
