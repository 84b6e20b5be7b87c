"""Every Wan variant: where its tokens lie, and that PSA with nothing left out computes what dense computes.

The positions have an oracle of their own: before the first attention a token depends on nothing but its own patch, so
changing one input changes exactly the tokens that it makes. The rows are those of the family's file.
"""

import dataclasses
import functools
import math

import pytest
import torch

from comfyui_psa.patching.families.wan import FAMILY
from comfyui_psa.patching.family import find_family
from comfyui_psa.patching.patch import KEY, patch_model

from .patched import FULL, SPARSE, distance, layouts, report, reports_nothing, sparse_calls

SIZE = (1, 16, 3, 32, 32)
FRAME = 256


@dataclasses.dataclass
class Case:
    """A row of the table, and a model to try it with.

    Attributes:
        extra: conditioning values by name, made from `tiny.normal`; references: the values that change extra tokens.
        before, frames, after: tokens before the grid, frames of the grid, tokens after it.
        calls: self-attention calls of a forward.
    """

    row: str
    kind: str
    columns: tuple[str, str, str] = ("-", "T x H x W", "-")
    extra: dict = dataclasses.field(default_factory=dict)
    references: tuple[str, ...] = ()
    before: int = 0
    frames: int = 3
    after: int = 0
    size: tuple = SIZE
    calls: int = 2

    @property
    def layout(self):
        grid = (self.frames, math.ceil(self.size[3] / 2), math.ceil(self.size[4] / 2))
        return self.before, grid, self.after


def vace_frames(references, frames):
    """vace_frames and vace_mask as WanVaceToVideo makes them: references in front, without reactive part and mask."""

    def make(tiny):
        import comfy.latent_formats

        video = tiny.normal(1, 32, frames, 32, 32, seed=7)
        image = tiny.normal(1, 16, references, 32, 32, seed=8)
        blank = comfy.latent_formats.Wan21().process_out(torch.zeros_like(image))
        return [torch.cat([torch.cat([image, blank], 1), video], 2)]

    return make


def vace_mask(references, frames):
    mask = torch.ones(1, 64, references + frames, 32, 32)
    mask[:, :, :references] = 0
    mask[:, :, references, :16] = 0  # a video frame that is half kept is no reference
    return [mask]


def of(*shape, seed=5, wrap=lambda x: x):
    return lambda tiny: wrap(tiny.normal(*shape, seed=seed))


def as_list(x):
    return [x]


FIRST = (1, 16, 4, 32, 32)

