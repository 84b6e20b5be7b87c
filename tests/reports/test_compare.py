"""PSNR and SSIM against scikit-image, which is the oracle; the side-by-side picture shows what its titles say."""

import json
import math
import sys

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from comfyui_psa.choices.errors import InputError
from comfyui_psa.reports.compare import compare_images
from comfyui_psa.reports.draw_compare import compare
from comfyui_psa.reports.likeness import ssim


def video(seed, frames=3, height=33, width=48):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, 6, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").permute(0, 2, 3, 1)


@pytest.mark.parametrize("strength", [0.01, 0.2])
def test_figures_agree_with_scikit_image(strength):
    a = video(0)
    b = (a + strength * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    found = compare(a, b)
    frames = zip(a.double().numpy(), b.double().numpy(), strict=True)
    expected = [structural_similarity(x, y, channel_axis=-1, data_range=1.0) for x, y in frames]
    assert [frame for _, frame in found.frames] == pytest.approx(expected, abs=1e-6)
    assert found.ssim == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1.0))


def test_equal_videos_are_equal_and_small_ones_are_one_window():
    a = video(2)
    found = compare(a, a)
    assert (found.psnr, found.lpips) == (math.inf, None)
    assert found.ssim == pytest.approx(1)
    assert ssim(torch.rand(3, 5, 3), torch.rand(3, 5, 3)) < 1


def test_the_picture_shows_both_and_their_difference():
    a, b = video(3), video(4)
    picture, psnr, ratio, figures = compare_images(a, b, "dense", "PSA", 4.0, False)
    assert picture.shape == (3, 33 + 28, 3 * 48, 3)
    below = picture[:, 28:]
    assert torch.equal(below[:, :, :48], a)
    assert torch.equal(below[:, :, 48:96], b)
    assert torch.equal(below[:, :, 96:], ((a - b).abs() * 4).clamp(0, 1))
    assert picture[:, :28].max() > 0.5, "the names are written"
    told = json.loads(figures)
    assert (told["psnr"], told["ssim"]) == (psnr, ratio)
    assert len(told["frames"]) == 3
    assert json.loads(compare_images(a, a, "", "", 1.0, False)[3])["psnr"] is None


def test_what_cannot_be_compared_is_said(monkeypatch):
    with pytest.raises(InputError, match=r"PSA Compare, input images_b: '2 frames of 48x33' .*'?3 frames of 48x33"):
        compare_images(video(0), video(0)[:2], "a", "b", 1.0, False)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match=r"input lpips: .*pip install lpips"):
        compare_images(video(0), video(0), "a", "b", 1.0, True)


@pytest.mark.parametrize("name", ["images_a", "images_b"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pictures_that_are_not_finite_have_no_figures(name, bad):
    broken = video(0)
    broken[1:, 3, 4] = bad
    images = {"images_a": video(0), "images_b": video(1)} | {name: broken}
    with pytest.raises(InputError, match=f"PSA Compare, input {name}: .*in frames 1-2"):
        compare_images(**images, name_a="a", name_b="b", difference_gain=4.0, lpips=False)


def test_a_gain_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="PSA Compare, input difference_gain: nan"):
        compare_images(video(0), video(1), "a", "b", float("nan"), False)


def shown_as(kind, pictures):
    """The same pictures in another form in which an IMAGE may come."""
    if kind == "half":
        return pictures.half()
    if kind == "beyond":
        return torch.where(pictures > 0.9, pictures + 0.2, torch.where(pictures < 0.1, pictures - 0.2, pictures))
    return torch.cat([pictures, torch.rand(*pictures.shape[:-1], 1)], -1)  # with transparency


@pytest.mark.parametrize("kind", ["half", "beyond", "transparent"])
def test_figures_are_those_of_what_a_picture_can_show(kind):
    a, b = (((video(seed) * 3 - 1).clamp(0, 1) * 2).round() / 2 for seed in (0, 1))  # 0, 0.5 and 1
    expected = compare(a, b)
    found = compare_images(shown_as(kind, a), shown_as(kind, b), "a", "b", 4.0, False)
    assert found[1] == pytest.approx(expected.psnr)
    assert found[2] == pytest.approx(expected.ssim)


@pytest.mark.parametrize("other", [1, 3, 4])
def test_grey_pictures_are_compared_with_all_others(other):
    grey = video(0)[..., :1]
    found = compare_images(grey, video(1)[..., :1].expand(-1, -1, -1, other), "a", "b", 4.0, False)
    images = (x[..., 0].double().numpy() for x in (grey, video(1)))
    assert found[1] == pytest.approx(peak_signal_noise_ratio(*images, data_range=1.0))
    assert found[0].shape == (3, 33 + 28, 3 * 48, 3)
