"""The figures of videos, against scikit-image and closed forms."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from comfyui_psa.workshop.quality import metrics


def _video(seed, spread=40):
    values = torch.randn(3, 4, 40, 36, generator=torch.Generator().manual_seed(seed)) * spread + 128
    return values.clamp(0, 255).byte()


def test_ssim_is_that_of_scikit_image():
    dense = _video(1)
    sparse = (dense.float() * 0.9 + _video(2).float() * 0.1).byte()
    pairs = zip(*(x.permute(1, 2, 3, 0).numpy().astype(np.float64) for x in (dense, sparse)), strict=True)
    expected = np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in pairs])
    assert metrics.ssim(dense, sparse) == pytest.approx(expected, abs=1e-9)


def test_psnr_of_one_level_and_of_equal_videos():
    dense = _video(1).clamp(0, 254)
    assert metrics.psnr(dense, dense + 1) == pytest.approx(20 * math.log10(255))
    assert metrics.psnr(dense, dense) == math.inf


def test_flicker_sees_errors_that_move_and_no_constant_ones():
    dense = torch.full((3, 5, 8, 8), 100, dtype=torch.uint8)
    assert metrics.flicker(dense, dense + 7) == 0
    blinking = dense.clone()
    blinking[:, ::2] += 7
    assert metrics.flicker(dense, blinking) == pytest.approx(7)


def test_lpips_is_left_out_without_its_package(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert metrics.load_lpips(torch.device("cpu")) is None


def test_lpips_with_an_untrained_network(monkeypatch, tmp_path):
    """The path alone: the package's own weights over an AlexNet that has learned nothing."""
    pytest.importorskip("lpips")
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    file = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), file)
    measure = metrics.load_lpips(torch.device("cpu"))
    dense = torch.randint(256, (3, 5, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    near = (dense.float() * 0.9 + 12).byte()
    assert measure(dense, dense) == 0
    assert 0 < measure(dense, near) < measure(dense, dense.flip(-1))
