"""Calibration: errors are those of the outputs that the model gave, the run stays dense, the target is met."""

import json

import pytest
import torch

from comfyui_psa.choices.errors import InputError
from comfyui_psa.reports.calibrate import SPARSITIES, Point, propose

POINTS = tuple(Point(s, e, t) for s, e, t in ((0.5, 0.02, 0.8), (0.7, 0.05, 0.5), (0.9, 0.15, 0.25), (0.95, 0.3, 0.2)))
INPUTS = {"goal": "error", "target": 0.2, "preset": "auto", "start_percent": 0.25, "min_tokens": 0}
LATENT = (1, 16, 3, 32, 32)


@pytest.mark.parametrize(
    ("goal", "target", "sparsity", "reached"),
    [
        ("error", 0.05, 0.70, True),
        ("error", 0.10, 0.80, True),
        ("error", 0.01, 0.50, False),
        ("error", 0.90, 0.95, True),
        ("speed-up", 2.0, 0.70, True),
        ("speed-up", 3.0, 0.80, True),
        ("speed-up", 1.0, 0.50, True),
        ("speed-up", 9.0, 0.95, False),
    ],
)
def test_the_proposal_lies_between_the_points(goal, target, sparsity, reached):
    found = propose(POINTS, 1.0, goal, target)
    assert (found.sparsity, found.reached) == (pytest.approx(sparsity), reached)
    assert ("out of reach" in found.note) != reached


def test_a_proposal_is_rounded_to_its_safe_side():
    assert propose(POINTS, 1.0, "error", 0.0999).sparsity == 0.79
    assert propose(POINTS, 1.0, "speed-up", 3.01).sparsity == 0.81


@pytest.fixture(scope="module")
def model(comfyui):
    """Wan T2V, two layers, two heads of 128, random weights."""
    import comfy.ldm.wan.model
    import comfy.ops
    import comfy.sd

    blank = comfy.ldm.wan.model.WanModel(
        dim=256, ffn_dim=128, num_heads=2, num_layers=2, operations=comfy.ops.disable_weight_init, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in blank.state_dict().items()}
    return comfy.sd.load_diffusion_model_state_dict(state)


def sampler(model_latents, steps=3, size=LATENT):
    from comfyui_psa.reports.calibrate import sampler as make

    conditioning = [[torch.randn(1, 13, 4096, generator=torch.Generator().manual_seed(2)), {}]]
    sample = make({"samples": torch.zeros(size)}, conditioning, conditioning, seed=1, steps=steps, cfg=1.0)
    return lambda model: model_latents.append(sample(model))


def test_errors_are_those_of_the_outputs_and_the_run_stays_dense(model, monkeypatch, tmp_path):
    from comfyui_psa.choices import user_presets
    from comfyui_psa.choices.user_presets import find_preset
    from comfyui_psa.reports.calibrate import calibrate

    monkeypatch.setattr(user_presets, "folder", lambda: tmp_path)
    latents, outputs = [], []
    sampler(latents)(model)

    network = model.model.diffusion_model
    genuine = network._forward

    def recording(*args, **kwargs):
        outputs.append(genuine(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(network, "_forward", recording)
    found = calibrate(model, sampler(latents), **INPUTS, save_as="mine")
    assert torch.equal(latents[0], latents[1]), "what is handed on is the dense output"

    # Steps 1 and 2 of three are active. The first of them calls everything once more, to compile.
    assert len(outputs) == 1 + 2 * (1 + len(SPARSITIES)) + 1 + len(SPARSITIES)
    first = outputs[1 : 1 + 2 * (1 + len(SPARSITIES))][1::2]
    second = outputs[1 + 2 * (1 + len(SPARSITIES)) :]
    expected = []
    for i in range(len(SPARSITIES)):
        ratios = [(step[i + 1] - step[0]).norm() / step[0].norm() for step in (first, second)]
        expected.append(float(sum(ratios) / 2))
    assert [point.error for point in found.points] == pytest.approx(expected, rel=1e-5)
    assert [point.sparsity for point in found.points] == list(SPARSITIES)
    assert all(point.seconds > 0 for point in found.points)
    json.dumps(found.as_dict())

    stored = json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))
    assert stored["sparsity"] == found.sparsity
    assert find_preset("user/mine").config(found.sparsity).sparsity == found.sparsity
    assert "optimized_attention_override" not in model.model_options["transformer_options"]


