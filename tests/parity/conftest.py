"""Both sides of a comparison: the same tiny model, embeddings and noise, in diffusers and in ComfyUI."""

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="session")
def checkpoints(model_folders, tiny):
    """checkpoints(kind) -> the diffusers transformer and the MODEL that PSA CogVideoX Loader makes of its folder."""
    from comfyui_psa.loading.checkpoint import load_checkpoint

    made = {}

    def checkpoint(kind):
        if kind not in made:
            # One shard or many, in turn.
            reference = tiny.write_folder(model_folders / "diffusers" / kind, kind, shards=len(made) % 2 == 0)
            model = load_checkpoint(kind)
            made[kind] = SimpleNamespace(reference=reference, model=model, scale=model.model.latent_format.scale_factor)
        return made[kind]

    return checkpoint


@pytest.fixture(scope="session")
def loras(model_folders, tiny):
    """loras(kind) -> ({way: file name}, {way: the diffusers transformer with it}); see `write_loras`."""
    made = {}

    def lora(kind):
        if kind not in made:
            files, references = tiny.write_loras(model_folders / "loras" / kind, kind)
            made[kind] = {way: f"{kind}/{file}" for way, file in files.items()}, references
        return made[kind]

    return lora


@pytest.fixture(scope="session")
def sample(comfyui, tiny):
    """sample(model, noise, steps, solver, ...) -> latent as PSA's nodes and ComfyUI's Custom Sampler make it."""

    def run(
        model, noise, steps, solver, *, seed=7, guidance=1.0, image=None, latent=None, denoise=1.0, positive=None,
        negative=None,
    ):  # fmt: skip
        import comfy.sample

        from comfyui_psa.cogvideox.sampler import make_sampler
        from comfyui_psa.cogvideox.schedule import trailing_sigmas

        given = {} if image is None else {"concat_latent_image": image}
        conds = [
            [[tiny.text() if positive is None else positive, dict(given)]],
            [[tiny.text(6) if negative is None else negative, dict(given)]],
        ]
        latent = torch.zeros_like(noise) if latent is None else latent
        sigmas = trailing_sigmas(model, steps, denoise)
        return comfy.sample.sample_custom(
            model, noise, guidance, make_sampler(solver), sigmas, *conds, latent, seed=seed, disable_pbar=True
        )

    return run
