"""Every family of video models besides Wan and CogVideoX: where its tokens lie, and that PSA with nothing left out
computes what dense computes.

The positions have an oracle of their own: before the first attention, a token depends on nothing but its own patch, so
changing one input changes exactly the queries that it makes.
"""

import dataclasses
import itertools
import math

import pytest
import torch

from comfyui_psa.patching.family import families, find_family
from comfyui_psa.patching.patch import patch_model

from ..tiny_families import ONE_OF_EACH
from .patched import FULL, SPARSE, distance, layouts, report, reports_nothing

TEXT = 13
FRAME = 14 * 16


@dataclasses.dataclass
class Case:
    """A row of the table in docs/compatibility.md, and a model with inputs to try it with.

    Attributes:
        extra: conditioning values, made from `tiny`. references: those that change tokens beside the grid.
        before, grid, after: where the tokens lie. changed: which tokens the references make, from and to.
        frozen: frames of the grid that an input replaces. calls: self-attention calls of a forward.
        more: arguments of the sampler.
    """

    row: str
    kind: str
    before: int = 0
    after: int = 0
    grid: tuple = (3, 14, 16)
    size: tuple | None = None
    extra: dict = dataclasses.field(default_factory=dict)
    references: tuple = ()
    changed: tuple = (0, 0)
    frozen: int = 0
    calls: int = 2
    more: dict = dataclasses.field(default_factory=dict)


def of(*shape, seed=5):
    return lambda tiny: tiny.normal(*shape, seed=seed)


def first_frame(frames, height, width):
    """A noise mask that keeps the first frame."""
    mask = torch.ones(1, 1, frames, height, width)
    mask[:, :, 0] = 0
    return {"noise_mask": mask}


def guides(left_out):
    """The last of four frames is a guide; the model leaves out its first tokens."""
    mask = torch.ones(1, 1, 4, 14, 16)
    mask[:, :, 3] = 0
    mask[:, :, 3].view(-1)[:left_out] = -1
    return {"noise_mask": mask}


def keyframe(tiny):
    return [{"resolved_frame_index": 0, "latent": tiny.normal(1, 24, 1, 28, 32, seed=6)}]


def references(tiny):
    image = {"kind": "image", "latent_h": 8, "latent_w": 12, "latent": tiny.normal(1, 24, 1, 8, 12, seed=6)}
    sound = {"kind": "audio", "ref_audio_t": 5, "audio_latent": tiny.normal(1, 32, 2, 5, seed=7)}
    return [image, sound]


CASES = [
    Case("1.0 T2V, I2V", "hunyuan", TEXT, calls=4),
    Case(
        "1.0 T2V, I2V", "hunyuan i2v", TEXT, calls=4,
        extra={"concat_latent_image": of(1, 16, 3, 28, 32), "concat_mask": lambda _: torch.ones(1, 1, 3, 28, 32)},
    ),
    Case("1.0 T2V, I2V", "hunyuan", TEXT, calls=4, extra={"guiding_frame_index": lambda _: 0}),
    Case(
        "1.0 with a reference image", "hunyuan", TEXT + FRAME, calls=4,
        extra={"ref_latent": of(1, 16, 1, 28, 32)}, references=("ref_latent",),
        changed=(TEXT, TEXT + FRAME),
    ),
    Case("SkyReels I2V", "hunyuan skyreels", TEXT, calls=4, extra={"concat_latent_image": of(1, 16, 3, 28, 32)}),
    Case("1.5 T2V, I2V", "hunyuan 1.5", TEXT, calls=4),
    Case(
        "1.5 T2V, I2V", "hunyuan 1.5", TEXT + 7 + 9, calls=4,
        extra={
            "conditioning_byt5small": of(1, 7, 1472),
            "clip_vision_output": lambda tiny: tiny.vision(),
            "concat_latent_image": of(1, 32, 3, 14, 16),
        },
        references=("conditioning_byt5small",), changed=(9, 16),
    ),
    Case("1.5 T2V, I2V", "hunyuan 1.5", TEXT, calls=4, grid=(5, 11, 13), size=(1, 32, 5, 11, 13)),
    Case("1.5 upscaling", "hunyuan 1.5 sr", TEXT, calls=4),
    Case("0.9 2B T2V, I2V", "ltx 0.9"),
    Case("0.9 2B T2V, I2V", "ltx 0.9", grid=(5, 11, 13), size=(1, 16, 5, 11, 13)),
    Case("0.9 2B T2V, I2V", "ltx 0.9", frozen=1, more=first_frame(3, 14, 16)),
    Case(
        "keyframe guides", "ltx 0.9", after=FRAME - 30, size=(1, 16, 4, 14, 16),
        extra={"keyframe_idxs": of(1, 3, FRAME, 2)}, more=guides(30),
    ),
    Case("0.9 13B T2V, I2V", "ltx 13b"),
    Case("2 with or without sound", "ltx 2"),
    Case("2 with or without sound", "ltx 2 silent"),
    Case(
        "keyframe guides", "ltx 2", after=FRAME, size=(1, 16, 4, 14, 16),
        extra={"keyframe_idxs": of(1, 3, FRAME, 2)}, more=guides(0),
    ),
    Case("Lite T2V, I2V", "kandinsky 5 lite"),
    Case("Lite T2V, I2V", "kandinsky 5 lite", frozen=1, extra={"time_dim_replace": of(1, 16, 1, 28, 32)}),
    Case("Pro T2V, I2V", "kandinsky 5 pro", grid=(5, 11, 13), size=(1, 16, 5, 22, 26)),
    Case("T2V, I2V", "cosmos"),
    Case("T2V, I2V", "cosmos", grid=(5, 11, 13), size=(1, 16, 5, 21, 25)),
    Case("T2V, I2V", "cosmos i2v", frozen=1, more=first_frame(3, 28, 32)),
    Case("1 preview", "mochi", after=TEXT),
    Case("T2V", "minimax h3", TEXT + 20),
    Case("T2V", "minimax h3", TEXT + 20, grid=(5, 11, 13), size=(1, 24, 5, 21, 25)),
    Case(
        "with keyframes or references", "minimax h3", TEXT + FRAME + 20,
        extra={"minimax_keyframes": keyframe, "minimax_frame_count": lambda _: 9},
    ),
    Case("with keyframes or references", "minimax h3", TEXT + 24 + 10 + 20, extra={"minimax_refs": references}),
]  # fmt: skip


