"""The tests of the Triton kernels, run in Triton's interpreter if there is no GPU.

Triton decides at import whether it interprets, so the files start again in a separate process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = sorted(Path(__file__).parents[1].glob("*/test_*_triton.py"))


@pytest.mark.slow(seconds=400)
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are tried there")
def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", *map(str, FILES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) >= 100
