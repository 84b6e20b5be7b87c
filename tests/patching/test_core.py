"""What `patching/core.py` assumes about ComfyUI, one test each: when a newer core breaks one, its name says which."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from comfyui_psa.patching import core


@pytest.fixture
def watched(model, tiny_wan):
    """watched(...) samples as `tiny.sample` does and returns what the two wrappers saw."""

    def run(model=model, **arguments):
        seen = {"guider": [], "calls": [], "model": model.clone()}

        def sampling(executor, *args, **kwargs):
            options = core.run_options(executor.class_obj)
            options["psa_test"] = "inherited"
            seen["guider"].append((executor.class_obj, core.percent_to_sigma(executor.class_obj, 0.25)))
            return executor(*args, **kwargs)

        def before_call(network, x, context, options, conds):
            seen["calls"].append((network, x, context, options))

        core.add_wrappers(seen["model"], "psa_test", sampling=sampling, before_call=before_call)
        tiny_wan.sample(seen["model"], **arguments)
        return seen

    return run


def test_a_model_says_its_family_and_variant(model):
    config = core.unet_config(model)
    assert (config["image_model"], config["model_type"], config["dim"]) == ("wan2.1", "t2v", 256)


def test_the_autoregressive_variant_has_a_class_of_its_own(comfyui):
    import comfy.model_base

    assert issubclass(comfy.model_base.WAN21_CausalAR, comfy.model_base.WAN21)


def test_the_network_has_blocks_and_a_patch_size(model):
    network = core.network_of(model)
    assert len(network.blocks) == 2
    assert tuple(network.patch_size) == (1, 2, 2)


def test_an_override_on_a_clone_leaves_the_model_alone(model):
    clone = model.clone()
    core.set_override(clone, print)
    assert core.get_override(clone) is print
    assert core.get_override(model) is None
    core.set_override(clone, None)
    assert core.OVERRIDE_KEY not in clone.model_options["transformer_options"]


def test_every_attention_asks_the_override_and_func_is_the_dense_backend(model, tiny_wan):
    shapes = []

    def override(func, q, k, v, heads, *args, **kwargs):
        shapes.append((q.shape[1], k.shape[1], heads, core.block_index(kwargs["transformer_options"])))
        out = func(q, k, v, heads, *args, **kwargs)
        assert out.shape == q.shape
        return out

    overridden = model.clone()
    core.set_override(overridden, override)
    assert torch.equal(tiny_wan.sample(overridden), tiny_wan.sample(model))
    assert shapes == [(768, 768, 2, 0), (768, 13, 2, 0), (768, 768, 2, 1), (768, 13, 2, 1)]


def test_attention_functions_take_the_arguments_that_psa_reads(comfyui):
    from comfy.ldm.modules.attention import attention_pytorch

    names = list(inspect.signature(attention_pytorch).parameters)
    assert names[:5] == ["q", "k", "v", "heads", "mask"]
    assert {"skip_reshape", "skip_output_reshape"} <= set(names)


def test_the_wrappers_get_guider_network_and_latent(model, watched):
    seen = watched(steps=2)
    assert [guider.model_patcher for guider, _ in seen["guider"]] == [seen["model"]]
    assert {network for network, *_ in seen["calls"]} == {core.network_of(model)}
    assert [tuple(x.shape) for _, x, _, _ in seen["calls"]] == [(1, 16, 3, 32, 32)] * 2
    assert [tuple(context.shape) for _, _, context, _ in seen["calls"]] == [(1, 13, 4096)] * 2


def test_removed_wrappers_are_gone(model, tiny_wan):
    called = []
    clone = model.clone()
    core.add_wrappers(clone, "psa_test", sampling=called.append, before_call=lambda *_: called.append(1))
    core.remove_wrappers(clone, "psa_test")
    tiny_wan.sample(clone)
    assert called == []


def test_options_of_a_run_reach_every_call_and_end_with_it(watched):
    seen = watched(steps=2, cfg=5.0)
    assert [options["psa_test"] for *_, options in seen["calls"]] == ["inherited"] * len(seen["calls"])
    assert len({id(options) for *_, options in seen["calls"]}) == len(seen["calls"]), "each forward has its own"
    assert "psa_test" not in seen["model"].model_options["transformer_options"]


def test_percent_is_read_from_the_schedule_that_is_sampled(model, watched):
    import comfy_extras.nodes_model_advanced

    shifted = comfy_extras.nodes_model_advanced.ModelSamplingSD3().patch(model, shift=3.0)[0]
    ((_, sigma),) = watched(shifted)["guider"]
    assert sigma == pytest.approx(3.0 * 0.75 / (1 + 2.0 * 0.75))
    ((_, sigma),) = watched()["guider"]
    assert sigma == pytest.approx(8.0 * 0.75 / (1 + 7.0 * 0.75)), "Wan's own shift is 8"


def test_sigma_and_step_of_a_call(watched):
    calls = watched(steps=4, sampler="euler")["calls"]
    sigmas = [core.current_sigma(options) for *_, options in calls]
    assert sigmas[0] == pytest.approx(1.0)
    assert sigmas == sorted(sigmas, reverse=True)
    for *_, options in calls:
        assert core.schedule(options) == pytest.approx([*sigmas, 0.0])
    assert core.schedule({}) is None


def test_what_tells_the_calls_of_a_step_apart(watched, tiny_wan):
    mask = torch.zeros(1, 32, 32)
    mask[:, :, :16] = 1.0
    import comfy.hooks

    left = comfy.hooks.set_conds_props([tiny_wan.conditioning()], 1.0, "default", mask=mask)[0]
    right = comfy.hooks.set_conds_props([tiny_wan.conditioning(text=21, seed=8)], 1.0, "default", mask=1 - mask)[0]
    calls = watched(steps=2, positive=left + right)["calls"]
    told = [core.prompts_of(options, len(x)) for _, x, _, options in calls]
    assert len(told) == 4, "prompts of two lengths are two calls"
    assert told[:2] == told[2:]
    assert told[0] != told[1]


def test_sampling_is_told_its_noise_levels(model, tiny_wan):
    clone, seen = model.clone(), []

    def sampling(executor, *args, **kwargs):
        seen.append(core.run_sigmas(args, kwargs))
        return executor(*args, **kwargs)

    core.add_wrappers(clone, "psa_test", sampling=sampling, before_call=lambda *_: None)
    tiny_wan.sample(clone, steps=4)
    (sigmas,) = seen
    assert len(sigmas) == 5
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)


def test_calls_on_several_gpus_say_which(model, watched, tiny_wan):
    # The CPU under another name plays the second GPU.
    both = model.clone()
    both.cached_patcher_init = (tiny_wan.load, ("t2v",))
    second = both.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    second.is_multigpu_base_clone = True
    both.set_additional_models("multigpu", [second])
    arguments = {"steps": 1, "cfg": 5.0, "negative": tiny_wan.conditioning(seed=4)}
    workers = [core.worker_of(options) for *_, options in watched(both, **arguments)["calls"]]
    assert sorted(map(str, workers)) == ["cpu", "cpu:0"]
    assert [core.worker_of(options) for *_, options in watched(**arguments)["calls"]] == [None]
    assert core.is_on_several_gpus(both)
    assert not core.is_on_several_gpus(model)


def test_out_of_memory_is_recognised(comfyui):
    assert core.is_out_of_memory(torch.OutOfMemoryError("full"))
    assert not core.is_out_of_memory(RuntimeError("something else"))
    core.free_cached_memory()


def test_an_interrupt_is_no_exception_that_a_fallback_could_catch(comfyui):
    import comfy.model_management

    assert not issubclass(comfy.model_management.InterruptProcessingException, Exception)


def calls_of(model, tiny, kind, **inputs):
    """What PSA is told before a forward, and the options of its attention calls."""
    seen, sizes, options = [], [], []

    def override(func, *args, **kwargs):
        options.append(dict(kwargs["transformer_options"]))
        return func(*args, **kwargs)

    def sampling(executor, *args, **kwargs):
        sizes.append(core.latent_size(args, kwargs))
        return executor(*args, **kwargs)

    clone = model.clone()
    core.set_override(clone, override)
    core.add_wrappers(clone, "psa_test", sampling=sampling, before_call=lambda _, x, *__: seen.append(x))
    tiny.sample(clone, kind, **inputs)
    return seen, sizes, options


def test_two_kinds_of_blocks_count_from_zero_and_say_which_they_are(tiny_families):
    *_, options = calls_of(tiny_families.load("hunyuan"), tiny_families, "hunyuan")
    named = [one for one in options if "block_index" in one]
    assert [(one["block_type"], one["block_index"]) for one in named] == [
        ("double", 0), ("double", 1), ("single", 0), ("single", 1)
    ]  # fmt: skip
    assert [core.block_index(one, {"single": 2}) for one in named] == [0, 1, 2, 3]


def test_the_video_comes_first_in_a_latent_that_is_packed(tiny_families):
    kind, size = "ltx 2", (1, 16, 3, 9, 10)
    noise = tiny_families.normal(*size, seed=1)
    (x,), sizes, _ = calls_of(tiny_families.load(kind), tiny_families, kind, size=size, noise=noise)
    assert sizes == [(3, 9, 10)]
    assert x.shape == size
    assert torch.allclose(x, noise)  # the first step begins with noise alone


def test_the_latent_format_knows_whether_there_is_a_time_axis(model, comfyui):
    import comfy.latent_formats

    assert core.is_video(model)
    for name, expected in (("Flux", False), ("SD15", False), ("LTXAV", True), ("StableAudio1", False)):
        model = SimpleNamespace(model=SimpleNamespace(latent_format=getattr(comfy.latent_formats, name)()))
        assert core.is_video(model) is expected


@pytest.mark.parametrize("kind", ["mochi", "minimax h3", "ltx 2", "hunyuan", "cosmos", "kandinsky 5 lite"])
def test_every_forward_can_be_wrapped(tiny_families, kind):
    """Mochi's network asks for no wrappers."""
    model, seen = tiny_families.load(kind).clone(), []

    def wrapper(executor, x, timestep, context, *args, **kwargs):
        seen.append(core.options_of(args, kwargs)["sigmas"])
        executor(x, timestep, context, *args, **kwargs)
        return executor(x, timestep, context, *args, **kwargs)

    stock = tiny_families.sample(model, kind, steps=2)
    wrapped = model.clone()
    core.wrap_forward(wrapped, "psa_test", wrapper)
    assert torch.equal(tiny_families.sample(wrapped, kind, steps=2), stock)
    assert len(seen) == 2
    assert torch.equal(tiny_families.sample(model, kind, steps=2), stock)
    assert len(seen) == 2, "the model itself stays as it was"


def test_a_replaced_forward_can_be_wrapped(model, tiny_wan):
    replaced, seen = model.clone(), []
    forward = core.network_of(model).forward
    replaced.add_object_patch("diffusion_model.forward", lambda *args, **kwargs: forward(*args, **kwargs))
    core.wrap_forward(
        replaced, "psa_test", lambda executor, *args, **kwargs: seen.append(1) or executor(*args, **kwargs)
    )
    stock = tiny_wan.sample(model)
    assert torch.equal(tiny_wan.sample(replaced), stock)
    assert seen == [1]
    assert core.replaced_forwards(core.network_of(model)) == ["forward"]
    assert torch.equal(tiny_wan.sample(model), stock)
    assert core.replaced_forwards(core.network_of(model)) == [], "it has got its own forward back"
