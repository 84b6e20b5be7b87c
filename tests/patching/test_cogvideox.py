"""PSA on a small random CogVideoX through ComfyUI's sampler: text in front, head size 64, blocks that do not say which.

That all blocks in full equal dense is in tests/parity.
"""

import logging

import pytest
import torch

from comfyui_psa.kernels.order import TokenLayout
from comfyui_psa.patching.families.cogvideox import FAMILY
from comfyui_psa.patching.family import find_family
from comfyui_psa.patching.patch import patch_model

from .core_nodes import compiled
from .patched import by_step, distance, kinds, layouts, report, reports_nothing, sparse_calls

PATCH = {"preset": "auto", "start_percent": 0.25, "end_percent": 1.0, "min_tokens": 0}
SIZE = (1, 16, 5, 24, 32)  # 5 x 12 x 16 = 960 video tokens
KINDS = ("5b", "1.5", "1.5-i2v")
CASES = [("1.0 and 1.5, T2V and I2V", kind) for kind in KINDS]
"""Rows of the table of models in docs/compatibility.md."""


@pytest.fixture(scope="module")
def models(model_folders, tiny):
    from comfyui_psa.loading.checkpoint import load_checkpoint

    for kind in KINDS:
        tiny.write_folder(model_folders / "diffusers" / f"psa {kind}", kind)
    return {kind: load_checkpoint(f"psa {kind}") for kind in KINDS}


@pytest.fixture
def sample(tiny):
    def run(model, steps=4, guidance=1.0, negative=None, size=SIZE):
        import comfy.sample

        from comfyui_psa.cogvideox.sampler import make_sampler
        from comfyui_psa.cogvideox.schedule import trailing_sigmas

        noise = torch.randn(size, generator=torch.Generator().manual_seed(1))
        conds = [[tiny.text(), {}]], [[tiny.text(6) if negative is None else negative, {}]]
        return comfy.sample.sample_custom(
            model, noise, guidance, make_sampler("dpm"), trailing_sigmas(model, steps, 1.0), *conds,
            torch.zeros(size), seed=7, disable_pbar=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("kind", "size", "text", "layout"),
    [
        ("5b", (2, 16, 13, 60, 90), 226, TokenLayout((13, 30, 45), before=226)),
        ("1.5", (1, 16, 11, 61, 90), 452, TokenLayout((6, 31, 45), before=452)),
    ],
)
def test_the_text_lies_in_front_of_the_grid(models, kind, size, text, layout):
    read_call = find_family(models[kind]).read_call
    network = models[kind].get_model_object("diffusion_model")
    assert read_call(network, torch.empty(size), torch.empty(1, text, 32), {}).layout == layout


def test_every_row_of_the_family_has_a_case():
    assert {row for row, _ in CASES} == {one.name for one in FAMILY.variants}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("row", "kind"), CASES)
