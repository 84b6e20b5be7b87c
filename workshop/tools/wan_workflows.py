"""The Wan workflows. File names, sampler settings and shifts are those of ComfyUI's own Wan templates."""

from __future__ import annotations

from .canvas import Canvas, Node, Output
from .workflow_parts import (
    HUB,
    IMAGE_PROMPT,
    PROMPT,
    ModelFile,
    files_note,
    load_model,
    load_vae,
    prompts,
    sample,
    save_video,
)

WAN21 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
TEXT_ENCODER = ModelFile("text_encoders", f"{WAN21}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", 6.7)
VAE = ModelFile("vae", f"{WAN21}/vae/wan_2.1_vae.safetensors", 0.25)
EXPERTS = (
    "Two experts share one schedule, and each has its own patch: `start_percent` counts along the whole "
    "schedule, so with 0.25 only the high-noise expert has dense steps."
)
SIZE = dict(width=832, height=480, length=81)


def _wan21_t2v(canvas: Canvas) -> None:
    unet = ModelFile("diffusion_models", f"{WAN21}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", 2.8)
    files_note(canvas, "Wan 2.1 text to video, 1.3B", [unet, TEXT_ENCODER, VAE])
    with canvas.group("Load"):
        model = canvas.add("ModelSamplingSD3", model=load_model(canvas, unet), shift=8.0)
        clip, vae = _clip(canvas), load_vae(canvas, VAE)
    with canvas.group("Prompt and size"):
        positive, negative = prompts(canvas, clip, PROMPT)
        latent = canvas.add("EmptyHunyuanLatentVideo", **SIZE)
    samples = sample(canvas, model, positive, negative, latent, steps=30, cfg=6.0, sampler_name="uni_pc")
    save_video(canvas, samples, vae, 16.0, "wan21_t2v")


def _wan21_i2v(canvas: Canvas) -> None:
    unet = ModelFile("diffusion_models", f"{WAN21}/diffusion_models/wan2.1_i2v_480p_14B_fp16.safetensors", 32.8)
    vision = ModelFile("clip_vision", f"{WAN21}/clip_vision/clip_vision_h.safetensors", 1.3)
    files_note(canvas, "Wan 2.1 image to video, 14B 480p", [unet, vision, TEXT_ENCODER, VAE])
    with canvas.group("Load"):
        model = canvas.add("ModelSamplingSD3", model=load_model(canvas, unet), shift=8.0)
        clip, vae = _clip(canvas), load_vae(canvas, VAE)
        eye = canvas.add("CLIPVisionLoader", clip_name=vision.name, models=[vision.download])
    with canvas.group("Prompt, image and size"):
        positive, negative = prompts(canvas, clip, IMAGE_PROMPT)
        image = canvas.add("LoadImage", "Start image", image="example.png").output("IMAGE")
        seen = canvas.add("CLIPVisionEncode", clip_vision=eye, image=image, crop="none")
        start = canvas.add(
            "WanImageToVideo",
            positive=positive,
            negative=negative,
            vae=vae,
            clip_vision_output=seen,
            start_image=image,
            **SIZE,
        )
    positive, negative = start.output("positive"), start.output("negative")
    samples = sample(canvas, model, positive, negative, start, steps=30, cfg=6.0, sampler_name="uni_pc")
    save_video(canvas, samples, vae, 16.0, "wan21_i2v")


def _wan22_a14b_t2v(canvas: Canvas) -> None:
    files = _experts("t2v")
    files_note(canvas, "Wan 2.2 text to video, A14B (two experts)", [*files, TEXT_ENCODER, VAE], EXPERTS)
    with canvas.group("Load"):
        experts = [canvas.add("ModelSamplingSD3", model=load_model(canvas, file), shift=8.0) for file in files]
        clip, vae = _clip(canvas), load_vae(canvas, VAE)
    with canvas.group("Prompt and size"):
        positive, negative = prompts(canvas, clip, PROMPT)
        latent = canvas.add("EmptyHunyuanLatentVideo", **SIZE)
    samples = _sample_in_halves(canvas, experts, positive, negative, latent, steps=20, cfg=3.5)
    save_video(canvas, samples, vae, 16.0, "wan22_a14b_t2v")


