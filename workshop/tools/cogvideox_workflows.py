"""The CogVideoX workflows. Sizes, steps and guidance come from the PSA release and the models' own pages."""

from __future__ import annotations

from comfyui_psa.loading.download import FILE, REPOSITORY

from .canvas import Canvas, Node, Output
from .workflow_parts import HUB, ModelFile, load_vae, note_in_both, save_video

LORA = {"name": FILE, "url": f"{HUB}/{REPOSITORY}/resolve/main/{FILE}", "directory": "loras"}
TEXT_ENCODER = ModelFile(
    "text_encoders", f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors", 9.8
)
PROMPT = (
    "A wooden sailing boat glides across a calm bay at golden hour, its white sails catching a light wind, gulls "
    "circling the mast, small waves glittering in the low sun, the camera follows slowly from the shore, sharp detail."
)
IMAGE_PROMPT = "The scene comes to life: a light breeze moves hair and leaves while the camera slowly moves closer."
NOTE = """
**PSA CogVideoX Loader** sets the positions and the noise schedule the model was trained with, so KSampler works too;
**PSA CogVideoX Sampler** and **PSA CogVideoX Sigmas** are diffusers' own scheduler. On Windows, select the files in the
menus once: ComfyUI writes their paths with backslashes.

**PSA Patch**: `sparsity` is the share of attention work that is skipped; 0 or a bypassed node is the dense model. The
steps before `start_percent` stay dense. **PSA Report** says what ran sparse, what stayed dense and why.
"""
# Seconds on an A100 and an H100 for 50 dense steps with guidance, from the models' pages.
TIMES = {"1.0": (180, 90), "1.5": (1000, 550)}


def _four_steps(canvas: Canvas) -> None:
    seconds = [round(time / 50 / 2 * 4) for time in TIMES["1.0"]]
    time = f"4 dense steps without guidance: about {seconds[0]} s on an A100, {seconds[1]} s on an H100 (an estimate)"
    lora = f"- `models/loras/{FILE}`: **PSA LoRA Download** downloads it and shows its size\n"
    model, clip, vae = _load(canvas, "CogVideoX 5B, 4 steps with the PSA LoRA", "CogVideoX-5b", time, lora)
    with canvas.group("LoRA"):
        model = canvas.add("PSALoraLoader", model=model, lora_name=FILE, models=[LORA]).output("MODEL")
    positive, negative, latent = _prompts(canvas, clip, (720, 480, 49))
    psa = dict(preset="cogvideox-5b-4step", sparsity=0.84, start_percent=0.0)
    samples = _sample(canvas, model, positive, negative, latent, psa, steps=4, cfg=1.0)
    save_video(canvas, samples, vae, 8.0, "cogvideox5b_4step")


def _fifty_steps(canvas: Canvas) -> None:
    model, clip, vae = _load(canvas, "CogVideoX 5B, 50 steps", "CogVideoX-5b", _fifty_step_time("1.0"))
    positive, negative, latent = _prompts(canvas, clip, (720, 480, 49))
    samples = _sample(canvas, model, positive, negative, latent, dict(start_percent=0.3), steps=50, cfg=6.0)
    save_video(canvas, samples, vae, 8.0, "cogvideox5b")


def _version_15(canvas: Canvas) -> None:
    model, clip, vae = _load(canvas, "CogVideoX 1.5 5B, 50 steps", "CogVideoX1.5-5B", _fifty_step_time("1.5"))
    positive, negative, latent = _prompts(canvas, clip, (1360, 768, 81))
    samples = _sample(canvas, model, positive, negative, latent, dict(start_percent=0.3), steps=50, cfg=6.0)
    save_video(canvas, samples, vae, 16.0, "cogvideox15")


