"""What the tests of several GPUs ask of one process or of several: a sampled tiny model, with PSA and without."""

import importlib.util
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

TESTS = Path(__file__).resolve().parents[1]


def helper(name):
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SelfAttention(TorchFunctionMode):
    """Notes the shapes of all calls with as many queries as keys."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
            if query.shape == key.shape:
                self.shapes.append(tuple(query.shape))
        return func(*args, **kwargs)


def wan(
    *, psa=None, parallel=None, psa_first=True, steps=3, size=(1, 16, 3, 32, 32), heads=4, guidance=1.0, device="cpu"
):
    """A Wan pipeline's latents, and what PSA did.

    Args:
        psa: the arguments of apply_psa; None for dense. parallel: those of ContextParallelConfig; None for one process.
        device: cpu in float32, or cuda in bfloat16, the current one.
    """
    from diffusers import ContextParallelConfig

    from comfyui_psa.for_diffusers import apply_psa

    pipes = helper("tiny_pipelines")
    model = pipes.wan(heads=heads).to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    pipe = pipes.pipeline(model)
    applied = apply_psa(pipe, **psa) if psa is not None and psa_first else None
    if parallel is not None:
        with on_a_cpu():
            model.enable_parallelism(config=ContextParallelConfig(**parallel))
    if psa is not None and not psa_first:
        applied = apply_psa(pipe, **psa)
    guided = {"guidance_scale": guidance, "negative_prompt_embeds": pipes.normal(1, 13, 4096, seed=5).to(device)}
    with SelfAttention() as attention:
        latents = pipes.run(pipe, steps, size, **(guided if guidance > 1 else {}))
    return {"latents": latents.cpu().float(), "self_attention": attention.shapes} | figures(applied)


def on_a_cpu():
    """diffusers divides by the number of GPUs, of which there are none on a CPU."""
    count = max(1, torch.accelerator.device_count())
    return mock.patch("torch.accelerator.device_count", lambda: count)


def figures(applied):
    if applied is None:
        return {}
    return {
        "sparse": applied.sparse_calls,
        "dense": applied.dense_calls,
        "fallbacks": dict(applied.fallbacks),
        "sparsity": applied.mean_sparsity(),
    }
