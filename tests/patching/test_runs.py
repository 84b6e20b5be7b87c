"""Whole runs as users make them: sizes, steps, parts of the video, caches, interrupts; and true reports."""

import copy
import gc
import itertools
import json
import pickle
import weakref

import pytest
import torch

from comfyui_psa.patching import core
from comfyui_psa.patching.override import RUN_KEY, PSAOverride
from comfyui_psa.patching.patch import KEY, patch_model
from comfyui_psa.reports.show import show_report
from comfyui_psa.sampling import self_attention
from comfyui_psa.sampling.run import Run

PATCH = {"sparsity": 0.6, "preset": "auto", "mode": "topk", "min_tokens": 0, "start_percent": 0.25, "end_percent": 1.0}
PLAIN = PATCH | {"correction": "off"}


@pytest.fixture(scope="module")
def model(tiny_wan):
    return tiny_wan.load("t2v")


@pytest.fixture
def sample(tiny_wan):
    return tiny_wan.sample


def report(model):
    return model.get_attachment(KEY).report


def kinds(model):
    return [step["kind"] for step in report(model)["steps"]]


def sparse_calls(model):
    return [step["sparse_calls"] for step in report(model)["steps"]]


class Recorder:
    """The kernels, watched: what came in and what came out of every call."""

    def __init__(self, monkeypatch):
        self.given, self.results, self.configs = [], [], []
        genuine = self_attention.pyramid_sparse_attention

        def attention(q, k, v, config, **kwargs):
            self.given.append(kwargs["lists"])
            self.configs.append(config)
            self.results.append(genuine(q, k, v, config, **kwargs))
            return self.results[-1]

        monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)


def sample_custom(tiny_wan, model, sigmas, sampler="euler"):
    import comfy.sample
    import comfy.samplers

    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    noise, conds = tiny_wan.normal(*tiny_wan.SIZE, seed=1), tiny_wan.conditioning()
    return comfy.sample.sample_custom(
        model, noise, 1.0, sampler, torch.tensor(sigmas), conds, conds, torch.zeros(tiny_wan.SIZE), seed=1,
        disable_pbar=True,
    )  # fmt: skip


# Sizes, steps and guidance that change from run to run


