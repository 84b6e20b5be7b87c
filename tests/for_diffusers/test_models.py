"""Every transformer of diffusers that `apply_psa` knows, tiny and random: where its tokens lie, and that PSA with
nothing left out computes what dense computes. Wan and CogVideoX have files of their own.

As in tests/patching/test_families.py, changing one input changes exactly the queries that it makes.
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from comfyui_psa.for_diffusers import apply_psa, state

GRID = (3, 14, 16)
FRAME = 14 * 16
TIME = torch.tensor([900.0])
SIZES = dict(zip(("num_frames", "height", "width"), GRID, strict=True))
IMAGE = (1, 14, 16), 2


def text(pipes, width, tokens=13):
    return pipes.normal(1, tokens, width, seed=2)


def wan_size(frames=GRID[0]):
    return 1, 16, frames, 28, 32


WAN = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 64, "text_dim": 32}
LTX = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 2,
    "cross_attention_dim": 128,
    "num_layers": 2,
    "caption_channels": 32,
}


def vace(pipes, latent, references=0):
    control = pipes.normal(1, 96, latent.shape[2], 28, 32, seed=3)
    control[:, 16:, :references] = 0
    return {
        "hidden_states": latent, "timestep": TIME, "encoder_hidden_states": text(pipes, 32),
        "control_hidden_states": control,
    }  # fmt: skip


def animate(pipes, latent):
    return {
        "hidden_states": latent,
        "timestep": TIME,
        "encoder_hidden_states": text(pipes, 32),
        "encoder_hidden_states_image": pipes.normal(1, 9, 48, seed=5),
        "pose_hidden_states": pipes.normal(1, 16, latent.shape[2] - 1, 28, 32, seed=3),
        "face_pixel_values": pipes.normal(1, 3, 9, 64, 64, seed=4),
    }


def coordinates(*grids):
    """Those that diffusers gives to tokens of several grids, each as (its sizes, the index of its first frame)."""
    from diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt import get_latent_coords

    return torch.cat([get_latent_coords(*sizes, 1, "cpu", (8, 32, 32), first) for sizes, first in grids], 2) / 25


def ltx(pipes, latent, before=0, after=0, named=SIZES, grids=None):
    """named: sizes that the call names; grids: of the whole sequence, for pipelines that give coordinates instead."""
    tokens = latent.flatten(2).transpose(1, 2)
    tokens = torch.cat([pipes.normal(1, before, 16, seed=6), tokens, pipes.normal(1, after, 16, seed=7)], 1)
    known = coordinates(*grids) if grids else pipes.normal(1, 3, tokens.shape[1], seed=8) if before else None
    return {
        "hidden_states": tokens,
        "encoder_hidden_states": text(pipes, 32),
        "timestep": TIME,
        "encoder_attention_mask": torch.ones(1, 13),
        "video_coords": known,
        **named,
    }


def ltx2(pipes, latent, after=0, named=SIZES, grids=None):
    tokens = latent.flatten(2).transpose(1, 2)
    known = pipes.normal(1, 3, tokens.shape[1] + after, 2, seed=8) if after else None
    return {
        "hidden_states": torch.cat([tokens, pipes.normal(1, after, 16, seed=6)], 1),
        "audio_hidden_states": pipes.normal(1, math.prod(GRID), 16, seed=7),  # as many tokens as the video
        "encoder_hidden_states": text(pipes, 32),
        "audio_encoder_hidden_states": text(pipes, 32),
        "timestep": TIME,
        "audio_num_frames": math.prod(GRID),
        "video_coords": torch.stack([coordinates(*grids), coordinates(*grids) + 1], -1) if grids else known,
        **named,
    }


def kandinsky(pipes, latent):
    return {
        "hidden_states": latent.permute(0, 2, 3, 4, 1),
        "encoder_hidden_states": text(pipes, 32),
        "timestep": TIME,
        "pooled_projections": pipes.normal(1, 16, seed=3),
        "visual_rope_pos": tuple(torch.arange(size) for size in GRID),
        "text_rope_pos": torch.arange(13),
    }


def hunyuan(pipes, latent, image=True):
    """13 of 20 tokens of the text and 5 of 8 glyphs are no padding; the padding is not at the end of all of them."""
    mask, glyphs = torch.zeros(1, 20), torch.zeros(1, 8)
    mask[:, :13] = glyphs[:, 3:] = 1
    return {
        "hidden_states": latent,
        "timestep": TIME,
        "encoder_hidden_states": text(pipes, 32, 20),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": pipes.normal(1, 8, 16, seed=3),
        "encoder_attention_mask_2": glyphs,
        "image_embeds": pipes.normal(1, 9, 48, seed=5) * image,
    }


@dataclasses.dataclass
class Case:
    """name, sizes: of the class; inputs: from a latent of `size`; before, grid, after: where the tokens lie; calls: of
    self-attention over the video in a forward."""

    name: str
    sizes: dict
    inputs: Callable
    size: tuple
    before: int = 0
    grid: tuple = GRID
    after: int = 0
    calls: int = 2
    given: dict = dataclasses.field(default_factory=dict)


VACE = WAN | {"vace_layers": [0], "vace_in_channels": 96}
ANIMATE = WAN | {
    "in_channels": None, "latent_channels": 16, "image_dim": 48, "added_kv_proj_dim": 256, "motion_encoder_size": 64,
    "motion_style_dim": 16, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16, "32": 16, "64": 16},
}  # fmt: skip
LTX2 = LTX | {
    "attention_head_dim": 128, "cross_attention_dim": 256, "audio_in_channels": 16, "audio_out_channels": 16,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 128,
}  # fmt: skip
KANDINSKY = {
    "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": 32, "in_text_dim2": 16, "time_dim": 32, "model_dim": 128,
    "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2,
}  # fmt: skip
HUNYUAN = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2,
    "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 16, "image_embed_dim": 48,
}  # fmt: skip
PACKED = (1, 16, *GRID)
CASES = [
    Case("WanVACETransformer3DModel", VACE, vace, wan_size(), calls=3),
    Case("WanVACETransformer3DModel", VACE, vace, wan_size(4), before=FRAME, calls=3, given={"references": 1}),
    Case("WanAnimateTransformer3DModel", ANIMATE, animate, (1, 36, 4, 28, 32), before=FRAME),
    Case("LTXVideoTransformer3DModel", LTX | {"attention_head_dim": 64}, ltx, PACKED),
    Case("LTXVideoTransformer3DModel", LTX | {"attention_head_dim": 64}, ltx, PACKED, before=21, given={"before": 21}),
    Case(
        "LTXVideoTransformer3DModel",
        LTX | {"attention_head_dim": 64},
        ltx,
        PACKED,
        before=FRAME,
        given={"before": FRAME, "named": {}, "grids": (IMAGE, (GRID, 0))},
    ),
    Case(
        "LTXVideoTransformer3DModel",
        LTX | {"attention_head_dim": 64},
        ltx,
        PACKED,
        after=3 * FRAME,
        given={
            "after": 3 * FRAME,
            "named": dict.fromkeys(SIZES, 1),
            "grids": ((GRID, 0), ((2, 14, 16), 0), ((1, 14, 16), -1)),
        },
    ),
    Case("LTX2VideoTransformer3DModel", LTX2, ltx2, PACKED),
    Case(
        "LTX2VideoTransformer3DModel",
        LTX2,
        ltx2,
        PACKED,
        after=FRAME + 56,
        given={"after": FRAME + 56, "named": {}, "grids": ((GRID, 0), IMAGE, ((1, 7, 8), 0))},
    ),
    Case("LTX2VideoTransformer3DModel", LTX2, ltx2, PACKED, after=21, given={"after": 21}),
    Case("HunyuanVideo15Transformer3DModel", HUNYUAN, hunyuan, PACKED, after=13 + 5 + 9),
    Case("HunyuanVideo15Transformer3DModel", HUNYUAN, hunyuan, PACKED, after=13 + 5, given={"image": False}),
    Case("Kandinsky5Transformer3DModel", KANDINSKY, kandinsky, wan_size()),
]


def load(case):
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(diffusers, case.name)(**case.sizes).eval()
        for parameter in model.parameters():
            parameter.data = 0.1 * torch.randn_like(parameter) * min(1.0, (256 / max(1, parameter[0].numel())) ** 0.5)
    return model


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name}-{n}" for n, case in enumerate(CASES)])
def test_the_layout_is_where_the_tokens_are_and_everything_in_full_is_dense(case, pipes, monkeypatch):
    model = load(case)
    seen = []
    real = state.attend

    def spy(run, q, *args, **kwargs):
        seen.append((q[0].clone(), run.position.layout))
        return real(run, q, *args, **kwargs)

    monkeypatch.setattr(state, "attend", spy)
    latent = pipes.normal(*case.size, seed=1)

    def run(latent=latent):
        with torch.no_grad():
            return model(**case.inputs(pipes, latent, **case.given), return_dict=False)[0]

    stock = run()
    applied = apply_psa(model, **pipes.FULL)
    assert pipes.close(run(), stock, 1e-5)
    assert {(layout.before, layout.grid, layout.after) for _, layout in seen} == {(case.before, case.grid, case.after)}
    assert (applied.sparse_calls, applied.dense_calls) == (len(seen), 0) == (case.calls, 0)
    queries = seen[0][0]
    patch = case.size[3] // GRID[1]
    leading = case.size[2] - case.grid[0]
    for t, y, x in ((0, 1, 1), (1, 5, 7), (case.grid[0] - 1, case.size[3] - 1, case.size[4] - 1)):
        changed = latent.clone()
        changed[0, :, leading + t, y, x] += 1.0
        seen.clear()
        run(changed)
        place = case.before + (t * case.grid[1] + y // patch) * case.grid[2] + x // patch
        assert (queries != seen[0][0]).any(-1).any(0).nonzero().flatten().tolist() == [place]

    applied = apply_psa(model, 0.5, mode="topk", **pipes.SETTINGS)
    assert torch.isfinite(run()).all()
    assert (applied.sparse_calls, applied.fallbacks) == (case.calls, {})
    assert not pipes.close(run(), stock, 1e-5)


def test_a_model_with_sparse_attention_of_its_own_keeps_it(pipes, caplog):
    case = next(case for case in CASES if case.inputs is kandinsky)
    model = load(dataclasses.replace(case, sizes=case.sizes | {"attention_type": "nabla"}))
    model.set_attention_backend("flex")
    applied = apply_psa(model, 0.5, mode="topk", **pipes.SETTINGS)
    (said,) = (record.getMessage() for record in caplog.records if record.name == "ComfyUI-PSA")
    assert "sparse attention of its own (attention_type nabla)" in said
    assert "set_attention_backend" not in said
    with torch.no_grad():
        model(**case.inputs(pipes, pipes.normal(*case.size, seed=1)), return_dict=False)
    assert (applied.sparse_calls, applied.dense_calls) == (0, case.calls)
    assert [reason in said for reason in applied.fallbacks] == [True]


def test_prompts_of_different_lengths_in_one_call_stay_dense(pipes):
    case = next(case for case in CASES if case.inputs is hunyuan)
    model = load(case)
    one = case.inputs(pipes, pipes.normal(*case.size, seed=1))
    both = {name: torch.cat([value, value]) for name, value in one.items()}
    both["encoder_attention_mask"][1, 5:] = 0
    with torch.no_grad():
        stock = model(**both, return_dict=False)[0]
        applied = apply_psa(model, 0.5, mode="topk", **pipes.SETTINGS)
        assert torch.equal(model(**both, return_dict=False)[0], stock)
    assert [reason[:35] for reason in applied.fallbacks] == ["the prompts in one call of the model "[:35]]
