"""The report's figures equal those computed from a recorded run; the page hears the same; the picture draws."""

import json

import numpy as np
import pytest
import torch

LAYERS, HEADS, STEPS = 3, 2, 4
LATENT = (1, 16, 5, 20, 24)


@pytest.fixture(scope="module")
def model(comfyui):
    """Wan T2V, three layers, two heads of 128, random weights."""
    import comfy.ldm.wan.model
    import comfy.ops
    import comfy.sd

    blank = comfy.ldm.wan.model.WanModel(
        dim=256, ffn_dim=128, num_heads=HEADS, num_layers=LAYERS, operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in blank.state_dict().items()}
    return comfy.sd.load_diffusion_model_state_dict(state)


def sample(model):
    import comfy.sample

    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
    conditioning = [[torch.randn(1, 13, 4096, generator=torch.Generator().manual_seed(2)), {}]]
    return comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", conditioning, conditioning, torch.zeros(LATENT), seed=1,
        disable_pbar=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(model):
    """A patched model that has sampled, its factors call by call as numpy arrays, and the message to the page."""
    from comfyui_psa.patching.patch import KEY, patch_model
    from comfyui_psa.sampling import self_attention

    recorded, told = [], []
    genuine = self_attention.pyramid_sparse_attention

    def recording(*args, **kwargs):
        result = genuine(*args, **kwargs)
        recorded.append(result.factors.numpy().astype(np.float64))
        return result

    self_attention.pyramid_sparse_attention = recording
    try:
        psa = patch_model(
            model, sparsity=0.75, preset="auto", start_percent=0.25, end_percent=1.0, min_tokens=0, block_kv="32",
            tail="on", on_step=told.append,
        )  # fmt: skip
        samples = sample(psa)
    finally:
        self_attention.pyramid_sparse_attention = genuine
    return (
        psa,
        psa.get_attachment(KEY),
        np.stack(recorded).reshape(-1, LAYERS, HEADS, *recorded[0].shape[2:]),
        told,
        samples,
    )


def cost(factors):
    return np.divide(1.0, factors, out=np.zeros_like(factors), where=factors > 0)


