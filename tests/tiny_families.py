"""Tiny random models of the video families other than Wan and CogVideoX, from ComfyUI's own classes. Two blocks of a
kind. Nothing of the pack is used here.

ComfyUI's detection knows most of them in their released sizes only, so its model classes get the sizes directly.
"""

import dataclasses
import json
from types import SimpleNamespace

import torch

LTX = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "cross_attention_dim": 256,
    "caption_channels": 32,
    "in_channels": 16,
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 16,
    "context_in_dim": 32,
    "hidden_size": 256,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
HUNYUAN_15 = HUNYUAN | {
    "in_channels": 65,
    "out_channels": 32,
    "patch_size": [1, 1, 1],
    "vec_in_dim": None,
    "guidance_embed": False,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 48,
    "meanflow_sum": True,
}
COSMOS = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 256,
    "num_blocks": 2,
    "num_heads": 2,
    "crossattn_emb_channels": 32,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "rope_enable_fps_modulation": False,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        config: class in comfy.supported_models; sizes: arguments of the network.
        size: a latent [1, C, T, H, W] of about 600 tokens; text: width of the prompt's tokens, pooled of its vector.
        audio: a latent of sound that is sampled together with the video.
    """

    config: str
    sizes: dict
    size: tuple
    text: int = 32
    pooled: int = 16
    audio: tuple = ()


KINDS = {
    "hunyuan": Kind("HunyuanVideo", HUNYUAN, (1, 16, 3, 28, 32)),
    "hunyuan i2v": Kind("HunyuanVideoI2V", HUNYUAN | {"in_channels": 33}, (1, 16, 3, 28, 32)),
    "hunyuan skyreels": Kind("HunyuanVideoSkyreelsI2V", HUNYUAN | {"in_channels": 32}, (1, 16, 3, 28, 32)),
    "hunyuan 1.5": Kind("HunyuanVideo15", HUNYUAN_15, (1, 32, 3, 14, 16)),
    "hunyuan 1.5 sr": Kind(
        "HunyuanVideo15_SR_Distilled", HUNYUAN_15 | {"in_channels": 98, "meanflow": True}, (1, 32, 3, 14, 16)
    ),
    "ltx 0.9": Kind(
        "LTXV", LTX | {"image_model": "ltxv", "num_attention_heads": 4, "attention_head_dim": 64}, (1, 16, 3, 14, 16)
    ),
    "ltx 13b": Kind("LTXV", LTX | {"image_model": "ltxv"}, (1, 16, 3, 14, 16)),
    "ltx 2": Kind(
        "LTXAV",
        LTX
        | {
            "image_model": "ltxav",
            "audio_cross_attention_dim": 128,
            "audio_attention_head_dim": 64,
            "audio_num_attention_heads": 2,
            "connector_attention_head_dim": 16,
            "connector_num_attention_heads": 2,
            "connector_num_layers": 1,
        },
        (1, 16, 3, 14, 16),
        text=64,
        audio=(1, 8, 672, 16),  # as many tokens as the video
    ),
    "kandinsky 5 lite": Kind(
        "Kandinsky5",
        {
            "image_model": "kandinsky5",
            "model_dim": 256,
            "axes_dims": (16, 24, 24),
            "time_dim": 64,
            "ff_dim": 256,
            "in_text_dim": 32,
            "in_text_dim2": 16,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
        },
        (1, 16, 3, 28, 32),
    ),
    "cosmos": Kind("CosmosT2IPredict2", COSMOS, (1, 16, 3, 28, 32)),
    "cosmos i2v": Kind("CosmosI2VPredict2", COSMOS | {"in_channels": 17}, (1, 16, 3, 28, 32)),
    "cosmos 1": Kind(
        "CosmosT2V",
        {
            "image_model": "cosmos",
            "max_img_h": 240,
            "max_img_w": 240,
            "max_frames": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "extra_per_block_abs_pos_emb": True,
            "extra_per_block_abs_pos_emb_type": "learnable",
            "block_config": "FA-CA-MLP",
            "model_channels": 256,
            "num_blocks": 2,
            "num_heads": 2,
            "block_x_format": "THWBD",
            "crossattn_emb_channels": 32,
            "pos_emb_cls": "rope3d",
            "affline_emb_norm": True,
            "use_adaln_lora": True,
            "adaln_lora_dim": 16,
        },
        (1, 16, 3, 28, 32),
    ),
    "mochi": Kind(
        "GenmoMochi",
        {
            "image_model": "mochi_preview",
            "depth": 2,
            "patch_size": 2,
            "num_heads": 2,
            "hidden_size_x": 256,
            "hidden_size_y": 64,
            "mlp_ratio_x": 48.0,  # the class accepts one inner width only
            "mlp_ratio_y": 2.0,
            "learn_sigma": False,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
            "use_t5": True,
            "t5_feat_dim": 32,
            "timestep_scale": 1000.0,
        },
        (1, 12, 3, 28, 32),
    ),
    "minimax h3": Kind(
        "MiniMaxH3",
        {
            "image_model": "minimax_h3",
            "hidden_size": 128,
            "num_layers": 2,
            "token_refiner_num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 128,
            "ffn_hidden_size": 128,
            "text_dim": 32,
            "time_embed_hidden_size": 64,
            "time_embed_dim": 64,
        },
        (1, 24, 3, 28, 32),
        audio=(1, 32, 2, 10),
    ),
}
ONE_OF_EACH = (
    "hunyuan", "hunyuan 1.5", "ltx 0.9", "ltx 2", "kandinsky 5 lite", "cosmos", "mochi", "minimax h3",
)  # fmt: skip
# The same as files, with what ComfyUI's detection takes for granted.
for _kind, _sizes, _widths in (
    ("hunyuan", {"mlp_ratio": 4.0, "vec_in_dim": 768}, {"pooled": 768}),
    ("hunyuan i2v", {"mlp_ratio": 4.0, "vec_in_dim": 768}, {"pooled": 768}),
    ("hunyuan 1.5", {"mlp_ratio": 4.0, "vision_in_dim": 1152}, {}),
    ("hunyuan 1.5 sr", {"mlp_ratio": 4.0, "vision_in_dim": 1152}, {}),
    ("ltx 0.9", {"in_channels": 128}, {}),
    ("ltx 2", {"in_channels": 128}, {}),
    ("kandinsky 5 lite", {"in_text_dim": 3584, "in_text_dim2": 768}, {"text": 3584, "pooled": 768}),
    ("minimax h3", {}, {}),
):
    KINDS[f"{_kind}, a file"] = dataclasses.replace(KINDS[_kind], sizes=KINDS[_kind].sizes | _sizes, **_widths)
KINDS["ltx 2 silent"] = dataclasses.replace(KINDS["ltx 2"], audio=())
KINDS["kandinsky 5 pro"] = dataclasses.replace(
    KINDS["kandinsky 5 lite"], sizes=KINDS["kandinsky 5 lite"].sizes | {"axes_dims": (32, 48, 48)}
)


def load(kind, dtype=torch.float32):
    """A ComfyUI MODEL of this kind with random weights."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, KINDS[kind].config)(KINDS[kind].sizes)
    config.set_inference_dtype(dtype, torch.float32 if dtype.itemsize == 1 else None)
    model = config.get_model({}, "")
    for parameter in model.diffusion_model.parameters():
        if parameter.ndim == 1 and dtype.itemsize == 1:
            parameter.data = parameter.data.float()  # as in fp8 checkpoints
    generator = torch.Generator().manual_seed(0)
    for name, value in model.diffusion_model.state_dict().items():
        if name.endswith("inv_freq"):
            value.copy_(1e4 ** -torch.linspace(0, 1, len(value)))
            continue
        wide = min(1.0, (256 / max(1, value[0].numel())) ** 0.5) if value.ndim > 1 else 1.0
        random = torch.randn(value.shape, generator=generator) * 0.1 * wide
        value.copy_(random + 1.0 if value.ndim == 1 and "norm" in name and name.endswith("weight") else random)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, device, comfy.model_management.unet_offload_device())