CASES = [
    Case("T2V 2.1, A14B 2.2 (both experts)", "t2v"),
    Case("T2V / I2V 5B 2.2", "5b", size=(1, 48, 3, 32, 32)),
    Case("I2V 2.1, A14B 2.2 (both experts)", "i2v", extra={"clip_vision_output": lambda tiny: tiny.vision()}),
    Case("I2V 2.1, A14B 2.2 (both experts)", "i2v 2.2", extra={"concat_latent_image": of(1, 16, 3, 32, 32)}),
    Case("First-last frame", "flf", extra={"clip_vision_output": lambda tiny: tiny.vision(514)}),
    Case(
        "Fun Control and InP, with reference", "fun", ("reference", "T x H x W", "-"),
        {"reference_latents": of(1, 16, 1, 32, 32, wrap=as_list)}, ("reference_latents",), before=FRAME,
    ),
    Case("Fun Control and InP, without reference", "fun"),
    Case("VACE", "vace", calls=3),
    Case("VACE", "vace", extra={"vace_frames": vace_frames(0, 3), "vace_mask": lambda tiny: vace_mask(0, 3)}, calls=3),
    Case(
        "VACE with reference image", "vace", ("its frames, the latent's first", "(T - n) x H x W", "-"),
        {"vace_frames": vace_frames(1, 3), "vace_mask": lambda tiny: vace_mask(1, 3)}, before=FRAME, size=FIRST,
        calls=3,
    ),
    Case("Camera 2.1 and 2.2", "camera", extra={"camera_conditions": of(1, 24, 3, 256, 256)}),
    Case("Camera 2.1 and 2.2", "camera 2.2", extra={"camera_conditions": of(1, 24, 3, 256, 256)}),
    Case(
        "Animate", "animate", ("reference, the latent's first frame", "(T - 1) x H x W", "-"),
        {"pose_video_latent": of(1, 16, 3, 32, 32)}, before=FRAME, size=FIRST, calls=5,
    ),
    Case(
        "S2V", "s2v", ("-", "T x H x W", "reference, packed motion frames"),
        {
            "reference_latents": of(1, 16, 1, 32, 32, wrap=as_list),
            "reference_motion": of(1, 16, 19, 32, 32, seed=6),
            "audio_embed": of(1, 25, 1024, 12),
        },
        ("reference_latents", "reference_motion"), after=FRAME + 16 * 16 + 8 * 8 + 4 * 4 * 4,
    ),
    Case("S2V", "s2v", ("-", "T x H x W", "reference, packed motion frames")),
    Case(
        "HuMo", "humo", ("-", "T x H x W", "reference"),
        {"reference_latents": of(1, 16, 1, 32, 32, wrap=as_list), "audio_embed": of(1, 3, 8, 5, 1280)},
        ("reference_latents",), after=FRAME,
    ),
    Case(
        "In-context references", "t2v", ("-", "T x H x W", "references"),
        {"context_latents": lambda tiny: [tiny.normal(1, 16, *size, 32, seed=5) for size in ((1, 32), (2, 17))]},
        ("context_latents",), after=FRAME + 2 * 9 * 16,
    ),
    Case(
        "Phantom", "t2v", ("-", "T x H x W", "reference frames"),
        {"time_dim_concat": of(1, 16, 2, 32, 32)}, ("time_dim_concat",), after=2 * FRAME,
    ),
    Case(
        "SCAIL, SCAIL-2", "scail", ("references", "T x H x W", "pose video, a quarter of the grid"),
        {
            "reference_latents": lambda tiny: [tiny.normal(1, 16, 1, 32, 32, seed=n) for n in (5, 6)],
            "pose_video_latent": of(1, 16, 3, 16, 16, seed=7),
        },
        ("reference_latents", "pose_video_latent"), before=2 * FRAME, after=3 * 8 * 8,
    ),
    Case(
        "SCAIL, SCAIL-2", "scail2", ("references", "T x H x W", "pose video, a quarter of the grid"),
        {
            "reference_latents": of(1, 16, 1, 32, 32, wrap=as_list),
            "pose_video_latent": of(1, 16, 3, 16, 16, seed=7),
            "driving_mask_28ch": of(1, 3, 28, 16, 16, seed=8),
            "ref_mask_28ch": of(1, 4, 28, 32, 32, seed=9),
        },
        ("reference_latents", "pose_video_latent"), before=FRAME, after=3 * 8 * 8,
    ),
    Case("WanDancer", "wandancer"),
    Case("T2V 2.1, A14B 2.2 (both experts)", "t2v", size=(1, 16, 3, 31, 33)),
]  # fmt: skip

DENSE = {
    "Autoregressive (causal) Wan": "samples with a cache, frame by frame",
    "Animate 2": "each frame attends for itself",
}


@pytest.fixture(scope="module")
def models(tiny_wan):
    """models(kind): a tiny model of that kind, kept until another is asked for."""
    return functools.lru_cache(maxsize=1)(tiny_wan.load)


def make_extra(case, tiny):
    return {name: make(tiny) for name, make in case.extra.items()}


def changed(value):
    return [item + 1.0 for item in value] if isinstance(value, list) else value + 1.0


def first_tokens(model, tiny, case, extra, noise=None):
    """The tokens [L, C] that enter the first self-attention of a one-step run."""
    seen = []
    block = model.get_model_object("diffusion_model").blocks[0].self_attn
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    try:
        tiny.sample(model, size=case.size, extra=extra, noise=noise)
    finally:
        hook.remove()
    return seen[0]


