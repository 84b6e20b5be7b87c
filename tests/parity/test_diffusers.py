"""Whole trajectories of ComfyUI with this pack against diffusers' pipelines: same weights, embeddings and noise.

Prints the table of relative errors (norm of the difference over norm of diffusers' result) at the end.
"""

import dataclasses

import pytest
import torch

BOUND = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison; `size` is latent frames, rows, columns."""

    kind: str
    size: tuple[int, int, int]
    solver: str = "dpm"
    steps: int = 4
    guidance: float = 1.0
    lora: str = ""
    psa: bool = False
    repeated: bool = False

    def __str__(self):
        words = [self.kind, "x".join(map(str, self.size)), self.solver, f"{self.steps}", f"cfg{self.guidance:g}"]
        words += [f"lora-{self.lora}"] * bool(self.lora) + ["psa"] * self.psa + ["452-tokens"] * self.repeated
        return "-".join(words)


NATIVE, SMALL, PORTRAIT = (2, 60, 90), (4, 12, 20), (3, 20, 12)
CASES = [
    *(
        Case("5b", size, solver, steps)
        for size in (NATIVE, SMALL, PORTRAIT)
        for solver in ("dpm", "ddim")
        for steps in (4, 10)
    ),
    # Step counts that do not divide 1000.
    Case("5b", SMALL, "dpm", 7),
    Case("5b", SMALL, "ddim", 30),
    Case("5b", SMALL, "dpm", 10, guidance=6.0),
    Case("5b", SMALL, "dpm", 4, guidance=6.0, repeated=True),
    *(Case("1.5", (frames, 12, 20), "dpm", steps) for frames in (4, 5) for steps in (4, 10)),
    *(Case("1.5", (frames, 12, 20), "ddim") for frames in (4, 5)),
    Case("1.5", (3, 20, 12), "dpm", guidance=6.0),
    # 41 to 161 frames, and 2B at sizes that it was not trained at.
    *(Case("1.5", (frames, 6, 8)) for frames in (11, 12, 21, 31, 41)),
    *(Case("1.5-i2v", (frames, 6, 8)) for frames in (11, 21, 41)),
    *(Case("2b", size) for size in ((2, 96, 170), (3, 90, 60), (13, 30, 46))),
    *(Case("2b", size, solver) for size in (NATIVE, SMALL) for solver in ("ddim", "dpm")),
    Case("2b", SMALL, "ddim", 10, guidance=6.0),
    Case("5b-i2v", (2, 60, 90), "dpm", 4, guidance=6.0),
    Case("5b-i2v", (13, 60, 90), "ddim", 2),
    *(Case("1.5-i2v", (frames, 12, 20), solver) for frames in (4, 5) for solver in ("dpm", "ddim")),
    *(Case(kind, SMALL, lora=way) for kind in ("5b", "1.5") for way in ("metadata", "tensors", "nowhere")),
    Case("5b", SMALL, steps=10, lora="metadata"),
    Case("5b", NATIVE, psa=True),
    Case("5b", SMALL, steps=10, guidance=6.0, psa=True),
    Case("5b", SMALL, guidance=6.0, psa=True, repeated=True),
    Case("5b", SMALL, lora="metadata", psa=True),
    Case("1.5", (5, 12, 20), psa=True),
    Case("1.5-i2v", (5, 12, 20), psa=True),
]


@pytest.fixture(scope="module")
def table(request):
    """Collects (case, error) and prints them when the module is through."""
    rows = []
    yield rows
    lines = [f"{'case':44} relative error", *(f"{case:44} {error:.1e}" for case, error in rows)]
    lines.append(f"{len(rows)} comparisons, worst {max(error for _, error in rows):.1e}, bound {BOUND:.0e}")
    plugins = request.config.pluginmanager
    with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
        plugins.get_plugin("terminalreporter").write_line("\n\n" + "\n".join(lines))


def relative_error(out, expected):
    return float((out - expected).norm() / expected.norm())


def noise(size, seed=1):
    return torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(seed))


def with_front_frame(latents, seed):
    """The frame that diffusers adds to an odd number for 1.5; ours comes from the seed after the given one."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.cat([torch.randn(1, 16, 1, *latents.shape[3:], generator=generator), latents], 2)


