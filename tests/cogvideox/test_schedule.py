"""The schedule against diffusers, for every number of steps; and parts of schedules."""

import pytest
import torch

from comfyui_psa.choices.errors import InputError
from comfyui_psa.cogvideox.schedule import make_sampling, plan_walk, table_alphas, trailing_sigmas, trailing_timesteps
from comfyui_psa.cogvideox.variant import find_variant

FIVE_B = find_variant({"num_attention_heads": 48})
TWO_B = find_variant({"num_attention_heads": 30})


class Model:
    """As much of a ComfyUI MODEL as a schedule looks at."""

    def __init__(self, sampling):
        self.model = self.clone = self
        self.model_options = {}
        self.sampling = sampling

    def get_model_object(self, name):
        assert name == "model_sampling"
        return self.sampling


@pytest.fixture(scope="module")
def model(comfyui):
    return Model(make_sampling(FIVE_B.schedule, None))


def test_the_variants_have_their_schedules(comfyui, tiny):
    for variant, kind in ((FIVE_B, "5b"), (TWO_B, "2b")):
        alphas = table_alphas(make_sampling(variant.schedule, None))
        expected = tiny.scheduler(kind, "dpm").alphas_cumprod.double()
        torch.testing.assert_close(alphas, expected, rtol=1e-6, atol=0)
        assert alphas[-1] == expected[-1] == 0, "pure noise, exactly"


def test_the_5b_schedule_is_the_cores_own(comfyui):
    import comfy.model_sampling

    class Settings:
        sampling_settings = {"linear_start": 0.00085, "linear_end": 0.012, "beta_schedule": "linear", "zsnr": True}

    core = comfy.model_sampling.ModelSamplingDiscrete(Settings())
    torch.testing.assert_close(make_sampling(FIVE_B.schedule, None).sigmas, core.sigmas, rtol=1e-5, atol=0)


def test_sigmas_are_those_of_the_trailing_timesteps_for_every_number_of_steps(model, tiny):
    scheduler = tiny.scheduler("5b", "dpm")
    table = model.sampling.sigmas
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        sigmas = trailing_sigmas(model, steps, 1.0)
        assert sigmas.shape == (steps + 1,)
        assert sigmas[-1] == 0
        timesteps = scheduler.timesteps[:steps]
        assert timesteps.min() >= 0
        assert torch.equal(sigmas[:-1], table[timesteps])
        assert steps > 500 or (sigmas.diff() < 0).all(), "no level comes twice"


def test_the_released_4_steps(model):
    assert trailing_timesteps(4).tolist() == [999, 749, 499, 249]


def test_denoise_takes_the_last_steps_of_a_longer_schedule(model):
    assert torch.equal(trailing_sigmas(model, 5, 0.5), trailing_sigmas(model, 10, 1.0)[-6:])
    assert torch.equal(trailing_sigmas(model, 3, 0.4), trailing_sigmas(model, 7, 1.0)[-4:])
    assert trailing_sigmas(model, 5, 0.0).shape == (0,)


def test_more_steps_than_there_are_levels_are_refused(model):
    with pytest.raises(InputError, match=r"PSA CogVideoX Sigmas, input steps: 600 .* denoise 0\.5 makes them 1200"):
        trailing_sigmas(model, 600, 0.5)


@pytest.mark.parametrize("kind", [None, "ModelSamplingDiscreteFlow", "ModelSamplingDiscrete", "StableCascadeSampling"])
def test_the_noise_levels_of_another_model_are_refused(comfyui, kind):
    import comfy.model_sampling

    sampling = object() if kind is None else getattr(comfy.model_sampling, kind)()
    with pytest.raises(InputError, match=r"PSA CogVideoX Sigmas, input model: .* allowed: a CogVideoX model"):
        trailing_sigmas(Model(sampling), 4, 1.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 30, 50, 333])
def test_trailing_steps_and_parts_of_them_are_walked_as_diffusers_does(model, steps):
    sigmas = trailing_sigmas(model, steps, 1.0)
    whole = plan_walk(model.sampling, sigmas)
    assert whole.steps == steps
    assert whole.timesteps == trailing_timesteps(steps).tolist()
    assert whole.sigmas == pytest.approx(sigmas.tolist())
    if steps >= 4:
        first, second = plan_walk(model.sampling, sigmas[:3]), plan_walk(model.sampling, sigmas[2:])
        assert first.steps == second.steps == steps
        assert first.timesteps + second.timesteps == whole.timesteps


def test_a_schedule_that_goes_up_is_refused(model):
    with pytest.raises(InputError, match="PSA CogVideoX Sampler, input sigmas: 'a schedule that goes up'"):
        plan_walk(model.sampling, model.sampling.sigmas[[500, 700, 300]])


def test_any_other_schedule_goes_from_level_to_level(model):
    table = model.sampling.sigmas
    walk = plan_walk(model.sampling, torch.cat([table[[900, 400, 390]], torch.zeros(1)]))
    alphas = table_alphas(model.sampling)
    assert walk.timesteps == [2, 1, 0]
    assert walk.steps == len(walk.alphas) == 3
    assert torch.equal(walk.alphas, alphas[[390, 400, 900]])
    part = plan_walk(model.sampling, table[[900, 400, 390]])
    assert part.timesteps == [2, 1]
    assert part.sigmas == pytest.approx(table[[900, 400, 390]].tolist())