def save(kind, path):
    """A checkpoint of this kind. The released files of LTX name their sizes, too."""
    import safetensors.torch

    sizes = {name: value for name, value in KINDS[kind].sizes.items() if name != "image_model"}
    metadata = {"config": json.dumps({"transformer": sizes})} if kind.startswith("ltx") else None
    safetensors.torch.save_file(load(kind).model.diffusion_model.state_dict(), path, metadata)


def normal(*shape, seed=0):
    """Random values that a seed fixes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def conditioning(kind, tokens=13, seed=2, **extra):
    """CONDITIONING without a text encoder."""
    masked = kind == "mochi" or kind.startswith("ltx")
    mask = {"attention_mask": torch.ones(1, tokens, dtype=torch.long)} if masked else {}
    pooled = normal(1, KINDS[kind].pooled, seed=seed + 50)
    return [[normal(1, tokens, KINDS[kind].text, seed=seed), {"pooled_output": pooled} | mask | extra]]


def vision(tokens=9, width=48, seed=3):
    """Instead of a vision model's output."""
    return SimpleNamespace(last_hidden_state=normal(1, tokens, width, seed=seed))


def sample(model, kind, steps=1, cfg=1.0, size=None, extra=None, negative=None, noise=None, latent=None, **more):
    """Sample through ComfyUI's own KSampler code, on one thread; returns the video [1, C, T, H, W]."""
    import comfy.nested_tensor
    import comfy.sample

    size = size or KINDS[kind].size
    noise = normal(*size, seed=1) if noise is None else noise
    latent = torch.zeros(size) if latent is None else latent
    if KINDS[kind].audio:
        noise = comfy.nested_tensor.NestedTensor((noise, normal(*KINDS[kind].audio, seed=2)))
        latent = comfy.nested_tensor.NestedTensor((latent, torch.zeros(KINDS[kind].audio)))
    conds = conditioning(kind, **(extra or {})), negative or conditioning(kind, seed=4, **(extra or {}))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out = comfy.sample.sample(
            model, noise, steps, cfg, "euler", "simple", *conds, latent, seed=1, disable_pbar=True, **more
        )
    finally:
        torch.set_num_threads(threads)
    return out.unbind()[0] if out.is_nested else out