def in_full(model):
    """PSA with every block at full resolution; only rounding can be left."""
    from comfyui_psa.patching.patch import patch_model

    return patch_model(
        model,
        sparsity=1e-4,
        preset="auto",
        mode="topk",
        pyramid="1: 1.0",
        block_q="32",
        block_kv="32",
        start_percent=0.0,
        end_percent=1.0,
        min_tokens=0,
        correction="off",
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_trajectory_equals_diffusers(checkpoints, loras, sample, tiny, table, case):
    checkpoint = checkpoints(case.kind)
    reference, model = checkpoint.reference, checkpoint.model
    if case.lora:
        from comfyui_psa.loading.lora import apply_lora

        files, references = loras(case.kind)
        reference, (model, _) = references[case.lora], apply_lora(model, files[case.lora], 1.0)
    if case.psa:
        model = in_full(model)
    latents = noise(case.size)
    options = {"guidance": case.guidance}
    if "i2v" in case.kind:
        options["image"] = noise((1, *case.size[1:]), seed=2)
    theirs, frames = latents, case.size[0]
    if case.kind.startswith("1.5") and frames % 2:
        theirs, options_of_frames = with_front_frame(latents, seed=7), {"frames": 4 * frames - 3}
    else:
        options_of_frames = {}
    prompts = {}
    if case.repeated:
        # ComfyUI repeats the shorter prompt; diffusers is given both at that length.
        options["negative"] = tiny.text(6, 2 * tiny.TEXT)
        prompts["positive"] = tiny.text().repeat(1, 2, 1)
    expected = tiny.run_pipeline(
        reference, case.kind, case.solver, theirs, case.steps, scale=checkpoint.scale, **options, **prompts,
        **options_of_frames,
    )[:, :, -frames:]  # fmt: skip
    out = sample(model, latents, case.steps, case.solver, **options) * checkpoint.scale

    error = relative_error(out, expected)
    table.append((str(case), error))
    assert out.shape == latents.shape
    assert error <= BOUND
    if case.psa:
        from comfyui_psa.patching.patch import KEY

        report = model.get_attachment(KEY).report
        assert report["mean_sparsity"] == pytest.approx(0, abs=1e-6)
        assert report["fallbacks"] == []
        assert sum(step["sparse_calls"] for step in report["steps"]) == 2 * case.steps
        assert list(report["layers"]) == ["0", "1"], "CogVideoX does not say its block; the run counts them"


@pytest.mark.parametrize("solver", ["dpm", "ddim"])
def test_a_part_of_the_schedule_equals_diffusers_video_to_video(checkpoints, sample, tiny, table, solver):
    checkpoint = checkpoints("5b")
    latent, start = noise(SMALL, seed=3), noise(SMALL)
    scheduler = tiny.scheduler("5b", solver)
    scheduler.set_timesteps(10)
    begun = scheduler.add_noise(latent, start, scheduler.timesteps[5:6])
    expected = tiny.run_pipeline(checkpoint.reference, "5b", solver, begun, 10, strength=0.5)
    out = sample(checkpoint.model, start, 5, solver, latent=latent / checkpoint.scale, denoise=0.5) * checkpoint.scale
    error = relative_error(out, expected)
    table.append((f"5b-4x12x20-{solver}-5 of 10-video to video", error))
    assert error <= BOUND


def padded(forward):
    """The forward of a diffusers transformer on latents padded to even sizes, circularly, as ComfyUI pads them."""

    def run(hidden_states, **kwargs):
        rows, columns = hidden_states.shape[3:]
        x = torch.nn.functional.pad(hidden_states, (0, columns % 2, 0, rows % 2, 0, 0), mode="circular")
        return (forward(hidden_states=x, **kwargs)[0][..., :rows, :columns],)

    return run


@pytest.mark.parametrize("kind", ["5b", "2b", "1.5", "1.5-i2v"])
@pytest.mark.parametrize("size", [(4, 13, 20), (2, 12, 21), (4, 13, 21)])
def test_odd_sizes_are_those_of_the_padded_model(checkpoints, sample, tiny, table, monkeypatch, kind, size):
    """8 x odd pixels (1080 rows, say): diffusers cannot make them; the oracle is its model on the padded latent."""
    import diffusers

    checkpoint = checkpoints(kind)
    for pipeline in (diffusers.CogVideoXPipeline, diffusers.CogVideoXImageToVideoPipeline):
        prepare = pipeline._prepare_rotary_positional_embeddings
        monkeypatch.setattr(
            pipeline,
            "_prepare_rotary_positional_embeddings",
            lambda self, height, width, *rest, prepare=prepare: prepare(
                self, height + height % 16, width + width % 16, *rest
            ),
        )
    latents = noise(size)
    options = {"image": noise((1, *size[1:]), seed=2)} if "i2v" in kind else {}
    reference = checkpoint.reference
    monkeypatch.setattr(reference, "forward", padded(reference.forward))
    expected = tiny.run_pipeline(reference, kind, "dpm", latents, 2, scale=checkpoint.scale, **options)
    out = sample(checkpoint.model, latents, 2, "dpm", **options) * checkpoint.scale
    error = relative_error(out, expected)
    table.append((f"{kind}-{'x'.join(map(str, size))}-padded", error))
    assert error <= BOUND


def test_a_rerun_at_another_size_leaves_nothing_of_it(checkpoints, sample):
    model = checkpoints("1.5-i2v").model
    first, other, again = (
        sample(model, noise(size), 2, "dpm", image=noise((1, *size[1:]), seed=2))
        for size in ((4, 12, 20), (3, 20, 12), (4, 12, 20))
    )
    assert torch.equal(first, again)
    assert other.shape == (1, 16, 3, 20, 12)


def test_a_model_with_trained_positions_refuses_other_sizes(checkpoints, sample):
    with pytest.raises(
        ValueError, match=r"'160x96 pixels' was given; allowed: 720x480 pixels, .* Set width 720 and height 480"
    ):
        sample(checkpoints("5b-i2v").model, noise(SMALL), 1, "dpm", image=noise((1, 12, 20), seed=2))


def test_fp8_weights_stay_near(checkpoints, sample):
    from comfyui_psa.loading.checkpoint import load_checkpoint

    exact = sample(checkpoints("5b").model, noise(SMALL), 4, "dpm")
    for weight_dtype, bound in (("fp8_e4m3fn", 0.1), ("fp8_e5m2", 0.2)):
        error = relative_error(sample(load_checkpoint("5b", weight_dtype), noise(SMALL), 4, "dpm"), exact)
        assert 1e-4 < error < bound


def test_the_bound_notices_what_the_corrections_are_for(checkpoints, loras, sample, model_folders):
    """The same comparison, with one correction or the LoRA left out, is far beyond the bound."""
    import comfy.sd

    from comfyui_psa.cogvideox.corrections import correct_model
    from comfyui_psa.loading.checkpoint import find_checkpoint, read_checkpoint
    from comfyui_psa.loading.lora import apply_lora

    latents, odd = noise(SMALL), noise((5, 12, 20))

    def without(kind, *patches):
        """The corrected model with some object patches taken away."""
        variant = checkpoints(kind).model.get_attachment("psa_cogvideox")
        tensors, _ = read_checkpoint(find_checkpoint(kind))
        model = correct_model(comfy.sd.load_diffusion_model_state_dict(tensors), variant)
        for patch in patches:
            del model.object_patches[f"diffusion_model.{patch}"]
        return model

    right = sample(checkpoints("5b").model, latents, 4, "dpm")
    assert relative_error(sample(without("5b"), latents, 4, "dpm"), right) < 1e-6, "the means of this test are right"
    assert relative_error(sample(without("5b", "_get_rotary_emb"), latents, 4, "dpm"), right) > 10 * BOUND
    right = sample(checkpoints("2b").model, latents, 4, "ddim")
    assert relative_error(sample(without("2b", "patch_embed.__class__"), latents, 4, "ddim"), right) > 10 * BOUND
    padded = sample(checkpoints("1.5").model, odd, 4, "ddim")
    plain = without("1.5")
    plain.remove_wrappers_with_key("outer_sample", "psa_cogvideox")
    assert relative_error(sample(plain, odd, 4, "ddim"), padded) > 10 * BOUND
    model = checkpoints("5b").model
    files, _ = loras("5b")
    outs = [sample(apply_lora(model, files[way], 1.0)[0], latents, 4, "dpm") for way in ("metadata", "nowhere")]
    assert relative_error(outs[1], outs[0]) > 10 * BOUND
    assert relative_error(sample(model, latents, 4, "dpm"), outs[1]) > 10 * BOUND