def test_size_a_then_b_then_a(model, sample, monkeypatch):
    runs = []
    genuine = Run.__init__

    def made(self, *args, **kwargs):
        genuine(self, *args, **kwargs)
        runs.append(weakref.ref(self))

    monkeypatch.setattr(Run, "__init__", made)
    psa = patch_model(model, **PATCH | {"reuse_steps": 2})
    sizes = [(1, 16, 3, 32, 32), (1, 16, 2, 48, 32), (1, 16, 3, 32, 32)]
    outputs = []
    for size in sizes:
        outputs.append(sample(psa, steps=4, size=size))
        assert report(psa)["grid"] == [size[2], size[3] // 2, size[4] // 2]
        gc.collect()
        assert [run() for run in runs] == [None] * len(runs), "nothing of a run outlives it"
    assert torch.equal(outputs[0], outputs[2])


def test_two_samplers_of_other_sizes_and_steps_and_guidance(model, sample):
    psa = patch_model(model, **PATCH)
    for steps, size, cfg in ((4, (1, 16, 3, 32, 32), 1.0), (7, (1, 16, 2, 32, 48), 6.0), (4, (1, 16, 3, 32, 32), 6.0)):
        sample(psa, steps=steps, size=size, cfg=cfg)
        found = report(psa)
        assert (len(found["steps"]), found["grid"]) == (steps, [size[2], size[3] // 2, size[4] // 2])
        dense = sum(step["kind"] == "dense" for step in found["steps"])
        assert kinds(psa) == ["dense"] * dense + ["sparse"] * (steps - dense)
        assert found["fallbacks"] == found["notes"] == []


def test_two_experts_that_share_a_schedule(model, tiny_wan, sample):
    high, low = (patch_model(tiny_wan.load("t2v"), **PATCH | {"start_percent": 0.4}) for _ in range(2))
    latent = sample(high, steps=4, last_step=2, force_full_denoise=False)
    sample(low, steps=4, start_step=2, disable_noise=True, noise=torch.zeros_like(latent), latent=latent)
    assert kinds(high) == ["dense", "dense"]
    assert kinds(low) == ["sparse", "sparse"]
    assert report(low)["steps"][0]["index"] == 0


def lora(scale):
    """Weights of a LoRA on the attention of both blocks."""
    generator = torch.Generator().manual_seed(9)
    weights = {}
    for block, name in itertools.product((0, 1), ("q", "k", "v", "o")):
        prefix = f"diffusion_model.blocks.{block}.self_attn.{name}."
        weights[prefix + "lora_A.weight"] = torch.randn(4, 256, generator=generator) * scale
        weights[prefix + "lora_B.weight"] = torch.randn(256, 4, generator=generator) * scale
    return weights


def test_two_experts_with_one_lora_at_two_strengths(tiny_wan, sample):
    """Wan 2.2: each half has its own strength, and neither knows of the other's."""
    from comfyui_psa.loading.lora import patch_with_lora

    base = tiny_wan.load("t2v")
    both = [patch_with_lora(base, lora(0.05), "one", strength)[0] for strength in (3.0, 1.5)]
    patches = [patch_model(model, **PATCH) for model in both]
    alone = [sample(psa, steps=4) for psa in patches]
    assert not torch.equal(*alone)
    for model, psa, expected in zip(reversed(both), reversed(patches), reversed(alone), strict=True):
        assert torch.equal(sample(psa, steps=4), expected)
        full = patch_model(model, **PATCH | {"sparsity": 0.01, "pyramid": "1: 1.0", "start_percent": 0.0})
        dense = sample(model)
        assert (sample(full) - dense).norm() / dense.norm() < 1e-4
        assert kinds(psa) == ["dense", *["sparse"] * 3]


@pytest.mark.parametrize("loader_first", [True, False])
def test_weight_hooks_after_psa_and_the_lora_loader(model, sample, tiny_wan, loader_first):
    import comfy.hooks

    from comfyui_psa.loading.lora import patch_with_lora

    hooks = comfy.hooks.create_hook_lora(lora(0.08), 1.0, 0.0)
    hooked = comfy.hooks.set_conds_props([tiny_wan.conditioning()], 1.0, "default", hooks=hooks)[0]
    with_lora = patch_with_lora(model, lora(0.05), "one", 1.0)[0]
    if loader_first:
        psa = patch_model(with_lora, **PATCH)
    else:
        psa = patch_with_lora(patch_model(model, **PATCH), lora(0.05), "one", 1.0)[0]
    plain = sample(psa, steps=4)
    out = sample(psa, steps=4, positive=hooked)
    assert not torch.equal(out, plain)
    assert kinds(psa) == ["dense", *["sparse"] * 3]
    assert report(psa)["notes"] == report(psa)["fallbacks"] == []
    assert torch.equal(sample(psa, steps=4), plain), "the hook leaves nothing on the weights"
    full = patch_model(with_lora, **PATCH | {"sparsity": 0.01, "pyramid": "1: 1.0", "start_percent": 0.0})
    dense = sample(with_lora, positive=hooked)
    assert (sample(full, positive=hooked) - dense).norm() / dense.norm() < 1e-4


def test_a_latent_preview_changes_nothing(model, sample):
    import latent_preview
    from comfy.cli_args import args

    method, args.preview_method = args.preview_method, latent_preview.LatentPreviewMethod.Latent2RGB
    try:
        callback = latent_preview.prepare_callback(model, 4)
        psa = patch_model(model, **PATCH)
        assert torch.equal(sample(psa, steps=4, callback=callback), sample(psa, steps=4))
    finally:
        args.preview_method = method


# Steps are counted along the schedule, kept levels by their calls

RESTART = [1.0, 0.8, 0.6, 0.4, 0.8, 0.6, 0.4, 0.8, 0.6, 0.4, 0.2, 0.0]


def longest_use(given):
    """How many calls of one block in a row used the same choice; two blocks, one call each per evaluation."""
    longest = run = 0
    for lists in given[::2]:
        run = 1 if lists is None else run + 1
        longest = max(longest, run)
    return longest


def test_a_restart_schedule_is_walked_along(model, tiny_wan, monkeypatch):
    recorder = Recorder(monkeypatch)
    psa = patch_model(model, **PLAIN | {"reuse_steps": 2, "falling": 0.5, "start_percent": 0.0})
    sample_custom(tiny_wan, psa, RESTART)
    assert [step["index"] for step in report(psa)["steps"]] == list(range(11))
    assert kinds(psa) == ["sparse"] * 11
    assert longest_use(recorder.given) == 2
    densities = [1 - config.sparsity for config in recorder.configs]
    assert sum(densities) / len(densities) == pytest.approx(0.4)
    assert densities == sorted(densities, reverse=True)


def test_a_schedule_without_a_step_is_no_fault_of_a_cache(model, tiny_wan, caplog):
    """The first half of a schedule that was split at its first step. The report stays that of the run before."""
    psa = patch_model(model, **PATCH)
    assert sample_custom(tiny_wan, psa, [1.0]).shape == tiny_wan.SIZE
    assert report(psa) is None
    assert caplog.text == ""
    sample_custom(tiny_wan, psa, [1.0, 0.5, 0.0])
    before = report(psa)
    sample_custom(tiny_wan, psa, [0.5])
    assert report(psa) == before


@pytest.mark.parametrize("reuse_steps", [2, 6])
def test_levels_that_are_kept_while_the_density_falls_are_those_of_the_mean_of_their_steps(model, sample, reuse_steps):
    """Those of the first of them would be too dense for the others, and save less than the slider says."""
    changes = {"sparsity": 0.7, "falling": 0.5, "reuse_steps": reuse_steps, "start_percent": 0.0}
    psa = patch_model(model, **PLAIN | changes)
    sample(psa, steps=6, size=(1, 16, 2, 64, 64))
    assert report(psa)["mean_sparsity"] == pytest.approx(0.7, abs=0.015)


def restarting(model, x, sigmas, extra_args=None, callback=None, disable=None, **_):
    """A sampler that goes back twice to a level it has left, which the schedule that ComfyUI knows does not show."""
    ones = x.new_ones([x.shape[0]])
    walk = [*sigmas[:4].tolist(), *sigmas[1:4].tolist(), *sigmas[1:].tolist()]
    for sigma, following in itertools.pairwise(walk):
        denoised = model(x, sigma * ones, **(extra_args or {}))
        x = x + (x - denoised) / max(sigma, 1e-6) * (following - sigma)
    return x


def test_a_restart_that_the_schedule_does_not_show(model, tiny_wan, monkeypatch):
    import comfy.samplers

    recorder = Recorder(monkeypatch)
    psa = patch_model(model, **PLAIN | {"reuse_steps": 2, "falling": 0.5, "start_percent": 0.0})
    sampler = comfy.samplers.KSAMPLER(restarting)
    sample_custom(tiny_wan, psa, [1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0], sampler)
    assert longest_use(recorder.given) == 2
    densities = [1 - config.sparsity for config in recorder.configs]
    assert len(densities) == 2 * 12
    assert sum(densities) / len(densities) == pytest.approx(0.4)
    assert set(kinds(psa)) == {"sparse"}


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "seeds_3", "res_multistep", "dpm_fast"])
def test_samplers_that_evaluate_several_times_keep_levels_for_two_calls(model, sample, monkeypatch, sampler):
    recorder = Recorder(monkeypatch)
    psa = patch_model(model, **PLAIN | {"reuse_steps": 2, "falling": 0.5})
    sample(psa, steps=6, sampler=sampler)
    assert longest_use(recorder.given) == 2
    densities = [1 - config.sparsity for config in recorder.configs]
    assert sum(densities) / len(densities) == pytest.approx(0.4, rel=0.06)
    assert report(psa)["notes"] == []
    assert set(kinds(psa)) <= {"dense", "sparse"}


# Parts of the video


def area(tiny_wan, seed, *sizes):
    """A prompt for an area: (height, width, y, x) in latent pixels."""
    return [[tiny_wan.normal(1, 13, 4096, seed=seed), {"area": (3, *sizes[:2], 0, *sizes[2:])}]]


@pytest.mark.parametrize("first", [True, False])
def test_area_prompts(model, sample, tiny_wan, first):
    part = area(tiny_wan, 8, 32, 16, 0, 0)
    whole = tiny_wan.conditioning()
    psa = patch_model(model, **PATCH)
    out = sample(psa, steps=4, positive=part + whole if first else whole + part)
    found = report(psa)
    assert found is not None
    assert found["grid"] == [3, 16, 16]
    assert [entry["grid"] for entry in found["grids"]] == [[3, 16, 16], [3, 16, 8]]
    assert [entry["sparse_calls"] for entry in found["grids"]] == [6, 6]
    assert all(entry["sparsity"] == pytest.approx(0.6, abs=0.05) for entry in found["grids"])
    assert found["level_map"]["grid"] == [3, 16, 16]
    assert len(found["level_map"]["token_levels"]) == 3 * 16 * 16
    maps = psa.get_attachment(KEY).maps
    assert (maps.grid, maps.whole, sorted(maps.blocks)) == ((3, 16, 16), True, [0, 1])
    picture = show_report(psa, {"samples": out}, -1, 0, None)[1]
    assert picture.shape[1] > 600
    json.dumps(found)


def test_kernels_that_fail_at_one_size_leave_the_others_sparse(model, sample, tiny_wan, monkeypatch, caplog):
    genuine, tried = self_attention.pyramid_sparse_attention, []

    def attention(*args, **kwargs):
        tried.append(kwargs["layout"].grid)
        if kwargs["layout"].grid == (3, 16, 8):
            raise RuntimeError("not at this size")
        return genuine(*args, **kwargs)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    psa = patch_model(model, **PATCH)
    sample(psa, steps=4, positive=area(tiny_wan, 8, 32, 16, 0, 0) + tiny_wan.conditioning())
    assert [(entry["grid"], entry["sparse_calls"]) for entry in report(psa)["grids"]] == [
        ([3, 16, 16], 6),
        ([3, 16, 8], 0),
    ]
    assert tried.count((3, 16, 8)) == 1
    ((reason, calls),) = [entry.values() for entry in report(psa)["fallbacks"]]
    assert ("not at this size" in reason, calls) == (True, 6)
    assert caplog.text.count("staying dense") == 1


def test_areas_that_are_all_parts(model, sample, tiny_wan):
    psa = patch_model(model, **PATCH)
    sides = area(tiny_wan, 8, 32, 20, 0, 0) + area(tiny_wan, 9, 32, 12, 0, 20)
    out = sample(psa, steps=4, positive=sides)
    maps = psa.get_attachment(KEY).maps
    assert (maps.grid, maps.whole) == ((3, 16, 10), False), "the largest, and known to be a part"
    from comfyui_psa.reports.show import _maps

    assert "a part of the video of 3x16x10 tokens" in _maps(maps, -1, 0)["where"]
    assert show_report(psa, {"samples": out}, -1, 0, None)[1].shape[1] > 600


def test_windows_of_5_of_13_frames_with_kept_levels(model, sample, monkeypatch):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    seen = []
    genuine = self_attention.pyramid_sparse_attention

    def attention(q, k, v, config, **kwargs):
        result = genuine(q, k, v, config, **kwargs)
        seen.append((kwargs["lists"], result.lists))
        return result

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    psa = patch_model(model, **PLAIN | {"reuse_steps": 2})
    names = ("context_length", "context_overlap", "context_schedule", "context_stride", "closed_loop", "fuse_method")
    inputs = dict(zip(names, (17, 8, "standard_static", 1, False, "pyramid"), strict=True))  # pixels: 5 and 2 of latent
    windowed = WanContextWindowsManualNode.execute(psa, **inputs, freenoise=False).result[0]
    sample(windowed, steps=4, size=(1, 16, 13, 16, 16))
    windows = sparse_calls(psa)[1] // 2
    assert sparse_calls(psa) == [0, 2 * windows, 2 * windows, 2 * windows]
    assert windows >= 4
    calls = [seen[2 * windows * step : 2 * windows * (step + 1)] for step in range(3)]
    assert all(kept is None for kept, _ in calls[0] + calls[2]), "every window chooses its own levels"
    for (kept, _), (_, chosen) in zip(calls[1], calls[0], strict=True):
        assert kept.density is chosen.density, "a window keeps its own levels, not another one's"
    assert report(psa)["notes"] == report(psa)["fallbacks"] == []
    assert psa.get_attachment(KEY).maps.whole is False


# Caches and packs that bring their own forward


def cached(model, node="EasyCacheNode", threshold=1000.0, start=0.15, end=1.0):
    import comfy_extras.nodes_easycache as nodes

    return getattr(nodes, node).execute(model, threshold, start, end, False).result[0]


@pytest.mark.parametrize("node", ["EasyCacheNode", "LazyCacheNode"])
@pytest.mark.parametrize("first", ["psa", "cache"])
def test_a_cache_that_answers_all_active_steps(model, sample, caplog, node, first):
    told = []
    patch = PATCH | {"start_percent": 0.6, "on_step": told.append}
    psa = cached(patch_model(model, **patch), node) if first == "psa" else patch_model(cached(model, node), **patch)
    sample(psa, steps=8)
    (note,) = report(psa)["notes"]
    assert "a cache answered all 3 steps in which PSA is active" in note
    assert "in front" not in caplog.text
    assert caplog.text.count("a cache answered all") == 1
    assert kinds(psa).count("skipped") >= 3
    assert kinds(psa)[0] == "dense"
    assert len(kinds(psa)) == 8
    assert [figures["kind"] for figures in told] == kinds(psa)


def test_skipped_steps_are_not_dense(model, sample, caplog):
    psa = patch_model(cached(model, start=0.4, end=0.8), **PATCH)
    with caplog.at_level("INFO"):
        sample(psa, steps=10)
    skipped = kinds(psa).count("skipped")
    assert skipped
    assert kinds(psa).count("dense") == 3
    line = next(record.message for record in caplog.records if "steps sparse" in record.message)
    assert f"{skipped} skipped" in line
    assert "the dense ones 0.00 s" not in line
    time, steps = report(psa)["time"], report(psa)["steps"]
    assert time["dense_steps"] == pytest.approx(sum(s["seconds"] for s in steps if s["kind"] == "dense"), abs=1e-3)
    from comfyui_psa.reports.draw_report import headline

    assert f"{skipped} skipped by a cache" in headline(report(psa))


def without_options(network):
    """As in TeaCache and MagCache packs: their own forward, whose blocks get no transformer_options."""

    def forward_orig(x, t, context, clip_fea=None, freqs=None, transformer_options=None, **kwargs):
        blocks = [block.forward for block in network.blocks]
        for block, genuine in zip(network.blocks, blocks, strict=True):
            block.forward = lambda x, genuine=genuine, **kw: genuine(x, **{**kw, "transformer_options": {}})
        try:
            return type(network).forward_orig(
                network, x, t, context, clip_fea=clip_fea, freqs=freqs, transformer_options=transformer_options or {},
                **kwargs,
            )  # fmt: skip
        finally:
            for block in network.blocks:
                del block.forward

    return forward_orig


@pytest.mark.parametrize("before", [True, False])
def test_a_pack_that_replaces_the_forward(model, sample, caplog, before):
    from unittest.mock import patch

    def with_pack(model):
        clone = model.clone()

        def wrapper(apply, given):
            network = core.network_of(clone)
            with patch.object(network, "forward_orig", without_options(network)):
                return apply(given["input"], given["timestep"], **given["c"])

        clone.set_model_unet_function_wrapper(wrapper)
        return clone

    psa = patch_model(with_pack(model), **PATCH) if before else with_pack(patch_model(model, **PATCH))
    sample(psa, steps=4)
    (note,) = report(psa)["notes"]
    assert "replaced the model's own forward (forward_orig)" in note
    assert "changing the order of the nodes does not help" in note
    assert "put PSA Patch" not in caplog.text
    assert kinds(psa) == ["unseen"] * 4


def own_attention(block):
    """As patches of Sage Attention that save memory: the forward of the block's self-attention, without asking."""
    attention = block.self_attn

    def forward(x, freqs, transformer_options=None, **kwargs):
        return type(attention).forward(attention, x, freqs, transformer_options={}, **kwargs)

    return forward


def test_a_patch_of_the_self_attention(model, sample, caplog):
    clone = patch_model(model, **PATCH)
    for i, block in enumerate(core.network_of(model).blocks):
        clone.add_object_patch(f"diffusion_model.blocks.{i}.self_attn.forward", own_attention(block))
    sample(clone, steps=4)
    (note,) = report(clone)["notes"]
    assert "replaced the model's own forward (blocks.0.self_attn.forward and 1 more)" in note
    assert kinds(clone) == ["unseen"] * 4
    plain = patch_model(model, **PATCH)
    sample(plain, steps=4)
    assert report(plain)["notes"] == [], "nothing of it is left on the model"


def test_blocks_that_psa_never_saw_are_named(tiny_wan, sample, caplog):
    deep = tiny_wan.load("t2v", num_layers=5)
    clone = patch_model(deep, **PATCH)
    blocks = core.network_of(deep).blocks
    for i in (0, 3, 4):
        clone.add_object_patch(f"diffusion_model.blocks.{i}.self_attn.forward", own_attention(blocks[i]))
    sample(clone, steps=4)
    (note,) = report(clone)["notes"]
    assert note.startswith("PSA never saw blocks 0, 3-4: ")
    assert caplog.text.count("PSA never saw") == 1
    assert show_report(clone, {}, -1, 0, None)


# Interrupts, messages, travelling


def test_importance_that_is_not_finite_is_told(tiny_wan, sample, caplog):
    model = tiny_wan.load("t2v")
    with torch.no_grad():
        model.get_model_object("diffusion_model").blocks[1].self_attn.q.weight[0, 0] = torch.inf
    patched = patch_model(model, **PATCH)
    sample(patched, steps=4)
    (note,) = report(patched)["notes"]
    assert "was not a finite number" in note
    assert "bfloat16" in note
    assert note in caplog.text


def test_pairs_without_importance_count_once_where_levels_are_kept(tiny_wan, sample, monkeypatch):
    recorder, model = Recorder(monkeypatch), tiny_wan.load("t2v")
    with torch.no_grad():
        model.get_model_object("diffusion_model").blocks[0].self_attn.q.weight[0, 0] = torch.inf
    patched = patch_model(model, **PLAIN | {"reuse_steps": 3})
    sample(patched, steps=4)
    assert sparse_calls(patched) == [0, 2, 2, 2]
    assert [lists is None for lists in recorder.given] == [True] * 2 + [False] * 4
    # The dense step has left nothing finite in the video, so no pair of the two calls that rank has an importance.
    pairs = sum(result.lists.blocks.numel() for result in recorder.results[:2])
    (note,) = report(patched)["notes"]
    assert f"the importance of {pairs} pairs of blocks " in note


def test_the_step_that_was_broken_off_is_not_shown_as_done(model, sample, monkeypatch, caplog):
    class Stopped(BaseException):
        pass

    told, ended = [], []
    psa = patch_model(model, **PATCH | {"on_step": told.append, "on_end": ended.append, "verbose": True})

    def stop(*args, **kwargs):
        if len(told) == 2:
            raise Stopped
        return genuine(*args, **kwargs)

    genuine = self_attention.pyramid_sparse_attention
    with monkeypatch.context() as patch:
        patch.setattr(self_attention, "pyramid_sparse_attention", stop)
        with pytest.raises(Stopped), caplog.at_level("INFO"):
            sample(psa, steps=4)
    assert [figures["step"] for figures in told] == [0, 1]
    assert kinds(psa) == ["dense", "sparse", "interrupted"]
    assert (ended[0]["completed"], ended[0]["kinds"]) == (False, {"dense": 1, "sparse": 1, "interrupted": 1})
    assert "steps sparse" not in caplog.text
    assert show_report(psa, {}, -1, 0, None)
    sample(psa, steps=4)
    assert kinds(psa) == ["dense", *["sparse"] * 3]
    assert ended[1]["completed"] is True
    assert ended[1]["sparsity"] == report(psa)["mean_sparsity"]


def test_too_few_tokens_say_the_size_and_what_to_do(model, sample):
    psa = patch_model(model, **PATCH | {"min_tokens": 12288})
    sample(psa, size=(1, 16, 2, 32, 48))
    psa = patch_model(model, **PATCH | {"min_tokens": 12288, "start_percent": 0.0})
    sample(psa, size=(1, 16, 2, 32, 48))
    (entry,) = report(psa)["fallbacks"]
    assert entry["reason"].startswith("768 tokens (5 frames of 384x256) are fewer than min_tokens 12288")
    assert "set min_tokens to 768 or less" in entry["reason"]


@pytest.mark.parametrize(("sparsity", "most"), [(0.97, None), (0.95, None)])
def test_a_sparsity_that_a_short_video_cannot_have(model, sample, sparsity, most):
    import re

    patch = PATCH | {"start_percent": 0.0, "block_kv": "128"}
    psa = patch_model(model, **patch | {"sparsity": sparsity})
    size = (1, 16, 2, 32, 32)
    assert torch.equal(sample(psa, steps=2, size=size), sample(model, steps=2, size=size))
    (entry,) = report(psa)["fallbacks"]
    assert "Error" not in entry["reason"]
    assert "512 video tokens (5 frames of 256x256)" in entry["reason"]
    most = float(re.search(r"(0\.\d\d) is the most there", entry["reason"])[1])
    psa = patch_model(model, **patch | {"sparsity": most})
    sample(psa, steps=2, size=size)
    assert kinds(psa) == ["sparse", "sparse"], "what was proposed can be had"
    psa = patch_model(model, **patch | {"sparsity": most + 0.01})
    sample(psa, steps=2, size=size)
    assert kinds(psa) == ["dense", "dense"], "and it is the most"


def test_a_part_that_is_too_small_leaves_the_others_sparse(model, sample, tiny_wan):
    psa = patch_model(model, **PATCH | {"sparsity": 0.85, "start_percent": 0.0, "block_kv": "128"})
    sample(psa, steps=2, positive=area(tiny_wan, 8, 32, 16, 0, 0) + tiny_wan.conditioning())
    assert [entry["sparse_calls"] for entry in report(psa)["grids"]] == [4, 0]
    (entry,) = report(psa)["fallbacks"]
    assert "384 video tokens (9 frames of 128x256)" in entry["reason"]


def test_triton_that_is_not_there(model, sample, monkeypatch, caplog):
    import sys

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or ".kernels.gpu" in name]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    psa = patch_model(model, **PATCH | {"backend": "triton"})
    assert torch.equal(sample(psa, steps=2), sample(model, steps=2))
    (entry,) = report(psa)["fallbacks"]
    assert "Error" not in entry["reason"]
    assert "install Triton" in entry["reason"]