KINDS = ["hunyuan", "hunyuan 1.5", "ltx 0.9, a file", "ltx 2", "kandinsky 5 lite", "cosmos", "mochi", "minimax h3"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_measured(kind, tiny_families, monkeypatch):
    """The errors are those of the outputs of the network's own forward; Mochi's asks for no wrappers."""
    import comfy.nested_tensor

    from comfyui_psa.reports import calibrate as module

    monkeypatch.setattr(module, "SPARSITIES", (0.5, 0.8))
    model, tiny = tiny_families.load(kind), tiny_families
    size, sound = tiny.KINDS[kind].size, tiny.KINDS[kind].audio
    latent = torch.zeros(size)
    if sound:
        latent = comfy.nested_tensor.NestedTensor((latent, torch.zeros(sound)))
    conditioning, latents, outputs = tiny.conditioning(kind), [], []
    sample = module.sampler({"samples": latent}, conditioning, conditioning, seed=1, steps=2, cfg=1.0)
    stock = sample(model)

    network = model.model.diffusion_model
    name = "_forward" if hasattr(network, "_forward") else "forward"
    genuine = getattr(network, name)

    def recording(*args, **kwargs):
        outputs.append(genuine(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(network, name, recording)
    found = module.calibrate(model, lambda model: latents.append(sample(model)), **INPUTS | {"start_percent": 0.0})
    same = zip(*(x.unbind() if x.is_nested else [x] for x in (stock, latents[0])), strict=True)
    assert all(torch.equal(one, other) for one, other in same), "what is handed on is the dense output"
    # Everything is called once more before the first measurement, to compile.
    first, second = outputs[: 2 * (1 + 2)][1::2], outputs[2 * (1 + 2) :]
    assert len(second) == 1 + 2
    videos = [[x[0] if isinstance(x, list) else x for x in step] for step in (first, second)]
    expected = [float(sum((video[i] - video[0]).norm() / video[0].norm() for video in videos) / 2) for i in (1, 2)]
    assert [point.error for point in found.points] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected[0] < expected[1]


def test_a_model_whose_attention_does_not_come_to_psa_is_no_proposal(model):
    """A node's own forward computes it, as that of some caches does."""
    from comfyui_psa.reports.calibrate import calibrate

    own = model.clone()
    for number, block in enumerate(model.model.diffusion_model.blocks):

        def forward(*args, block=block, transformer_options=None, **kwargs):
            return type(block).forward(block, *args, transformer_options={}, **kwargs)

        own.add_object_patch(f"diffusion_model.blocks.{number}.forward", forward)
    with pytest.raises(InputError, match="no self-attention reached PSA"):
        calibrate(own, sampler([]), **INPUTS)


def test_inputs_that_cannot_be_read_are_said(model, monkeypatch):
    from comfyui_psa.patching.families import wan
    from comfyui_psa.reports.calibrate import calibrate

    monkeypatch.setattr(wan, "grid_of", lambda *_: [].pop())
    with pytest.raises(InputError, match="PSA cannot read the inputs of this model call"):
        calibrate(model, sampler([]), **INPUTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_tokens": 5000}, "latent_image: .* fewer than min_tokens 5000"),
        ({"preset": "wan2.1-14b (published)"}, "preset: .* not threshold"),
        ({"preset": "none"}, "preset: 'none'"),
        ({"save_as": "a/b"}, "save_as"),
    ],
)
def test_what_cannot_be_calibrated_is_said(model, changes, words):
    from comfyui_psa.reports.calibrate import calibrate

    with pytest.raises(InputError, match=f"^PSA Calibrate, input {words}"):
        calibrate(model, sampler([]), **INPUTS | changes)


def test_the_picture_marks_the_proposal():
    from comfyui_psa.reports.draw_curve import draw_calibration

    for goal, target in (("error", 0.1), ("speed-up", 9.0)):
        picture = draw_calibration(propose(POINTS, 1.0, goal, target).as_dict())
        assert picture.width == 1000
        assert (253, 231, 37) in {colour for _, colour in picture.getcolors(1 << 20)}


def test_a_model_on_several_gpus_is_refused(model):
    from comfyui_psa.reports.calibrate import calibrate

    both = model.clone()
    both.set_additional_models("multigpu", [model.clone()])
    with pytest.raises(InputError, match=r"PSA Calibrate, input model: .*several GPUs.*single GPU"):
        calibrate(both, sampler([]), **INPUTS)


@pytest.mark.parametrize("bad", ["one", "all"])
def test_errors_that_are_not_finite_propose_and_save_nothing(model, monkeypatch, tmp_path, bad):
    from comfyui_psa.choices import user_presets
    from comfyui_psa.reports.calibrate import calibrate
    from comfyui_psa.sampling import self_attention

    monkeypatch.setattr(user_presets, "folder", lambda: tmp_path)
    genuine = self_attention.pyramid_sparse_attention

    def attention(q, k, v, config, **kwargs):
        if bad == "all" or config.sparsity == 0.9:
            v = v * float("nan")
        return genuine(q, k, v, config, **kwargs)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    words = "at sparsity 0.90" if bad == "one" else "every sparsity"
    with pytest.raises(InputError, match=f"^PSA Calibrate, input model: .*NaN.*{words}.*nothing was proposed or saved"):
        calibrate(model, sampler([]), **INPUTS, save_as="mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [float("nan"), float("inf"), 0.0])
def test_a_target_must_be_a_number(model, target):
    from comfyui_psa.reports.calibrate import calibrate

    with pytest.raises(InputError, match="PSA Calibrate, input target: "):
        calibrate(model, sampler([]), **INPUTS | {"target": target})


def test_a_short_video_is_said_once_and_at_once(model, monkeypatch, caplog):
    from comfyui_psa.reports.calibrate import calibrate

    calls = []
    network = model.model.diffusion_model
    genuine = network._forward
    monkeypatch.setattr(network, "_forward", lambda *a, **k: calls.append(1) or genuine(*a, **k))
    with pytest.raises(InputError) as caught:
        calibrate(model, sampler([]), **INPUTS | {"min_tokens": 12288})
    refused, told = str(caught.value).split(". This is why: ")
    reason, _, do = told.partition(". ")
    assert "fewer" not in refused
    assert reason.startswith("768 tokens (9 frames of 256x256) are fewer than min_tokens 12288")
    assert reason.endswith("set min_tokens to 768 or less to make them sparse")
    assert do == "Change that, or connect a longer or larger latent, and run again."
    assert caplog.text.count("fewer than min_tokens") == 1
    assert len(calls) <= 5, "nothing more is computed once it is known"


@pytest.mark.parametrize("reason", ["block 0 is listed in dense_blocks", "something; it ends with a stop."])
def test_whatever_keeps_a_video_dense_what_to_do_comes_last(model, monkeypatch, reason):
    from comfyui_psa.patching import override
    from comfyui_psa.reports.calibrate import calibrate

    monkeypatch.setattr(override, "decline_reason", lambda *_, **__: reason)
    with pytest.raises(InputError) as caught:
        calibrate(model, sampler([]), **INPUTS)
    why, do = str(caught.value).split(". This is why: ")[1].split(". ")
    assert why == reason.rstrip(".")
    assert do == "Change that, or connect a longer or larger latent, and run again."


def test_the_seed_stays_as_it_is(comfyui):
    from comfyui_psa.nodes.calibrate import PSACalibrate

    seed = PSACalibrate.INPUT_TYPES()["required"]["seed"][1]
    assert seed["control_after_generate"] == "fixed"


@pytest.mark.parametrize(
    ("size", "reached"),
    [
        ((1, 16, 2, 24, 24), [0.5, 0.6, 0.7, 0.8, 0.85]),  # 5 blocks, of which one is always seen in full
        ((1, 16, 1, 32, 32), [0.6, 0.7]),  # 4 blocks: 0.5625, 0.6875 and 0.75 are possible
    ],
)
def test_a_short_video_is_calibrated_over_the_sparsities_that_it_can_have(model, size, reached, caplog):
    """To within 0.05, as in any run."""
    from comfyui_psa.reports.calibrate import calibrate

    found = calibrate(model, sampler([], size=size), **INPUTS | {"target": 20.0})
    assert [point.sparsity for point in found.points] == reached
    assert found.sparsity == reached[-1]
    assert "out of reach" not in caplog.text


def cached(model, answered):
    """A model whose calls of these numbers a cache answers with the call before."""
    clone, calls = model.clone(), []

    def wrapper(apply, options):
        calls.append(
            calls[-1] if len(calls) in answered else apply(options["input"], options["timestep"], **options["c"])
        )
        return calls[-1]

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def test_where_a_cache_answers_a_step_the_next_one_is_measured(model):
    from comfyui_psa.reports.calibrate import calibrate

    # With the starts of 8 steps at a shift of 1, steps 2 to 7 are active, and the first, 5th and last are chosen.
    latents = []
    found = calibrate(cached(model, {2, 5, 7}), sampler(latents, steps=8), **INPUTS)
    assert [point.sparsity for point in found.points] == list(SPARSITIES)


@pytest.mark.parametrize("kind", ["a cache", "a node that drops the options"])
def test_steps_that_nobody_computed_are_no_matter_of_start_percent(model, kind):
    from comfyui_psa.reports.calibrate import calibrate

    clone = cached(model, {1, 2})
    if kind != "a cache":
        clone.set_model_unet_function_wrapper(
            lambda apply, options: apply(
                options["input"], options["timestep"], **options["c"] | {"transformer_options": {}}
            )
        )
    with pytest.raises(InputError, match=r"^PSA Calibrate, input model: .*a cache answered.* Bypass that node"):
        calibrate(clone, sampler([]), **INPUTS)


def test_levels_as_written_are_about_the_pyramid_that_brings_them(model):
    from comfyui_psa.choices.presets import OWN_SHAPE, Preset
    from comfyui_psa.reports.calibrate import calibrate

    written = Preset("PSA Pyramid", "", OWN_SHAPE | {"shares": {1: 0.5}}, as_written=True)
    with pytest.raises(InputError, match=r"^PSA Calibrate, input psa_pyramid: "):
        calibrate(model, sampler([]), **INPUTS, psa_pyramid=written)
