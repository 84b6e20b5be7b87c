"""Tiny random CogVideoX models by diffusers, written as diffusers writes them: the oracle of the CogVideoX tests.

One head of 64, two layers, 226 text tokens (2B and 5B-I2V know no other number) of width 32. Nothing of the pack is
used here.
"""

import json
from types import SimpleNamespace

import torch

TEXT, TEXT_WIDTH = 226, 32

KINDS = {
    "5b": {"use_rotary_positional_embeddings": True},
    "2b": {"use_rotary_positional_embeddings": False},
    "5b-i2v": {
        "num_attention_heads": 3,  # ComfyUI builds its positions for sizes divisible by 3 alone
        "in_channels": 32,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    },
    "1.5": {"patch_size_t": 2, "use_rotary_positional_embeddings": True, "sample_height": 96, "sample_width": 170},
    "1.5-i2v": {
        "in_channels": 32,
        "patch_size_t": 2,
        "ofs_embed_dim": 64,
        "use_rotary_positional_embeddings": True,
        "sample_height": 300,
        "sample_width": 300,
    },
}


def scheduler(kind, solver):
    """The scheduler of a released model of this kind, as the solver that is wanted."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    return {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}[solver](
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=3.0 if kind == "2b" else 1.0,
    )


def transformer(kind, seed=0, layers=2, text_width=TEXT_WIDTH, **changes):
    """A CogVideoXTransformer3DModel of diffusers with random weights that let every part of it count."""
    from diffusers import CogVideoXTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CogVideoXTransformer3DModel(
            **{"num_attention_heads": 1, "num_layers": layers, "time_embed_dim": 64, "text_embed_dim": text_width}
            | KINDS[kind]
            | changes
        ).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
            else:
                parameter.data *= 2.0 if ".attn1." in name else 1.2
        if model.config.use_learned_positional_embeddings:
            positions = model.patch_embed.pos_embedding
            positions += 0.3 * torch.randn_like(positions)
    return model


def write_folder(folder, kind, solver="dpm", shards=False, **changes):
    """Write a pipeline's folder (transformer, scheduler, VAE config); returns the transformer."""
    model = transformer(kind, **changes)
    model.save_pretrained(folder / "transformer", max_shard_size="150KB" if shards else "10GB")
    scheduler(kind, solver).save_pretrained(folder / "scheduler")
    (folder / "vae").mkdir()
    config = {"_class_name": "AutoencoderKLCogVideoX", "invert_scale_latents": kind == "1.5-i2v"}
    (folder / "vae" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def text(seed=5, tokens=TEXT, width=TEXT_WIDTH):
    """Prompt embeddings [1, tokens, width]."""
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


class ImageEncoder:
    """Instead of a VAE: every image becomes the latent that was given, [1, 16, 1, h, w]."""

    def __init__(self, latent, scale, inverted):
        self.latent = latent
        self.config = SimpleNamespace(
            block_out_channels=(1, 1, 1, 1),
            temporal_compression_ratio=4,
            scaling_factor=scale,
            invert_scale_latents=inverted,
        )

    def encode(self, image):
        return SimpleNamespace(latents=self.latent)


def run_pipeline(
    model, kind, solver, latents, steps, *, seed=7, guidance=1.0, image=None, scale=1.0, negative=None, positive=None,
    strength=None, frames=None,
):  # fmt: skip
    """Sample with diffusers' pipeline from latents [1, 16, T, H, W]; returns the same shape.

    Args:
        latents: the noise that it starts from; its step noise comes from the generator of `seed`, after this draw.
        image: latent [1, 16, 1, H, W] of the start image. strength: for video to video, with noisy `latents`.
        frames: pixel frames to ask for, where the pipeline adds one in front.
    """
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    names = {"tokenizer": None, "text_encoder": None, "transformer": model, "scheduler": scheduler(kind, solver)}
    height, width = 8 * latents.shape[3], 8 * latents.shape[4]
    generator = torch.Generator().manual_seed(seed)
    torch.randn(latents.transpose(1, 2).shape, generator=generator)
    arguments = {
        "prompt_embeds": text() if positive is None else positive,
        "negative_prompt_embeds": text(6) if negative is None else negative,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": height,
        "width": width,
        "latents": latents.transpose(1, 2),
        "generator": generator,
        "output_type": "latent",
    }
    if image is not None:
        names["vae"] = ImageEncoder(image, scale, kind == "1.5-i2v")
        pipeline = diffusers.CogVideoXImageToVideoPipeline(**names)
        arguments |= {"image": torch.zeros(1, 3, height, width), "num_frames": frames or 4 * latents.shape[2] - 3}
    elif strength is not None:
        pipeline = diffusers.CogVideoXVideoToVideoPipeline(**names, vae=None)
        arguments |= {"strength": strength}
    else:
        pipeline = diffusers.CogVideoXPipeline(**names, vae=None)
        arguments |= {"num_frames": frames or 4 * latents.shape[2] - 3}
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(**arguments).frames.transpose(1, 2)


def write_loras(folder, kind, rank=4, alpha=11.0):
    """Write one random LoRA three ways: its alpha in the metadata, in tensors, nowhere.

    Returns {way: file name} and {way: the transformer with that LoRA, by diffusers and PEFT}.
    """
    import diffusers
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    model = transformer(kind)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_embedding.linear_1"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    layers = get_peft_model_state_dict(model)
    pipeline = diffusers.CogVideoXPipeline
    metadata = _collate_lora_metadata({"transformer": model})
    pipeline.save_lora_weights(folder / "metadata", transformer_lora_layers=layers, **metadata)
    pipeline.save_lora_weights(folder / "nowhere", transformer_lora_layers=layers)
    name = "pytorch_lora_weights.safetensors"
    tensors = load_file(folder / "nowhere" / name)
    ends = ".lora_A.weight"
    for key in [key for key in tensors if key.endswith(ends)]:
        tensors[key.removesuffix(ends) + ".alpha"] = torch.tensor(alpha)
    (folder / "tensors").mkdir()
    save_file(tensors, folder / "tensors" / name)

    plain = transformer(kind)
    loaded = pipeline(tokenizer=None, text_encoder=None, vae=None, transformer=plain, scheduler=scheduler(kind, "dpm"))
    loaded.load_lora_weights(folder / "nowhere")
    files = {way: f"{way}/{name}" for way in ("metadata", "tensors", "nowhere")}
    return files, {"metadata": model, "tensors": model, "nowhere": plain}
