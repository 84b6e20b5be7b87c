"""Writes `workflows/*.json` from the node definitions of a running server: `python dev.py workflows`.

Run it after changing a node's schema; `tests/comfyui/test_workflows.py` fails until you do. File names, sampler
settings and shifts are those of ComfyUI's own Wan templates.
"""

from __future__ import annotations

from pathlib import Path

from .canvas import Canvas, Node, Output
from .cogvideox_workflows import COGVIDEOX_BUILDERS
from .workflow_parts import model_file, save_video

WAN21 = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
PROMPT = (
    "A red fox trots through a snowy pine forest at sunrise, fresh powder flying from its paws, "
    "low golden light between the trunks, the camera glides beside it, sharp detail, natural colours."
)
IMAGE_PROMPT = "The subject slowly turns towards the camera and smiles, hair and leaves moving in a light breeze."
NEGATIVE = "overexposed, static, blurred details, subtitles, worst quality, low quality, JPEG artefacts, deformed limbs"
PSA_NOTE = """
**PSA Patch** goes between the model and the sampler. `sparsity` is the share of attention work that is skipped;
0 or a bypassed node gives the stock result. The first quarter of the schedule (`start_percent` 0.25) stays dense.
**PSA Report** says what ran sparse, what stayed dense and why.
"""


def build_all(definitions: dict, folder: Path) -> list[Path]:
    """Write every workflow into `folder` and return the paths. `definitions` is what `/object_info` returns."""
    builders = {
        "psa_demo": _demo,
        "wan21_t2v_psa": _wan21_t2v,
        "wan21_i2v_psa": _wan21_i2v,
        "wan22_a14b_t2v_psa": _wan22_a14b_t2v,
        "wan22_ti2v_5b_psa": _wan22_ti2v_5b,
        **COGVIDEOX_BUILDERS,
    }
    paths = []
    for name, build in builders.items():
        canvas = Canvas(definitions)
        build(canvas)
        paths.append(folder / f"{name}.json")
        canvas.save(paths[-1])
    return paths


def _demo(canvas: Canvas) -> None:
    with canvas.group("What this is", "grey", width=420):
        canvas.note(
            """
## Dense against sparse, with a model that ships with this repository

Press Run: there is nothing to download, and no GPU is needed (a few minutes on a CPU).

Both samplers start from the same noise. The blue column is stock attention, the green one goes through **PSA Patch**.
The small Wan model and its VAE come with the node pack; **PSA Demo Prompt** says what the video shows, since there
is no text encoder.

`start_percent` is 0.30: 5 of the 16 steps stay dense. The node's default of 0.25 would be 4, and would give this clip a
second blue square that the dense video does not have.

`python dev.py demo` runs this file and writes the videos and a report into `output/psa_demo/`.
`python dev.py serve` opens ComfyUI with it.
""",
            440,
        )
    with canvas.group("Model and scene"):
        model = canvas.add("UNETLoader", unet_name="psa_demo_wan_dit.safetensors")
        model = canvas.add("ModelSamplingSD3", model=model, shift=12.0)
        vae = canvas.add("VAELoader", vae_name="psa_demo_wan_vae.safetensors")
        scene = canvas.add("PSADemoScene")
        latent = canvas.add("EmptyHunyuanLatentVideo", width=512, height=512, length=33)
    sampling = dict(seed=42, steps=16, cfg=1.0, sampler_name="euler", scheduler="simple")
    sampling |= dict(positive=scene, negative=scene, latent_image=latent)
    with canvas.group("Dense: stock attention", "blue"):
        dense = canvas.add("KSampler", "KSampler: dense", model=model, **sampling)
        dense_frames = canvas.add("VAEDecode", samples=dense, vae=vae)
        _save_webp(canvas, dense_frames, "psa_demo/dense")
    with canvas.group("Sparse: PSA", "green"):
        # 5 of 16 dense steps instead of the default's 4: with 4, this clip gets a second blue square that the dense
        # video does not have (22.6 dB instead of 30.8), even if the sparse steps do more work to make up (21.9 dB).
        patched = canvas.add("PSAPatch", model=model, sparsity=0.85, start_percent=0.30, min_tokens=4096)
        sparse = canvas.add("KSampler", "KSampler: PSA", model=patched, **sampling)
        frames = canvas.add("VAEDecode", samples=sparse, vae=vae)
        _save_webp(canvas, frames, "psa_demo/psa")
    with canvas.group("What PSA did", "violet", width=560):
        canvas.add("PSAReport", model=patched, samples=sparse, images=frames, filename_prefix="psa_demo/report")
        compared = canvas.add("PSACompare", images_a=dense_frames, images_b=frames)
        _save_webp(canvas, compared.output("side_by_side"), "psa_demo/side_by_side")


