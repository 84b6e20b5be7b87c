"""What the LoRAs of several files are made of: random tensors, in pairs under a tool's names, for the tiny Wan."""

import torch

Q = "blocks.0.self_attn.q"
OUT = "blocks.1.cross_attn.o"
DIM, RANK = 256, 4
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}


def random(*shape, seed=0):
    """Normal numbers, small enough for weights."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def pair(name, rows=DIM, columns=DIM, down="lora_A.weight", up="lora_B.weight", seed=0):
    """Both matrices of a LoRA for one weight [rows, columns]."""
    return {f"{name}.{down}": random(RANK, columns, seed=seed), f"{name}.{up}": random(rows, RANK, seed=seed + 1)}


def product(tensors):
    """What a pair adds to its weight."""
    up, down = (next(value for key, value in tensors.items() if value.shape[0] == size) for size in (DIM, RANK))
    return up @ down


def changed(before, after):
    """The weights that are different when ComfyUI samples with `after`: {name: change}."""
    import comfy.model_management

    old = {key: value.clone() for key, value in before.model.state_dict().items()}
    comfy.model_management.load_models_gpu([after])
    new = {key: value.clone() for key, value in after.model.state_dict().items()}
    after.detach()
    return {
        key.removeprefix("diffusion_model."): new[key] - old[key] for key in old if not torch.equal(new[key], old[key])
    }
