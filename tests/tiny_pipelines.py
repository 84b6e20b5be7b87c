"""Tiny diffusers transformers with random weights, their pipelines, and a run of either. Imported by a fixture."""

import torch

SETTINGS = {"min_tokens": 0, "warm_up": 0}
FULL = SETTINGS | {"sparsity": 0.01, "mode": "topk", "shares": {1: 1.0}}
SIZE = (1, 16, 3, 32, 32)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wan(layers=2, seed=0, heads=2):
    """A tiny WanTransformer3DModel with random weights."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=128, num_layers=layers, ffn_dim=256, text_dim=4096,
        ).eval()  # fmt: skip
        for parameter in model.parameters():
            parameter.data = 0.1 * torch.randn_like(parameter) * min(1.0, (256 / max(1, parameter[0].numel())) ** 0.5)
    return model


def call(model, latents=None, timestep=1000.0, text=13):
    """One forward, with autograd as it is set."""
    latents = normal(*SIZE, seed=1) if latents is None else latents
    return model(latents, torch.tensor([timestep]), normal(1, text, 4096, seed=2), return_dict=False)[0]


def velocity(model, **given):
    with torch.no_grad():
        return call(model, **given)


def pipeline(*transformers):
    """What apply_psa needs of a Wan pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    names = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler}
    second = {"transformer_2": transformers[1], "boundary_ratio": 0.5} if len(transformers) > 1 else {}
    pipe = WanPipeline(transformer=transformers[0], **names, **second)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps=4, size=SIZE, **given):
    """One run of the pipeline; size: of the latents."""
    frames, height, width = 4 * size[2] - 3, 8 * size[3], 8 * size[4]
    given = {"guidance_scale": 1.0, "latents": normal(*size, seed=1), "output_type": "latent"} | given
    return pipe(
        prompt_embeds=normal(1, 13, 4096, seed=2).to(pipe._execution_device), num_inference_steps=steps, height=height,
        width=width, num_frames=frames, **given,
    ).frames  # fmt: skip


def close(one, other, tolerance):
    return float((one - other).norm() / other.norm()) < tolerance