def _wan21_t2v(canvas: Canvas) -> None:
    unet = "wan2.1_t2v_1.3B_fp16.safetensors"
    _files_note(canvas, "Wan 2.1 text to video, 1.3B", {"diffusion_models": [unet]}, "wan_2.1_vae.safetensors")
    with canvas.group("Load"):
        model = canvas.add("ModelSamplingSD3", model=_unet(canvas, unet, WAN21), shift=8.0)
        clip, vae = _clip(canvas), _vae(canvas, "wan_2.1_vae.safetensors", WAN21)
    with canvas.group("Prompt and size"):
        positive, negative = _prompts(canvas, clip, PROMPT)
        latent = canvas.add("EmptyHunyuanLatentVideo", width=832, height=480, length=81)
    _sample_and_save(canvas, model, vae, positive, negative, latent, dict(steps=30, cfg=6.0), 16.0, "wan21_t2v")


def _wan21_i2v(canvas: Canvas) -> None:
    unet = "wan2.1_i2v_480p_14B_fp16.safetensors"
    files = {"diffusion_models": [unet], "clip_vision": ["clip_vision_h.safetensors"]}
    _files_note(canvas, "Wan 2.1 image to video, 14B 480p", files, "wan_2.1_vae.safetensors")
    with canvas.group("Load"):
        model = canvas.add("ModelSamplingSD3", model=_unet(canvas, unet, WAN21), shift=8.0)
        clip, vae = _clip(canvas), _vae(canvas, "wan_2.1_vae.safetensors", WAN21)
        eye = canvas.add(
            "CLIPVisionLoader",
            clip_name="clip_vision_h.safetensors",
            models=model_file("clip_vision_h.safetensors", "clip_vision", WAN21),
        )
    with canvas.group("Prompt, image and size"):
        positive, negative = _prompts(canvas, clip, IMAGE_PROMPT)
        image = canvas.add("LoadImage", "Start image", image="example.png").output("IMAGE")
        seen = canvas.add("CLIPVisionEncode", clip_vision=eye, image=image, crop="none")
        start = canvas.add(
            "WanImageToVideo",
            positive=positive,
            negative=negative,
            vae=vae,
            clip_vision_output=seen,
            start_image=image,
            width=832,
            height=480,
            length=81,
        )
    positive, negative = start.output("positive"), start.output("negative")
    _sample_and_save(canvas, model, vae, positive, negative, start, dict(steps=30, cfg=6.0), 16.0, "wan21_i2v")