def test_sizes_that_nothing_divides(row, kind, seed, models, sample, kernel_calls):
    draw = torch.Generator().manual_seed(seed)
    frames, height, width = (
        int(torch.randint(*limits, (), generator=draw)) for limits in ((5, 10), (23, 34), (23, 34))
    )
    size = (1, 16, frames, height, width)
    inputs = PATCH | {"start_percent": 0.0, "mode": "topk", "correction": "off"}
    stock = sample(models[kind], steps=2, size=size)
    full = patch_model(models[kind], sparsity=0.01, pyramid="1: 1.0", **inputs)
    assert distance(sample(full, steps=2, size=size), stock) < 1e-5, size
    sparse = patch_model(models[kind], sparsity=0.4, **inputs)
    assert torch.isfinite(sample(sparse, steps=2, size=size)).all(), size
    for patched in (full, sparse):
        assert reports_nothing(patched), size
        assert sparse_calls(patched) == [2, 2]
    (variant,) = (one for one in FAMILY.variants if one.name == row)
    ((tokens, head),) = {call.q.shape[2:] for call in kernel_calls}
    ((before, _, after),) = layouts(kernel_calls)
    assert (variant.before, variant.after) == ("text", "-")
    assert (str(head), before, after) == (variant.heads, 226, 0)
    patches = 2 if kind.startswith("1.5") else 1
    assert tokens == 226 + -(-frames // patches) * -(-height // 2) * -(-width // 2)


@pytest.mark.parametrize(("kind", "preset"), [("5b", "cogvideox-5b"), ("1.5", "cogvideox1.5-5b")])
def test_sparse_steps_meet_the_slider(models, sample, kind, preset):
    psa = patch_model(models[kind], sparsity=0.7, **PATCH | {"block_kv": "32"})
    out = sample(psa)
    steps = report(psa)["steps"]
    assert [step["sparsity"] is None for step in steps] == [True, False, False, False]
    for step in steps[1:]:
        assert step["sparsity"] == pytest.approx(0.7, abs=0.02)
        assert step["sparse_calls"] == 2
    assert report(psa)["preset"] == preset
    assert torch.isfinite(out).all()
    assert 1e-4 < distance(sample(models[kind]), out) < 0.5


@pytest.mark.parametrize("preset", ["cogvideox-5b", "cogvideox1.5-5b", "cogvideox-5b-4step"])
@pytest.mark.parametrize("published", [False, True])
def test_the_presets_run(models, sample, preset, published):
    name = preset + " (published)" * published
    psa = patch_model(models["5b"], sparsity=0.7, **PATCH | {"preset": name, "start_percent": 0.0})
    assert torch.isfinite(sample(psa, steps=1)).all()
    assert reports_nothing(psa)
    assert report(psa)["steps"][0]["sparse_calls"] == 2


def test_the_published_figures_of_the_4_step_preset():
    from comfyui_psa.choices.presets import load_presets

    config = load_presets()["cogvideox-5b-4step (published)"].config(None)
    assert config.bounds == pytest.approx((0.05, 0.15, 0.25, 0.50))
    assert (config.mode, config.order, config.block_q, config.block_kv) == ("topk", "raster", 128, 128)


@pytest.mark.parametrize(("correction", "dense"), [("off", [0, 0, 0, 0]), ("auto", [2, 0, 0, 0])])
def test_where_the_warm_up_is_zero_only_the_step_that_learns_is_dense(models, sample, correction, dense):
    psa = patch_model(models["5b"], sparsity=0.7, **PATCH | {"start_percent": 0.0, "correction": correction})
    sample(psa)
    assert by_step(psa, "dense_calls") == dense
    assert sparse_calls(psa) == [2 - calls for calls in dense]


@pytest.mark.parametrize(("guidance", "tokens"), [(1.0, None), (6.0, None), (6.0, 452), (6.0, 113)])
def test_dense_blocks_are_the_ones_that_were_named_however_guidance_is_batched(models, sample, tiny, guidance, tokens):
    psa = patch_model(models["5b"], sparsity=0.7, **PATCH | {"dense_blocks": "0", "start_percent": 0.0})
    sample(psa, 2, guidance, None if tokens is None else tiny.text(6, tokens))
    found = report(psa)
    assert list(found["layers"]) == ["1"]
    assert {step["sparse_calls"] for step in found["steps"]} == {step["dense_calls"] for step in found["steps"]}
    assert [entry["reason"] for entry in found["fallbacks"]] == ["block 0 is listed in dense_blocks"]
    assert found["grid"] == [5, 12, 16]


def test_fp8_weights(models, sample):
    from comfyui_psa.loading.checkpoint import load_checkpoint

    model = load_checkpoint("psa 5b", "fp8_e4m3fn")
    stock = sample(model, steps=2)
    full = patch_model(model, sparsity=0.01, pyramid="1: 1.0", **PATCH | {"mode": "topk", "correction": "off"})
    assert torch.isfinite(stock).all()
    assert distance(sample(full, steps=2), stock) < 1e-5
    assert reports_nothing(full)
    assert not torch.equal(stock, sample(models["5b"], steps=2)), "the weights are rounded"


@pytest.mark.parametrize("kind", ["5b", "1.5"])
def test_what_is_lost_is_given_back(models, kind):
    import comfy.sample
    import comfy.samplers

    text = [[torch.randn(1, 226, 32, generator=torch.Generator().manual_seed(5)), {}]]
    noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    # Steps so short that the model sees almost the same in all of them, and so loses the same.
    sigmas, euler = torch.tensor([2.0, 1.999, 1.998, 1.997, 1.996]), comfy.samplers.sampler_object("euler")

    def run(model):
        return comfy.sample.sample_custom(
            model, noise, 1.0, euler, sigmas, text, text, torch.zeros(SIZE), seed=1, disable_pbar=True
        )

    stock = run(models[kind])
    inputs = PATCH | {"sparsity": 0.8, "start_percent": 0.0, "mode": "topk"}
    off, on = (patch_model(models[kind], **inputs, correction=size) for size in ("off", "full"))
    assert distance(run(on), stock) < 0.8 * distance(run(off), stock)
    assert by_step(on, "corrected_calls") == [0, 2, 2, 2]


def test_block_numbers_are_checked_against_the_model(models):
    with pytest.raises(ValueError, match=r"dense_blocks: '2' was given; .* from 0 to 1"):
        patch_model(models["5b"], sparsity=0.7, **PATCH | {"dense_blocks": "2"})


def test_sparsity_zero_is_the_dense_model(models, sample):
    assert torch.equal(sample(patch_model(models["5b"], sparsity=0.0, **PATCH)), sample(models["5b"]))


def test_a_model_without_the_corrections_is_told_so_once(comfyui, tiny, caplog):
    import comfy.sd

    from comfyui_psa.loading.names import COGVIDEOX, to_native

    state = {to_native(key, COGVIDEOX): value for key, value in tiny.transformer("5b").state_dict().items()}
    native = comfy.sd.load_diffusion_model_state_dict(state)
    with caplog.at_level(logging.WARNING):
        patch_model(native, sparsity=0.7, **PATCH)
    assert sum("put PSA CogVideoX Fix after" in record.message for record in caplog.records) == 1


@pytest.mark.slow(seconds=30)
def test_compiled_after_the_loader(models, sample, compiler):
    for kind in ("5b", "1.5"):
        model = models[kind]
        psa, stock = patch_model(model, sparsity=0.7, **PATCH), compiled(model)
        for which, expected in ((stock, sample(model)), (compiled(psa), sample(psa)), (stock, sample(model))):
            assert distance(sample(which), expected) < 1e-4, kind
        assert kinds(psa) == ["dense", *["sparse"] * 3]
        assert reports_nothing(psa)


def test_blocks_that_do_not_say_which_are_counted(models, sample):
    psa = patch_model(models["5b"], sparsity=0.7, **PATCH)
    block = psa.get_model_object("diffusion_model").blocks[1]

    def forward(*args, transformer_options=None, **kwargs):
        return type(block).forward(block, *args, transformer_options={}, **kwargs)

    psa.add_object_patch("diffusion_model.blocks.1.forward", forward)
    sample(psa)
    (note,) = report(psa)["notes"]
    blocks = len(psa.get_model_object("diffusion_model").blocks)
    assert note.startswith(f"PSA never saw 1 of {blocks} blocks: ")
    assert "blocks.1.forward" in note