def different(one, other):
    return (one != other).any(-1).any(0).nonzero().flatten().tolist()


def variant(kind, row):
    """The row of the family's file that a kind of model belongs to."""
    start = kind.split()[0]
    (family,) = (one for one in families() if any(name.startswith(start) for name in one.image_models))
    (found,) = (one for one in family.variants if one.name == row)
    return found


def test_every_row_of_the_new_families_has_a_case():
    listed = {one.name for family in families() for one in family.variants if family.name not in OTHER_FILES}
    assert {case.row for case in CASES} | {row for row, *_ in DENSE} == listed


OTHER_FILES = ("CogVideoX", "Wan2.1 and Wan2.2")


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}-{n}" for n, case in enumerate(CASES)])
def test_the_layout_is_where_the_tokens_are_and_everything_in_full_is_dense(case, models, tiny_families, kernel_calls):
    model, tiny = models(case.kind), tiny_families
    extra = {name: make(tiny) for name, make in case.extra.items()}
    size = case.size or tiny.KINDS[case.kind].size
    video = math.prod(case.grid)

    def run(model, extra=extra, **more):
        return tiny.sample(model, case.kind, size=size, extra=extra, **(case.more | more))

    stock, full = run(model), patch_model(model, **FULL)
    assert distance(run(full), stock) < 1e-5
    assert layouts(kernel_calls) == {(case.before, case.grid, case.after)}
    assert len(kernel_calls) == case.calls
    (queries,) = kernel_calls[0].q
    assert str(queries.shape[2]) in variant(case.kind, case.row).heads
    assert queries.shape[1] == case.before + video + case.after

    if case.references:
        kernel_calls.clear()
        run(full, extra | {name: extra[name] + 1.0 for name in case.references})
        assert different(queries, kernel_calls[0].q[0]) == list(range(*case.changed))
    patch_y, patch_x = (-(-side // cells) for side, cells in zip(size[3:], case.grid[1:], strict=True))
    for t, y, x in ((case.frozen, 1, 1), (1, 5, 7), (case.grid[0] - 1, size[3] - 1, size[4] - 1)):
        noise = tiny.normal(*size, seed=1)
        noise[0, :, t, y, x] += 1.0
        kernel_calls.clear()
        run(full, noise=noise)
        place = case.before + (t * case.grid[1] + y // patch_y) * case.grid[2] + x // patch_x
        assert different(queries, kernel_calls[0].q[0]) == [place]

    sparse = patch_model(model, **SPARSE)
    out = run(sparse)
    assert reports_nothing(sparse)
    assert report(sparse)["mean_sparsity"] == pytest.approx(0.5, abs=0.06)  # a dozen key blocks: whole ones are coarse
    assert torch.isfinite(out).all()
    assert distance(out, stock) > 1e-5


def random_sizes(kind, tiny):
    """Frames, heights and widths that nothing divides, and some that something does."""
    draw = torch.Generator().manual_seed(len(kind))
    channels, per_cell = tiny.KINDS[kind].size[1], tiny.KINDS[kind].size[3] // 14
    while True:
        frames, *sides = (int(torch.randint(*limits, (), generator=draw)) for limits in SIZES)
        height, width = (side * per_cell // 2 for side in sides)
        yield 1, channels, frames, height, width


SIZES = (3, 7), (20, 31), (20, 31)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_any_size_that_the_core_accepts_runs(kind, models, tiny_families):
    model, tiny = models(kind), tiny_families
    full, sparse = patch_model(model, **FULL), patch_model(model, **SPARSE | {"sparsity": 0.4})
    accepted = 0
    for size in itertools.islice(random_sizes(kind, tiny), 12):
        try:
            stock = tiny.sample(model, kind, size=size)
        except (RuntimeError, AssertionError):  # no size for this model, with or without PSA
            continue
        assert distance(tiny.sample(full, kind, size=size), stock) < 1e-5, size
        assert reports_nothing(full), size
        assert torch.isfinite(tiny.sample(sparse, kind, size=size)).all(), size
        assert reports_nothing(sparse), size
        accepted += 1
        if accepted == 2:
            return
    raise AssertionError("the model accepts hardly any size")


DENSE = [
    (
        "padded prompts",
        "hunyuan",
        {"attention_mask": lambda _: torch.tensor([[1] * 10 + [0] * 3])},
        {},
        "this prompt is padded",
    ),
    (
        "guides with a strength or mask",
        "ltx 0.9",
        {
            "keyframe_idxs": of(1, 3, FRAME, 2),
            "guide_attention_entries": lambda _: [
                {"pre_filter_count": FRAME, "strength": 0.5, "pixel_mask": None, "latent_shape": (1, 14, 16)}
            ],
        },
        {"size": (1, 16, 4, 14, 16), **guides(0)},
        "in all LTXVAddGuide nodes, set strength to 1 and unplug attention_mask",
    ),
]


@pytest.mark.parametrize(("row", "kind", "extra", "more", "reason"), DENSE)
def test_what_psa_cannot_do_stays_dense_and_says_why(row, kind, extra, more, reason, models, tiny_families):
    assert variant(kind, row).psa.startswith("dense: ")
    model = models(kind)
    extra = {name: make(tiny_families) for name, make in extra.items()}
    stock = tiny_families.sample(model, kind, extra=extra, **more)
    sparse = patch_model(model, **SPARSE)
    assert torch.equal(tiny_families.sample(sparse, kind, extra=extra, **more), stock)
    (found,) = report(sparse)["fallbacks"]
    assert reason in found["reason"]
    assert found["calls"] == find_family(model).blocks
    assert report(sparse)["notes"] == []


def test_the_advice_for_guides_names_a_node_and_its_inputs(comfyui):
    from comfy_extras.nodes_lt import LTXVAddGuide

    schema = LTXVAddGuide.define_schema()
    assert schema.node_id == "LTXVAddGuide"
    assert {"strength", "attention_mask"} <= {one.id for one in schema.inputs}


def test_a_call_that_cannot_be_read_stays_dense_and_ends_no_run(models, tiny_families, monkeypatch):
    from comfyui_psa.patching.families import cosmos_predict2

    model = models("cosmos")
    stock = tiny_families.sample(model, "cosmos")
    sparse = patch_model(model, **SPARSE)
    monkeypatch.setattr(cosmos_predict2, "grid_of", lambda *_: [].pop())
    assert torch.equal(tiny_families.sample(sparse, "cosmos"), stock)
    (found,) = report(sparse)["fallbacks"]
    assert found["reason"].startswith("PSA cannot read the inputs of this model call")


def test_a_file_in_the_folder_is_a_family(models, tmp_path, monkeypatch):
    from comfyui_psa.patching import families, family

    (tmp_path / "toy.py").write_text(
        "from ..support import Family\nFAMILY = Family('Toy', ('toy',), lambda model, config: 'toys stay dense', ())\n"
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    family.families.cache_clear()
    try:
        model = models("cosmos").clone()
        monkeypatch.setitem(model.model.model_config.unet_config, "image_model", "toy")
        assert family.find_family(model) == "toys stay dense"
        monkeypatch.setitem(model.model.model_config.unet_config, "image_model", "nobody's")
        assert "Toy" in family.find_family(model)
    finally:
        family.families.cache_clear()


def test_models_without_a_time_axis_are_not_for_psa(models):
    import comfy.latent_formats

    class Holder:
        latent_format = comfy.latent_formats.Flux()

    model = models("cosmos").clone()
    model.model = Holder()
    assert "images or sound" in find_family(model)