def _version_15_from_image(canvas: Canvas) -> None:
    title = "CogVideoX 1.5 5B, image to video, 50 steps"
    model, clip, vae = _load(canvas, title, "CogVideoX1.5-5B-I2V", _fifty_step_time("1.5"))
    with canvas.group("Prompt, image and size"):
        texts = _texts(canvas, clip, IMAGE_PROMPT)
        image = canvas.add("LoadImage", "Start image", image="example.png").output("IMAGE")
        size = dict(width=1360, height=768, length=81)
        start = canvas.add("PSACogVideoXImageToVideo", vae=vae, start_image=image, **texts, **size)
    positive, negative = start.output("positive"), start.output("negative")
    latent = start.output("latent")
    samples = _sample(canvas, model, positive, negative, latent, dict(start_percent=0.3), steps=50, cfg=6.0)
    save_video(canvas, samples, vae, 16.0, "cogvideox15_i2v")


COGVIDEOX_BUILDERS = {
    "cogvideox5b_psa_4step_lora": _four_steps,
    "cogvideox5b_psa_50step": _fifty_steps,
    "cogvideox15_5b_psa": _version_15,
    "cogvideox15_i2v_psa": _version_15_from_image,
}


def _fifty_step_time(version: str) -> str:
    slow, fast = TIMES[version]
    return (
        f"50 dense steps with guidance: about {slow} s on an A100, {fast} s on an H100, according to the model's page"
    )


def _load(canvas: Canvas, title: str, folder: str, time: str, more: str = "") -> tuple[Node, Node, Node]:
    address = f"{HUB}/zai-org/{folder}/resolve/main/vae/diffusion_pytorch_model.safetensors"
    vae_file = ModelFile("vae", address, 0.43, inside=f"{folder}/vae/")
    with canvas.group("Files", "grey", width=480):
        note_in_both(
            canvas,
            f"""
## {title}

Files, relative to ComfyUI's folder:

- `models/diffusers/{folder}/`: `transformer/` and `scheduler/` (11.1 GB)
- `models/vae/{vae_file.name}` ({vae_file.size} GB)
- `models/text_encoders/{TEXT_ENCODER.name}` ({TEXT_ENCODER.size} GB)
{more}
Run these commands in that folder to download them:

    hf download zai-org/{folder} --include "transformer/*" "scheduler/*" --local-dir models/diffusers/{folder}
    hf download zai-org/{folder} --include "vae/*" --local-dir models/vae/{folder}
    hf download comfyanonymous/flux_text_encoders {TEXT_ENCODER.name} --local-dir models/text_encoders

{time}; text encoding and decoding are extra.

{NOTE.strip()}
""",
            620,
        )
    with canvas.group("Load"):
        model = canvas.add("PSACogVideoXLoader", checkpoint=folder)
        clip = canvas.add("CLIPLoader", clip_name=TEXT_ENCODER.name, type="cogvideox", models=[TEXT_ENCODER.download])
        vae = load_vae(canvas, vae_file)
    return model, clip, vae


def _texts(canvas: Canvas, clip: Node, prompt: str) -> dict[str, Node]:
    positive = canvas.add("CLIPTextEncode", "Prompt", clip=clip, text=prompt)
    return {"positive": positive, "negative": canvas.add("CLIPTextEncode", "Negative prompt", clip=clip, text="")}


def _prompts(canvas: Canvas, clip: Node, size: tuple[int, int, int]) -> tuple[Node, Node, Node]:
    with canvas.group("Prompt and size"):
        texts = _texts(canvas, clip, PROMPT)
        width, height, length = size
        latent = canvas.add("EmptyHunyuanLatentVideo", "Empty latent", width=width, height=height, length=length)
    return texts["positive"], texts["negative"], latent


def _sample(
    canvas: Canvas,
    model: Node | Output,
    positive: Node | Output,
    negative: Node | Output,
    latent: Node | Output,
    psa: dict,
    steps: int,
    cfg: float,
) -> Output:
    with canvas.group("PSA and sampler", "green"):
        patched = canvas.add("PSAPatch", model=model, **psa)
        sampled = canvas.add(
            "SamplerCustom",
            model=patched,
            add_noise=True,
            noise_seed=42,
            cfg=cfg,
            positive=positive,
            negative=negative,
            sampler=canvas.add("PSACogVideoXSampler", solver="dpm"),
            sigmas=canvas.add("PSACogVideoXSigmas", model=patched, steps=steps),
            latent_image=latent,
        )
        report = canvas.add("PSAReport", model=patched, samples=sampled.output("output"))
    return report.output("samples")