def test_the_figures_are_those_of_the_recorded_run(run):
    _, handle, factors, _, _ = run
    report = handle.report
    tokens = 5 * 10 * 12
    weight = np.full(-(-tokens // 32), 32.0)
    weight[-1] = tokens - 32 * (len(weight) - 1)
    sparsity = 1 - (cost(factors) * weight / tokens).sum(-1).mean(-1)  # [steps, layers, heads]
    # The first calls were made in the dense step, to measure what the others lose.
    (learning, *sparsity), factors = sparsity, factors[1:]
    sparsity = np.stack(sparsity)

    sparse = [step for step in report["steps"] if step["sparsity"] is not None]
    assert (len(report["steps"]), len(sparse)) == (STEPS, len(factors)) == (4, 3)
    for step, expected in zip(sparse, sparsity, strict=True):
        assert step["sparsity"] == pytest.approx(expected.mean(), abs=1e-5)
        assert [step["layers"][str(layer)] for layer in range(LAYERS)] == pytest.approx(expected.mean(-1), abs=1e-5)
        assert 0 < step["attention_seconds"] < step["seconds"]
    assert [step["learned_calls"] for step in report["steps"]] == [LAYERS, 0, 0, 0]
    assert [step["corrected_calls"] for step in report["steps"]] == [0, LAYERS, LAYERS, LAYERS]
    assert report["saved"] == pytest.approx((sparsity.mean((1, 2)).sum() - (1 - learning).mean()) / STEPS, abs=1e-5)
    assert report["mean_sparsity"] == pytest.approx(sparsity.mean(), abs=1e-5)
    assert list(report["layers"].values()) == pytest.approx(sparsity.mean((0, 2)), abs=1e-5)
    for factor, share in report["shares"].items():
        assert share == pytest.approx((factors == int(factor)).mean(), abs=1e-5)
    assert report["coverage"] == pytest.approx((factors > 0).mean(), abs=1e-5) == 1
    time = report["time"]
    assert time["dense_steps"] + time["sparse_steps"] == pytest.approx(
        sum(s["seconds"] for s in report["steps"]), abs=1e-3
    )
    assert json.loads(json.dumps(report)) == report


def test_the_page_hears_the_same_once_a_step(run):
    _, handle, _, told, _ = run
    assert [figures["step"] for figures in told] == list(range(STEPS))
    assert {figures["steps"] for figures in told} == {STEPS}
    for figures, step in zip(told, handle.report["steps"], strict=True):
        assert figures["sparsity"] == (step["sparsity"] and pytest.approx(step["sparsity"], abs=1e-5))
        assert figures["seconds"] == pytest.approx(step["seconds"], abs=1e-3)
    assert sum(told[-1]["shares"].values()) == pytest.approx(told[-1]["coverage"])
    json.dumps(told)


def test_the_maps_lie_over_the_video_as_the_model_saw_it(run):
    _, handle, factors, _, _ = run
    maps = handle.maps
    assert maps.step == STEPS - 1
    assert sorted(maps.blocks) == list(range(LAYERS))
    from comfyui_psa.kernels.order import make_order

    place = make_order("curve", (5, 10, 12)).inverse.numpy().reshape(5, 10, 12)
    spot = (2, 5, 6)
    assert maps.spot == spot
    for layer in range(LAYERS):
        for head in range(HEADS):
            found = factors[-1, layer, head]
            seen = maps.over_video(maps.blocks[layer].seen[head]).numpy()
            assert seen == pytest.approx(cost(found).mean(0)[place // 32], abs=1e-6)
            at_spot = maps.over_video(maps.blocks[layer].spot[head]).numpy()
            assert (at_spot == found[place[spot] // 128][place // 32]).all()


@pytest.mark.parametrize("images", [None, *(torch.rand(17, 80, 96, channels) for channels in (3, 1))])
def test_the_picture_draws_the_layer_and_head_that_were_asked_for(run, images):
    from comfyui_psa.reports.show import show_report

    psa, handle, _, _, samples = run
    report, picture = show_report(psa, {"samples": samples}, 1, 1, images)
    assert json.loads(report) == handle.report
    assert picture.shape[0] == 1
    assert picture.shape[2:] == (1200, 3)
    assert picture.shape[1] > 600
    other = show_report(psa, {"samples": samples}, 2, 0, images)[1]
    assert not torch.equal(picture, other)


def test_wrong_choices_are_explained(run):
    from comfyui_psa.choices.errors import InputError
    from comfyui_psa.reports.show import show_report

    psa, _, _, _, samples = run
    with pytest.raises(InputError, match="PSA Report, input layer: 7 was given; allowed: -1 or a sparse layer: 0-2"):
        show_report(psa, {"samples": samples}, 7, 0, None)
    with pytest.raises(InputError, match="PSA Report, input head: 2 was given; allowed: 0 to 1"):
        show_report(psa, {"samples": samples}, -1, 2, None)


def test_a_model_that_stayed_dense_gets_a_picture_that_says_why(model):
    from comfyui_psa.patching.live import told
    from comfyui_psa.patching.patch import patch_model
    from comfyui_psa.reports.show import show_report

    inputs = {"preset": "auto", "start_percent": 0.25, "end_percent": 1.0, "min_tokens": 0}
    stock = patch_model(model, sparsity=0.0, **inputs)
    assert told(model, stock, None) == ["", ""], "that the model is at fault"
    report, picture = show_report(stock, {}, -1, 0, None)
    assert json.loads(report)["note"] == "sparsity is 0: the model is the stock one"
    assert picture.shape[1] < 200
    unpatched = json.loads(show_report(model, {}, -1, 0, None)[0])
    assert "PSA Patch is bypassed" in unpatched["note"]
    fresh = patch_model(model, sparsity=0.5, **inputs)
    assert told(model, fresh, "1") == ["", "module-default"]
    assert json.loads(show_report(fresh, {}, -1, 0, None)[0]) == {"note": "the model has not sampled yet"}


def test_orders_that_follow_the_data(model, monkeypatch):
    """Centroids go on from step to step, and the maps follow the order of every head."""
    from comfyui_psa.patching.patch import KEY, patch_model
    from comfyui_psa.sampling import self_attention

    results, given = [], []
    genuine = self_attention.pyramid_sparse_attention

    def recording(*args, **kwargs):
        given.append(kwargs["centroids"])
        results.append(genuine(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", recording)
    psa = patch_model(
        model, sparsity=0.75, preset="auto", start_percent=0.25, end_percent=1.0, min_tokens=0, order="semantic",
    )  # fmt: skip
    sample(psa)
    assert given[:LAYERS] == [None] * LAYERS
    assert all(old is result.centroids for old, result in zip(given[LAYERS:], results, strict=False))
    maps = psa.get_attachment(KEY).maps
    for layer, result in enumerate(results[-LAYERS:]):
        for head in range(HEADS):
            factors = result.factors[0, head].numpy().astype(np.float64)
            place = result.key_order.inverse[0, head].numpy() // 64
            row = int(result.query_order.inverse[0, head, (2 * 10 + 5) * 12 + 6]) // 128
            seen, spot = maps.head(layer, head)
            assert seen.numpy().ravel() == pytest.approx(cost(factors).mean(0)[place], abs=1e-6)
            assert (spot.numpy().ravel() == factors[row][place]).all()


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [False, False, False]), (2, [False, True, False]), (9, [False, True, True])]
)
def test_levels_are_kept_for_the_steps_asked_for(model, monkeypatch, steps, expected):
    from comfyui_psa.patching.patch import patch_model
    from comfyui_psa.sampling import self_attention

    results, given = [], []
    genuine = self_attention.pyramid_sparse_attention

    def recording(*args, **kwargs):
        given.append(kwargs["lists"])
        results.append(genuine(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", recording)
    psa = patch_model(
        model, sparsity=0.75, preset="auto", start_percent=0.25, end_percent=1.0, min_tokens=0, reuse_steps=steps,
        correction="off",
    )  # fmt: skip
    sample(psa)
    assert [lists is not None for lists in given] == [kept for kept in expected for _ in range(LAYERS)]
    for place, lists in enumerate(given):
        if lists is not None:
            assert lists.density is results[place - LAYERS].lists.density, "the same lists, packed"


def test_the_density_falls_over_the_sparse_steps_and_its_mean_is_the_sliders(model):
    from comfyui_psa.patching.patch import patch_model

    psa = patch_model(
        model, sparsity=0.6, preset="auto", start_percent=0.25, end_percent=1.0, min_tokens=0, falling=0.5,
    )  # fmt: skip
    sample(psa)
    report = psa.get_attachment("psa").report
    sparsities = [step["sparsity"] for step in report["steps"] if step["sparse_calls"]]
    assert len(sparsities) == 3
    for sparsity, expected in zip(sparsities, (0.4, 0.6, 0.8), strict=True):
        assert sparsity == pytest.approx(expected, abs=0.05), "as closely as whole blocks allow"
    assert report["mean_sparsity"] == pytest.approx(0.6, abs=0.05)
    assert not report["fallbacks"]


def test_blocks_that_stay_dense_on_purpose_are_one_reason(model, caplog):
    from comfyui_psa.patching.patch import patch_model

    psa = patch_model(model, sparsity=0.6, start_percent=0.25, min_tokens=0, dense_blocks="0, 2", correction="off")
    sample(psa)
    report = psa.get_attachment("psa").report
    sparse = sum(step["kind"] == "sparse" for step in report["steps"])
    assert report["fallbacks"] == [{"reason": "blocks 0, 2 are listed in dense_blocks", "calls": 2 * sparse}]
    assert caplog.text.count("listed in dense_blocks") == 1


@pytest.fixture
def words(monkeypatch):
    """What is written in the picture of a report."""
    from comfyui_psa.reports.draw_report import draw_report
    from comfyui_psa.reports.paint import Sheet

    def of(report):
        found, genuine = [], Sheet.text
        monkeypatch.setattr(
            Sheet, "text", lambda self, text, *a, **k: found.append(text) or genuine(self, text, *a, **k)
        )
        draw_report(report)
        return "\n".join(found)

    return of


def test_a_picture_of_a_run_without_a_sparse_step_says_why(model, words):
    from comfyui_psa.patching.patch import patch_model

    psa = patch_model(model, sparsity=0.6, start_percent=0.97, end_percent=0.98, min_tokens=0)
    sample(psa)
    written = words(psa.get_attachment("psa").report)
    assert "Nothing was sparse: no step is between start_percent and end_percent; lower start_percent" in written
    assert "every attention call" not in written


def test_reasons_that_a_picture_leaves_out_are_counted(run, words):
    report = run[0].get_attachment("psa").report
    reasons = [{"reason": f"reason {number}", "calls": number} for number in range(11)]
    written = words(report | {"fallbacks": reasons})
    assert "7 calls stayed dense: reason 7" in written
    assert "reason 8" not in written
    assert "27 more calls stayed dense for 3 other reasons" in written
