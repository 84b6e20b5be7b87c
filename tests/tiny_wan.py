"""Tiny random Wan models of every variant, from ComfyUI's own classes, loaded by ComfyUI's own detection.

Two heads of 128, two layers (Animate five). Nothing of the pack is used here.
"""

import importlib
from types import SimpleNamespace

import torch

SIZE = (1, 16, 3, 32, 32)  # 3 frames of 16 x 16 tokens
FRAME = 256

CLASSES = {
    "t2v": ("model", "WanModel", {}),
    "5b": ("model", "WanModel", {"in_dim": 48, "out_dim": 48}),
    "i2v": ("model", "WanModel", {"model_type": "i2v", "in_dim": 36}),
    "i2v 2.2": ("model", "WanModel", {"in_dim": 36}),
    "flf": ("model", "WanModel", {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514}),
    "fun": ("model", "WanModel", {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16}),
    "vace": ("model", "VaceWanModel", {"vace_layers": 1, "vace_in_dim": 96}),
    "camera": ("model", "CameraWanModel", {"in_dim": 32}),
    "camera 2.2": ("model", "CameraWanModel", {"model_type": "camera_2.2", "in_dim": 36}),
    "humo": ("model", "HumoWanModel", {}),
    "s2v": ("model", "WanModel_S2V", {}),
    "animate": ("model_animate", "AnimateWanModel", {"in_dim": 36, "num_layers": 5}),
    "scail": ("model", "SCAILWanModel", {"in_dim": 20}),
    "scail2": ("model", "SCAIL2WanModel", {"in_dim": 20}),
    "animate2": ("model_animate2", "WanAnimate2Model", {"in_dim": 36}),
    "wandancer": ("model_wandancer", "WanDancerModel", {"in_dim": 36}),
}
"""kind -> module in comfy.ldm.wan, class, arguments besides the common ones."""


def load(kind, dtype=torch.float32, scale=0.1, **changes):
    """A ComfyUI MODEL of this kind with random weights."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(state_dict(kind, dtype, scale, **changes))


def state_dict(kind, dtype=torch.float32, scale=0.1, **changes):
    """Its weights, by the names of a checkpoint."""
    import comfy.ops

    module, name, arguments = CLASSES[kind]
    network = getattr(importlib.import_module(f"comfy.ldm.wan.{module}"), name)
    common = {"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2}
    arguments = common | arguments | changes
    blank = network(**arguments, operations=comfy.ops.disable_weight_init, dtype=dtype, device="meta")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in blank.state_dict().items():
        # A wide projection from few channels to many would drown everything else.
        damped = scale * min(1.0, (256 / max(1, value[0].numel())) ** 0.5) if value.ndim > 1 else scale
        state[key] = (torch.randn(value.shape, generator=generator) * damped).to(dtype)
    return state


def normal(*shape, seed=0):
    """Random values that a seed fixes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def vision(tokens=257, seed=3):
    """Instead of a CLIP vision output."""
    return SimpleNamespace(penultimate_hidden_states=normal(1, tokens, 1280, seed=seed))


def conditioning(text=13, seed=2, **extra):
    """CONDITIONING without a text encoder."""
    return [[normal(1, text, 4096, seed=seed), extra]]


def area(seed, height, width, y, x):
    """CONDITIONING for an area of the frames, in latent pixels."""
    return conditioning(seed=seed, area=(3, height, width, 0, y, x))


def sample(
    model, steps=1, cfg=1.0, sampler="euler", scheduler="simple", size=SIZE, extra=None, negative=None, positive=None,
    callback=None, noise=None, latent=None, **more,
):  # fmt: skip
    """Sample through ComfyUI's own KSampler code, on one thread: at this size more only wait for each other."""
    import comfy.sample

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    noise = normal(*size, seed=1) if noise is None else noise
    latent = torch.zeros(size) if latent is None else latent
    positive = conditioning(**(extra or {})) if positive is None else positive
    negative = conditioning(seed=4, **(extra or {})) if negative is None else negative
    try:
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, seed=1, callback=callback,
            disable_pbar=True, **more,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def sample_custom(model, sigmas, sampler="euler", cfg=1.0, size=SIZE):
    """Sample along these noise levels; sampler: a name or a KSAMPLER."""
    import comfy.sample
    import comfy.samplers

    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    positive, negative = conditioning(), conditioning(seed=4)
    return comfy.sample.sample_custom(
        model, normal(*size, seed=1), cfg, sampler, torch.tensor(sigmas), positive, negative, torch.zeros(size), seed=1,
        disable_pbar=True,
    )  # fmt: skip
