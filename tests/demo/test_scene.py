"""The vocabulary, its conditioning and the clips agree with each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comfyui_psa.demo.scene import (
    ATTRIBUTES,
    DIRECTIONS,
    SHAPES,
    TOKEN_COUNT,
    Background,
    Scene,
    SceneObject,
    conditioning,
    conditioning_from_indices,
    describe,
    random_indices,
    scene_from_indices,
    scene_to_indices,
)
from comfyui_psa.workshop.training.clips import indices_of, render, sample_parameters
from comfyui_psa.workshop.training.latents import fit_basis, from_vae_space, to_vae_space


def test_every_word_has_its_own_dimension():
    used = []
    for token, (_, _, words) in enumerate(ATTRIBUTES):
        for number in range(len(words)):
            indices = torch.zeros(1, TOKEN_COUNT, dtype=torch.long)
            indices[0, token] = number
            vector = conditioning_from_indices(indices)[0, token]
            assert int((vector != 0).sum()) == 1
            used.append(int(vector.argmax()))
    assert len(set(used)) == len(used) == sum(len(words) for _, _, words in ATTRIBUTES)


def test_scenes_round_trip_and_unknown_words_are_named():
    for row in random_indices(20, torch.Generator().manual_seed(0)).tolist():
        assert scene_to_indices(scene_from_indices(row)) == row
    with pytest.raises(ValueError, match="second colour: 'mauve'"):
        conditioning([Scene(second=SceneObject(colour="mauve"))])


def test_description_says_what_is_there():
    text = describe(Scene(first=SceneObject("star", "yellow", "large", "dots", "up-left"), background=Background()))
    assert "large dotted yellow star moving up-left" in text
    assert "grey clouds drifting left" in text


def _render(scene: Scene, seed: int, frames: int = 33, side: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return render(sample_parameters(indices_of([scene]), generator), frames, side, side)


def test_clips_are_deterministic_and_in_range():
    one, two = _render(Scene(), 5), _render(Scene(), 5)
    assert torch.equal(one, two)
    assert not torch.equal(one, _render(Scene(), 6))
    assert one.shape == (1, 3, 33, 48, 48)
    assert one.abs().max() <= 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_objects_move_the_named_way(direction):
    # Red and cyan share no channel, so the excess of red over the others is the first object alone.
    first = SceneObject("circle", "red", "medium", "plain", direction)
    second = SceneObject("square", "cyan", "small", "plain", "still")
    clip = _render(Scene(first, second, Background("clouds", "navy", "still")), 11, side=64)
    red = (clip[0, 0] - clip[0, 2]).clamp_min(0) * (clip[0, 0] > 0.5)
    axis = torch.arange(64.0)
    mass = red.sum((1, 2))
    x = (red.sum(1) @ axis / mass)[[0, -1]].diff().item()
    y = (red.sum(2) @ axis / mass)[[0, -1]].diff().item()
    for moved, plus, minus in ((x, "right", "left"), (y, "down", "up")):
        if plus in direction:
            assert moved > 8
        elif minus in direction:
            assert moved < -8
        else:
            assert abs(moved) < 1


def test_shapes_differ_in_outline():
    scenes = [Scene(first=SceneObject(shape, "white", "large", "plain", "still")) for shape in SHAPES]
    clips = torch.cat([_render(scene, 3, frames=1) for scene in scenes])
    bright = (clips.amin(1) > 0.5).float().flatten(1)
    overlap = bright @ bright.mT / (bright.sum(1)[:, None] + bright.sum(1) - bright @ bright.mT)
    assert bright.sum(1).min() > 60
    assert (overlap - torch.eye(len(SHAPES))).max() < 0.9


def test_a_crop_is_a_part_of_the_frame():
    scene = replace(Scene(), background=Background("waves", "brown", "down"))
    parameters = sample_parameters(indices_of([scene]), torch.Generator().manual_seed(1))
    whole = render(parameters, 9, 64, 64)
    origin = torch.tensor([[16 / 64, 8 / 64]])
    part = render(parameters, 5, 32, 32, pixel=1 / 64, origin=origin, first_frame=torch.tensor([4.0]))
    torch.testing.assert_close(part, whole[:, :, 4:, 8:40, 16:48], rtol=0, atol=1e-4)


def test_latents_have_the_wan_geometry_and_unit_scale():
    basis = fit_basis("cpu", clips=16, side=64)
    generator = torch.Generator().manual_seed(0)
    clips = render(sample_parameters(random_indices(4, generator), generator), 33, 128, 128)
    latents = basis.encode(clips)
    assert latents.shape == (4, 16, 9, 16, 16)
    assert 0.5 < latents.square().mean().sqrt() < 2
    torch.testing.assert_close(from_vae_space(to_vae_space(latents)), latents, rtol=1e-4, atol=1e-5)