def _wan22_a14b_t2v(canvas: Canvas) -> None:
    high, low = (f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled.safetensors" for noise in ("high", "low"))
    steps, switch = 20, 10
    note = (
        "Two experts share one schedule, and each has its own patch: `start_percent` counts along the whole "
        "schedule, so with 0.25 only the high-noise expert has dense steps."
    )
    files = {"diffusion_models": [high, low]}
    _files_note(canvas, "Wan 2.2 text to video, A14B (two experts)", files, "wan_2.1_vae.safetensors", note)
    with canvas.group("Load"):
        experts = [canvas.add("ModelSamplingSD3", model=_unet(canvas, name, WAN22), shift=8.0) for name in (high, low)]
        clip, vae = _clip(canvas), _vae(canvas, "wan_2.1_vae.safetensors", WAN22)
    with canvas.group("Prompt and size"):
        positive, negative = _prompts(canvas, clip, PROMPT)
        latent = canvas.add("EmptyHunyuanLatentVideo", width=832, height=480, length=81)
    common = dict(positive=positive, negative=negative, steps=steps, cfg=3.5, sampler_name="euler", scheduler="simple")
    with canvas.group("High noise: PSA and sampler", "green"):
        patched = canvas.add("PSAPatch", "PSA Patch: high noise", model=experts[0])
        half = canvas.add(
            "KSamplerAdvanced",
            "High noise: first half",
            model=patched,
            latent_image=latent,
            noise_seed=42,
            add_noise="enable",
            start_at_step=0,
            end_at_step=switch,
            return_with_leftover_noise="enable",
            **common,
        )
        half = canvas.add("PSAReport", "PSA Report: high noise", model=patched, samples=half)
    with canvas.group("Low noise: PSA and sampler", "green"):
        patched = canvas.add("PSAPatch", "PSA Patch: low noise", model=experts[1])
        samples = canvas.add(
            "KSamplerAdvanced",
            "Low noise: second half",
            model=patched,
            latent_image=half,
            noise_seed=0,
            add_noise="disable",
            start_at_step=switch,
            end_at_step=10000,
            return_with_leftover_noise="disable",
            **common,
        )
        samples = canvas.add("PSAReport", "PSA Report: low noise", model=patched, samples=samples)
    save_video(canvas, samples, vae, 16.0, "wan22_a14b_t2v")


def _wan22_ti2v_5b(canvas: Canvas) -> None:
    unet = "wan2.2_ti2v_5B_fp16.safetensors"
    note = "This is text to video. For image to video, add a Load Image node and connect it to `start_image`."
    files = {"diffusion_models": [unet]}
    _files_note(canvas, "Wan 2.2 text or image to video, 5B", files, "wan2.2_vae.safetensors", note)
    with canvas.group("Load"):
        model = canvas.add("ModelSamplingSD3", model=_unet(canvas, unet, WAN22), shift=8.0)
        clip, vae = _clip(canvas), _vae(canvas, "wan2.2_vae.safetensors", WAN22)
    with canvas.group("Prompt and size"):
        positive, negative = _prompts(canvas, clip, PROMPT)
        latent = canvas.add("Wan22ImageToVideoLatent", vae=vae, width=1280, height=704, length=121)
    _sample_and_save(canvas, model, vae, positive, negative, latent, dict(steps=20, cfg=5.0), 24.0, "wan22_ti2v_5b")


def _files_note(canvas: Canvas, title: str, files: dict[str, list[str]], vae: str, note: str = "") -> None:
    files = {**files, "text_encoders": ["umt5_xxl_fp8_e4m3fn_scaled.safetensors"], "vae": [vae]}
    lines = [f"- `models/{folder}/`: `{name}`" for folder, names in files.items() for name in names]
    sources = f"Wan 2.1: {WAN21.split('/resolve')[0]}\n\nWan 2.2: {WAN22.split('/resolve')[0]}"
    text = f"## {title}\n\nFiles, and the ComfyUI folder that each goes into:\n\n" + "\n".join(lines)
    with canvas.group("Files", "grey", width=460):
        canvas.note(f"{text}\n\nDownload them from\n\n{sources}\n\n{PSA_NOTE.strip()}\n\n{note}", 520)


def _unet(canvas: Canvas, name: str, source: str) -> Node:
    return canvas.add("UNETLoader", unet_name=name, models=model_file(name, "diffusion_models", source))


def _clip(canvas: Canvas) -> Node:
    name = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    return canvas.add("CLIPLoader", clip_name=name, type="wan", models=model_file(name, "text_encoders", WAN21))


def _vae(canvas: Canvas, name: str, source: str) -> Node:
    return canvas.add("VAELoader", vae_name=name, models=model_file(name, "vae", source))


def _prompts(canvas: Canvas, clip: Node, prompt: str) -> tuple[Node, Node]:
    return (
        canvas.add("CLIPTextEncode", "Positive prompt", clip=clip, text=prompt),
        canvas.add("CLIPTextEncode", "Negative prompt", clip=clip, text=NEGATIVE),
    )


def _sample_and_save(
    canvas: Canvas,
    model: Node,
    vae: Node,
    positive: Node | Output,
    negative: Node | Output,
    latent: Node,
    sampling: dict,
    fps: float,
    name: str,
) -> None:
    with canvas.group("PSA and sampler", "green"):
        patched = canvas.add("PSAPatch", model=model)
        conditions = dict(positive=positive, negative=negative, latent_image=latent)
        settings = dict(seed=42, sampler_name="uni_pc", scheduler="simple", **sampling)
        samples = canvas.add("KSampler", model=patched, **conditions, **settings)
        samples = canvas.add("PSAReport", model=patched, samples=samples)
    save_video(canvas, samples, vae, fps, name)


def _save_webp(canvas: Canvas, frames: Node | Output, prefix: str) -> None:
    canvas.add("SaveAnimatedWEBP", images=frames, filename_prefix=prefix, fps=12.0, lossless=True, method="fastest")