def _wan22_a14b_t2v_4_steps(canvas: Canvas) -> None:
    files = _experts("t2v")
    names = (f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{noise}_noise.safetensors" for noise in ("high", "low"))
    loras = [ModelFile("loras", f"{WAN22}/loras/{name}", 1.2) for name in names]
    note = (
        "Each expert has a LoRA and a PSA Patch of its own. The LoRAs were trained without guidance: keep `cfg` at 1, "
        "where the negative prompt has no effect."
    )
    dense = "The preset `wan-4step-lora` keeps the first of the four steps dense, whatever `start_percent` says."
    title = "Wan 2.2 text to video, A14B in 4 steps, lightx2v LoRA (two experts)"
    files_note(canvas, title, [*files, *loras, TEXT_ENCODER, VAE], note, dense)
    with canvas.group("Load"):
        experts = []
        for file, lora in zip(files, loras, strict=True):
            model = load_model(canvas, file)
            model = canvas.add("PSALoraLoader", model=model, lora_name=lora.name, models=[lora.download])
            experts.append(canvas.add("ModelSamplingSD3", model=model.output("MODEL"), shift=5.0))
        clip, vae = _clip(canvas), load_vae(canvas, VAE)
    with canvas.group("Prompt and size"):
        positive, negative = prompts(canvas, clip, PROMPT)
        latent = canvas.add("EmptyHunyuanLatentVideo", **SIZE)
    preset = "wan-4step-lora"
    samples = _sample_in_halves(canvas, experts, positive, negative, latent, steps=4, cfg=1.0, preset=preset)
    save_video(canvas, samples, vae, 16.0, "wan22_a14b_t2v_4step")


def _wan22_a14b_i2v(canvas: Canvas) -> None:
    files = _experts("i2v")
    files_note(canvas, "Wan 2.2 image to video, A14B (two experts)", [*files, TEXT_ENCODER, VAE], EXPERTS)
    with canvas.group("Load"):
        experts = [canvas.add("ModelSamplingSD3", model=load_model(canvas, file), shift=5.0) for file in files]
        clip, vae = _clip(canvas), load_vae(canvas, VAE)
    with canvas.group("Prompt, image and size"):
        positive, negative = prompts(canvas, clip, IMAGE_PROMPT)
        image = canvas.add("LoadImage", "Start image", image="example.png").output("IMAGE")
        texts = dict(positive=positive, negative=negative)
        start = canvas.add("WanImageToVideo", vae=vae, start_image=image, **texts, **SIZE)
    positive, negative = start.output("positive"), start.output("negative")
    samples = _sample_in_halves(canvas, experts, positive, negative, start, steps=20, cfg=3.5)
    save_video(canvas, samples, vae, 16.0, "wan22_a14b_i2v")


def _wan22_ti2v_5b(canvas: Canvas) -> None:
    unet = ModelFile("diffusion_models", f"{WAN22}/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors", 10.0)
    large_vae = ModelFile("vae", f"{WAN22}/vae/wan2.2_vae.safetensors", 1.4)
    note = "This is text to video. For image to video, add a Load Image node and connect it to `start_image`."
    files_note(canvas, "Wan 2.2 text or image to video, 5B", [unet, TEXT_ENCODER, large_vae], note)
    with canvas.group("Load"):
        model = canvas.add("ModelSamplingSD3", model=load_model(canvas, unet), shift=8.0)
        clip, vae = _clip(canvas), load_vae(canvas, large_vae)
    with canvas.group("Prompt and size"):
        positive, negative = prompts(canvas, clip, PROMPT)
        latent = canvas.add("Wan22ImageToVideoLatent", vae=vae, width=1280, height=704, length=121)
    samples = sample(canvas, model, positive, negative, latent, steps=20, cfg=5.0, sampler_name="uni_pc")
    save_video(canvas, samples, vae, 24.0, "wan22_ti2v_5b")


WAN_BUILDERS = {
    "wan21_t2v_psa": _wan21_t2v,
    "wan21_i2v_psa": _wan21_i2v,
    "wan22_a14b_t2v_psa": _wan22_a14b_t2v,
    "wan22_a14b_t2v_psa_4step_lora": _wan22_a14b_t2v_4_steps,
    "wan22_a14b_i2v_psa": _wan22_a14b_i2v,
    "wan22_ti2v_5b_psa": _wan22_ti2v_5b,
}


def _experts(task: str) -> list[ModelFile]:
    """The files of the experts for high and for low noise."""
    names = (f"wan2.2_{task}_{noise}_noise_14B_fp8_scaled.safetensors" for noise in ("high", "low"))
    return [ModelFile("diffusion_models", f"{WAN22}/diffusion_models/{name}", 14.3) for name in names]


def _clip(canvas: Canvas) -> Node:
    return canvas.add("CLIPLoader", clip_name=TEXT_ENCODER.name, type="wan", models=[TEXT_ENCODER.download])


def _sample_in_halves(
    canvas: Canvas,
    experts: list[Node],
    positive: Node | Output,
    negative: Node | Output,
    latent: Node,
    steps: int,
    cfg: float,
    **psa: object,
) -> Node:
    """Add a group with PSA, sampler and report for either expert; the high-noise one samples the first half of the
    steps. Returns the node that passes the latent on."""
    common = dict(positive=positive, negative=negative, steps=steps, cfg=cfg, sampler_name="euler", scheduler="simple")
    high, low = experts
    with canvas.group("High noise: PSA and sampler", "green"):
        patched = canvas.add("PSAPatch", "PSA Patch: high noise", model=high, **psa)
        half = canvas.add(
            "KSamplerAdvanced",
            "High noise: first half",
            model=patched,
            latent_image=latent,
            noise_seed=42,
            add_noise="enable",
            start_at_step=0,
            end_at_step=steps // 2,
            return_with_leftover_noise="enable",
            **common,
        )
        half = canvas.add("PSAReport", "PSA Report: high noise", model=patched, samples=half)
    with canvas.group("Low noise: PSA and sampler", "green"):
        patched = canvas.add("PSAPatch", "PSA Patch: low noise", model=low, **psa)
        samples = canvas.add(
            "KSamplerAdvanced",
            "Low noise: second half",
            model=patched,
            latent_image=half,
            noise_seed=0,
            add_noise="disable",
            start_at_step=steps // 2,
            end_at_step=10000,
            return_with_leftover_noise="disable",
            **common,
        )
        return canvas.add("PSAReport", "PSA Report: low noise", model=patched, samples=samples)
