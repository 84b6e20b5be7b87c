"""Several models, GPUs or threads at once: each keeps to itself."""

import threading

import pytest
import torch

from comfyui_psa.patching.override import PSAOverride
from comfyui_psa.patching.patch import patch_model

from .core_nodes import on_two_devices
from .patched import FULL, PATCH, PLAIN, distance, report, sparse_calls


def test_two_models_at_once(model, sample, tiny_wan):
    # The second model is sampled in the middle of the first one's run, as a callback or a preview may do.
    other = patch_model(tiny_wan.load("animate"), **PATCH)
    psa = patch_model(model, **PATCH)
    alone, other_alone = sample(psa, steps=4), sample(other, steps=2, size=(1, 16, 4, 32, 32))
    inner = []

    def in_between(step, *_):
        if step == 1:
            inner.append(sample(other, steps=2, size=(1, 16, 4, 32, 32)))

    assert torch.equal(sample(psa, steps=4, callback=in_between), alone)
    assert torch.equal(inner[0], other_alone)
    assert sparse_calls(psa) == [0, 2, 2, 2]
    assert sparse_calls(other) == [0, 5]


@pytest.mark.parametrize("before", [True, False])
def test_two_gpus(model, sample, tiny_wan, before, monkeypatch):
    from comfyui_psa.sampling import self_attention

    threads, at_once = set(), threading.Barrier(2, timeout=60)
    real = self_attention.pyramid_sparse_attention

    def attention(*args, **kwargs):
        threads.add(threading.get_ident())
        at_once.wait()  # both are inside the same layer of the same step
        return real(*args, **kwargs)

    arguments = {"cfg": 5.0, "negative": tiny_wan.conditioning(seed=4), "steps": 4}
    one = patch_model(model, **PATCH)
    expected, stock = sample(one, **arguments), sample(on_two_devices(model, tiny_wan), **arguments)
    assert distance(stock, sample(model, **arguments)) < 1e-5
    shown = []
    patch = PATCH | {"on_step": shown.append}
    two = (
        on_two_devices(patch_model(model, **patch), tiny_wan)
        if before
        else patch_model(on_two_devices(model, tiny_wan), **patch)
    )
    with monkeypatch.context() as watching:
        watching.setattr(self_attention, "pyramid_sparse_attention", attention)
        out = sample(two, **arguments)
    assert len(threads) == 2
    assert distance(out, expected) < 1e-5
    assert sparse_calls(one) == [0, 2, 2, 2]
    assert sparse_calls(two) == [0, 4, 4, 4]
    assert report(two)["mean_sparsity"] == pytest.approx(report(one)["mean_sparsity"], abs=1e-4)
    assert report(two)["fallbacks"] == []
    assert [figures["step"] for figures in shown] == [0, 1, 2, 3]


def test_a_failure_on_one_of_two_gpus_is_its_own(model, sample, tiny_wan, monkeypatch):
    from comfyui_psa.sampling import self_attention

    heads, here = {"cpu": [], "cpu:0": []}, threading.local()
    real, real_sparse = self_attention.pyramid_sparse_attention, PSAOverride._sparse

    def attempt(*args, **kwargs):
        here.device = str(kwargs["transformer_options"]["multigpu_thread_device"])
        return real_sparse(*args, **kwargs)

    def attention(q, *args, **kwargs):
        heads[here.device].append(q.shape[1])
        if here.device == "cpu:0" and q.shape[1] > 1:
            raise torch.OutOfMemoryError("full")
        return real(q, *args, **kwargs)

    monkeypatch.setattr(PSAOverride, "_sparse", attempt)
    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    psa = patch_model(on_two_devices(model, tiny_wan), **PLAIN | {"start_percent": 0.0})
    assert torch.isfinite(sample(psa, cfg=5.0, negative=tiny_wan.conditioning(seed=4), steps=3)).all()
    assert heads["cpu:0"] == [2, *[1] * 12], "the one whose memory is full goes on in two groups"
    assert heads["cpu"] == [2] * 6, "the other knows nothing of it"
    assert sparse_calls(psa) == [4, 4, 4]


def test_two_clones_in_two_threads(model, sample, tiny_wan):
    psa = patch_model(model, **PATCH)
    # A model that is being sampled holds its state, so each thread has one of its own; the patch is what they share.
    clones = [psa.clone(), psa.clone(model_override=(tiny_wan.load("t2v").model, ({}, {}, {}, set())))]
    sizes = [(1, 16, 3, 32, 32), (1, 16, 2, 48, 32)]
    expected = [sample(psa, steps=4, size=size) for size in sizes]
    outputs = [None, None]

    def work(number):
        outputs[number] = sample(clones[number], steps=4, size=sizes[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(out, wanted)
    assert sparse_calls(psa) == [0, 2, 2, 2]


def test_two_models_of_one_guider(model, tiny_wan):
    """The core computes both prompts with the options of the first model."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    other, noise = tiny_wan.load("t2v", scale=0.04), tiny_wan.normal(*tiny_wan.SIZE, seed=1)

    def sample(one, two):
        prompts = tiny_wan.conditioning(), tiny_wan.conditioning(seed=4)
        (guider,) = DualModelGuider.execute(one, prompts[0], 3.0, two, prompts[1]).args
        sigmas = comfy.samplers.calculate_sigmas(one.get_model_object("model_sampling"), "simple", 4)
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=1)

    stock, full = sample(model, other), FULL | {"correction": "off"}
    psa, beside = patch_model(model, **full), patch_model(other, **full)
    assert distance(sample(psa, other), stock) < 1e-4
    assert sparse_calls(psa) == [4] * 4, "two blocks of either model"
    assert torch.equal(sample(model, beside), stock)
    assert not report(beside)