def different(one, other):
    return (one != other).any(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("case", CASES, ids=[f"{case.row}-{case.kind}-{n}" for n, case in enumerate(CASES)])
def test_the_layout_is_where_the_tokens_are_and_everything_in_full_is_dense(case, models, tiny_wan, kernel_calls):
    model, extra = models(case.kind), make_extra(case, tiny_wan)
    before, grid, after = case.layout
    video = math.prod(grid)
    tokens = first_tokens(model, tiny_wan, case, extra)
    assert len(tokens) == before + video + after

    # Changing a reference changes the tokens before and after the grid, and no token of the grid.
    moved = first_tokens(model, tiny_wan, case, extra | {name: changed(extra[name]) for name in case.references})
    beside = [*range(before), *range(before + video, len(tokens))]
    if case.references:
        assert different(tokens, moved) == beside
    # Changing one pixel of the latent changes one token: frame, row and column of the grid are in raster order.
    leading = case.size[2] - grid[0]
    for t, y, x in ((0, 1, 1), (1, 5, 7), (grid[0] - 1, case.size[3] - 1, case.size[4] - 1)):
        noise = tiny_wan.normal(*case.size, seed=1)
        noise[0, :, leading + t, y, x] += 1.0
        place = before + (t * grid[1] + y // 2) * grid[2] + x // 2
        assert different(tokens, first_tokens(model, tiny_wan, case, extra, noise)) == [place]

    stock = tiny_wan.sample(model, size=case.size, extra=extra)
    dense = tiny_wan.sample(patch_model(model, **FULL), size=case.size, extra=extra)
    assert layouts(kernel_calls) == {case.layout}
    assert len(kernel_calls) == case.calls
    assert distance(dense, stock) < 1e-4

    sparse = patch_model(model, **SPARSE)
    out = tiny_wan.sample(sparse, size=case.size, extra=extra)
    assert reports_nothing(sparse)
    # A dozen key blocks: whole ones are coarse.
    assert report(sparse)["mean_sparsity"] == pytest.approx(0.5, abs=0.06)
    assert torch.isfinite(out).all()
    assert distance(out, stock) > 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_sizes_that_nothing_divides(models, tiny_wan, seed):
    draw = torch.Generator().manual_seed(seed)
    frames, height, width = (int(torch.randint(*limits, (), generator=draw)) for limits in ((3, 7), (21, 34), (21, 34)))
    size = (1, 16, frames, height, width)
    stock = tiny_wan.sample(models("t2v"), size=size)
    full = patch_model(models("t2v"), **FULL)
    assert distance(tiny_wan.sample(full, size=size), stock) < 1e-5, size
    sparse = patch_model(models("t2v"), **SPARSE | {"sparsity": 0.4})
    assert torch.isfinite(tiny_wan.sample(sparse, size=size)).all(), size
    assert reports_nothing(full), size
    assert reports_nothing(sparse), size


def test_the_face_attention_of_animate_never_reaches_psa(models, tiny_wan):
    psa = patch_model(models("animate"), **SPARSE)
    extra = {"face_video_pixels": tiny_wan.normal(1, 3, 1, 512, 512)}
    assert torch.isfinite(tiny_wan.sample(psa, size=FIRST, extra=extra)).all()
    assert sparse_calls(psa) == [5]
    assert reports_nothing(psa)


def test_the_autoregressive_variant_stays_dense_with_a_reason(models):
    class WAN21_CausalAR:
        pass

    model = models("t2v").clone()
    causal = WAN21_CausalAR()
    causal.model_config = model.model.model_config
    model.model = causal
    assert "autoregressive" in find_family(model)


@pytest.mark.parametrize(
    ("name", "reason"), [("animate2", "this Wan model is Animate 2"), ("another", "this one is another")]
)
def test_a_variant_that_psa_does_not_know_stays_as_it_is(models, tiny_wan, monkeypatch, name, reason):
    model = models("t2v")
    monkeypatch.setitem(model.model.model_config.unet_config, "model_type", name)
    patched = patch_model(model, **SPARSE)
    assert reason in patched.get_attachment(KEY).note
    assert torch.equal(tiny_wan.sample(patched), tiny_wan.sample(model))
    assert report(patched) is None


def test_animate_2_stays_as_it_is(tiny_wan):
    """On cores that have it, from 0.33 on. Its files say which variant they are."""
    pytest.importorskip("comfy.ldm.wan.model_animate2")
    import comfy.sd

    metadata = {"config": '{"transformer": {"model_type": "animate2"}}'}
    model = comfy.sd.load_diffusion_model_state_dict(tiny_wan.state_dict("animate2"), metadata=metadata)
    patched = patch_model(model, **SPARSE)
    assert "this Wan model is Animate 2" in patched.get_attachment(KEY).note
    extra = {"pose_video_latent": tiny_wan.normal(1, 16, 3, 32, 32)}
    stock = tiny_wan.sample(model, size=FIRST, extra=extra)
    assert torch.equal(tiny_wan.sample(patched, size=FIRST, extra=extra), stock)


def test_the_family_lists_exactly_these_variants():
    rows = [(one.name, one.before, one.grid, one.after, one.psa) for one in FAMILY.variants]
    expected = list(dict.fromkeys((case.row, *case.columns, "sparse") for case in CASES))
    expected += [(row, "", "", "", f"dense: {why}") for row, why in DENSE.items()]
    assert sorted(rows) == sorted(expected)
