"""The sampler among ComfyUI's: parts of schedules, masks, other samplers on the same model, and what it refuses.

That it equals diffusers is in tests/parity.
"""

import pytest
import torch

from comfyui_psa.choices.errors import InputError
from comfyui_psa.cogvideox.corrections import correct_model, is_corrected
from comfyui_psa.cogvideox.sampler import make_sampler
from comfyui_psa.cogvideox.schedule import trailing_sigmas

SIZE = (1, 16, 3, 12, 20)


@pytest.fixture(scope="module")
def native(comfyui, tiny):
    """A tiny 5B as ComfyUI's own loader has it."""
    import comfy.sd

    from comfyui_psa.loading.names import COGVIDEOX, to_native

    state = {to_native(key, COGVIDEOX): value for key, value in tiny.transformer("5b").state_dict().items()}
    return comfy.sd.load_diffusion_model_state_dict(state)


@pytest.fixture(scope="module")
def model(native):
    return correct_model(native)


@pytest.fixture
def sample(tiny):
    def run(model, sigmas, solver="dpm", noise=None, latent=None, seed=7, mask=None, callback=None):
        import comfy.sample

        noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)) if noise is None else noise
        latent = torch.zeros(SIZE) if latent is None else latent
        conds = [[tiny.text(), {}]], [[tiny.text(6), {}]]
        sampler = make_sampler(solver)
        return comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, *conds, latent, noise_mask=mask, seed=seed, callback=callback,
            disable_pbar=True,
        )  # fmt: skip

    return run


def relative_error(out, expected):
    return float((out - expected).norm() / expected.norm())


def test_a_seed_decides_the_result_and_no_global_state_does(model, sample):
    sigmas = trailing_sigmas(model, 4, 1.0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(model, sigmas)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(sample(model, sigmas), first)
    assert relative_error(sample(model, sigmas, seed=8), first) > 0.01
    assert torch.equal(sample(model, sigmas, "ddim"), sample(model, sigmas, "ddim", seed=8)), "ddim adds no noise"


def test_a_schedule_in_two_parts_gives_the_same_video(model, sample):
    sigmas = trailing_sigmas(model, 6, 1.0)
    whole = sample(model, sigmas, "ddim")
    half = sample(model, sigmas[:4], "ddim")
    assert relative_error(sample(model, sigmas[3:], "ddim", noise=torch.zeros(SIZE), latent=half), whole) < 1e-5


def test_a_schedule_of_the_core_works_as_well(model, sample):
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    simple = comfy.samplers.calculate_sigmas(sampling, "simple", 4)
    assert torch.equal(sample(model, simple), sample(model, trailing_sigmas(model, 4, 1.0)))
    for name in ("karras", "beta", "normal"):
        out = sample(model, comfy.samplers.calculate_sigmas(sampling, name, 12))
        assert torch.isfinite(out).all()


def test_ksampler_is_right_on_a_corrected_model_and_wrong_on_a_native_one(native, model, sample, tiny):
    import comfy.sample

    noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    expected = sample(model, trailing_sigmas(model, 10, 1.0), "ddim")

    def ksampler(which):
        conds = [[tiny.text(), {}]], [[tiny.text(6), {}]]
        return comfy.sample.sample(
            which, noise, 10, 1.0, "euler", "simple", *conds, torch.zeros(SIZE), seed=7, disable_pbar=True
        )

    assert relative_error(ksampler(model), expected) < 1e-3
    assert relative_error(ksampler(native), expected) > 0.1


def test_what_a_mask_protects_stays(model, sample):
    latent = torch.randn(SIZE, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(1, 1, *SIZE[2:])
    mask[..., :10] = 1
    out = sample(model, trailing_sigmas(model, 4, 1.0), latent=latent, mask=mask)
    torch.testing.assert_close(out[..., 10:], latent[..., 10:], rtol=1e-3, atol=1e-3)
    assert relative_error(out[..., :10], latent[..., :10]) > 0.1


def test_every_step_calls_back_with_a_clean_latent(model, sample):
    seen = []
    out = sample(model, trailing_sigmas(model, 4, 1.0), callback=lambda *call: seen.append(call))
    assert [(step, steps) for step, _, _, steps in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    scale = model.model.latent_format.scale_factor
    assert relative_error(seen[-1][1] / scale, out) < 1e-5, "the last clean latent is the result"


def test_a_model_that_is_not_corrected_is_refused_and_told_what_to_do(native, sample, model):
    words = (
        r"^PSA CogVideoX Sampler, input model: .*another kind of sampling.* Put PSA CogVideoX Fix before the sampler\.$"
    )
    with pytest.raises(InputError, match=words):
        sample(native, trailing_sigmas(model, 4, 1.0))


def test_an_unknown_solver_is_refused():
    with pytest.raises(InputError, match="PSA CogVideoX Sampler, input solver: 'euler' was given; allowed: dpm, ddim"):
        make_sampler("euler")


def test_corrections_leave_the_model_that_came_in_alone_and_unload_without_a_trace(native, model, sample):
    network = native.model.diffusion_model
    before = dict(vars(network)), type(network.patch_embed), native.model.model_sampling
    rotary = network._get_rotary_emb(6, 10, 3, "cpu")
    sample(model, trailing_sigmas(model, 2, 1.0))
    model.detach()
    assert not is_corrected(native)
    assert native.object_patches == {}
    assert (type(network.patch_embed), native.model.model_sampling) == before[1:]
    assert torch.equal(network._get_rotary_emb(6, 10, 3, "cpu")[0], rotary[0])


def test_correcting_twice_is_correcting_once(model):
    again = correct_model(model)
    assert again.object_patches == model.object_patches
    assert is_corrected(again)


def test_another_model_is_refused(native):
    class Other:
        class model_config:
            unet_config = {"image_model": "flux"}

    other = native.clone()
    other.model = Other()
    with pytest.raises(InputError, match="PSA CogVideoX Fix, input model: 'flux' was given; allowed: a CogVideoX"):
        correct_model(other)