def test_the_override_travels_without_its_run(model, sample):
    psa = patch_model(model, **PATCH | {"reuse_steps": 2})
    wrappers = {kind: dict(keys) for kind, keys in psa.wrappers.items()}
    travelled = pickle.loads(pickle.dumps((psa.model_options["transformer_options"], wrappers)))
    there = model.clone()
    there.model_options["transformer_options"], there.wrappers = travelled
    assert isinstance(core.get_override(there), PSAOverride)
    assert torch.equal(sample(there, steps=4), sample(psa, steps=4))

    options = []
    watched = psa.clone()
    core.add_wrappers(watched, "psa_test", before_call=lambda network, x, context, given, conds: options.append(given))
    sample(watched, steps=2)
    assert pickle.loads(pickle.dumps(options[-1][RUN_KEY])) is None
    assert copy.deepcopy(options[-1][RUN_KEY]) is options[-1][RUN_KEY]


def test_an_override_in_another_process(tmp_path):
    """A process that knows nothing of this one, but has the pack, as ComfyUI's workers have."""
    import subprocess
    import sys
    from pathlib import Path

    (tmp_path / "override").write_bytes(pickle.dumps(PSAOverride(PSAOverride(None))))
    script = f"""
import pickle, runpy, torch
runpy.run_path({str(Path(__file__).parents[1] / "conftest.py")!r})
override = pickle.loads(open({str(tmp_path / "override")!r}, "rb").read())
q = torch.randn(1, 64, 128)
print(torch.equal(override(lambda q, k, v, heads, **_: q + heads, q, q, q, 2, transformer_options={{}}), q + 2))
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "True"


def test_a_second_patch_tells_the_first(model, monkeypatch, caplog):
    import sys
    from types import SimpleNamespace

    from comfyui_psa.patching.live import told
    from comfyui_psa.patching.patch import patch_model

    def patch_for(node, model, **inputs):
        patched = patch_model(model, **PATCH | inputs)
        told(model, patched, node)
        return patched

    sent = []
    server = SimpleNamespace(client_id="page", send_sync=lambda event, data, client: sent.append((event, data)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    first = patch_for("5", model)
    with caplog.at_level("INFO"):
        second = patch_for("10", first, sparsity=0.0)
    assert sent == [("psa.replaced", {"node": "5", "by": "10"})]
    assert "PSA Patch #5 is replaced by PSA Patch #10" in caplog.text
    patch_for("5", patch_for("5", model))
    patch_for(None, second)
    assert len(sent) == 1
