"""The workflows of HunyuanVideo 1.5 and LTX-2. File names and sampler settings are those of ComfyUI's own templates."""

from __future__ import annotations

from .canvas import Canvas
from .workflow_parts import HUB, PROMPT, ModelFile, files_note, load_model, load_vae, prompts, sample, save_video

HUNYUAN = f"{HUB}/Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
GEMMA = "Comfy-Org/ltx-2/resolve/main/split_files/text_encoders/gemma_3_12B_it_fp4_mixed.safetensors"
SOUND_PROMPT = " Snow crunches softly under its paws, a raven calls far away, wind in the branches."


def _hunyuanvideo15_t2v(canvas: Canvas) -> None:
    unet = ModelFile("diffusion_models", f"{HUNYUAN}/diffusion_models/hunyuanvideo1.5_720p_t2v_fp16.safetensors", 16.7)
    texts = ModelFile("text_encoders", f"{HUNYUAN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors", 9.4)
    glyphs = ModelFile("text_encoders", f"{HUNYUAN}/text_encoders/byt5_small_glyphxl_fp16.safetensors", 0.44)
    decoder = ModelFile("vae", f"{HUNYUAN}/vae/hunyuanvideo15_vae_fp16.safetensors", 2.5)
    note = (
        "The model's authors use 50 steps; 20 are ComfyUI's default. If memory runs out, set `weight_dtype` to "
        "`fp8_e4m3fn` and decode with VAE Decode (Tiled)."
    )
    files_note(canvas, "HunyuanVideo 1.5, text to video, 720p", [unet, texts, glyphs, decoder], note)
    with canvas.group("Load"):
        model = canvas.add("ModelSamplingSD3", model=load_model(canvas, unet), shift=7.0)
        clip = canvas.add(
            "DualCLIPLoader",
            clip_name1=texts.name,
            clip_name2=glyphs.name,
            type="hunyuan_video_15",
            models=[texts.download, glyphs.download],
        )
        vae = load_vae(canvas, decoder)
    with canvas.group("Prompt and size"):
        positive, negative = prompts(canvas, clip, PROMPT, "")
        latent = canvas.add("EmptyHunyuanVideo15Latent", width=1280, height=720, length=121)
    samples = sample(canvas, model, positive, negative, latent, steps=20, cfg=6.0, sampler_name="euler")
    save_video(canvas, samples, vae, 24.0, "hunyuanvideo15_t2v")


def _ltx2_t2v(canvas: Canvas) -> None:
    checkpoint = ModelFile("checkpoints", f"{HUB}/Lightricks/LTX-2/resolve/main/ltx-2-19b-dev-fp8.safetensors", 27.1)
    encoder = ModelFile("text_encoders", f"{HUB}/{GEMMA}", 9.5)
    frames, rate = 241, 24
    note = (
        "Picture and sound are sampled together; PSA acts on the picture. Keep the number of frames and the frame rate "
        "the same in all nodes that have them. The whole video is sampled at its full size, in one stage: a smaller "
        "or shorter one has too few tokens to save much, and below `min_tokens` it stays dense."
    )
    files_note(canvas, "LTX-2, text to video with sound", [checkpoint, encoder], note)
    with canvas.group("Load"):
        file = dict(ckpt_name=checkpoint.name)
        loaded = canvas.add("CheckpointLoaderSimple", models=[checkpoint.download], **file)
        both = [encoder.download, checkpoint.download]
        clip = canvas.add("LTXAVTextEncoderLoader", models=both, text_encoder=encoder.name, **file)
        audio_vae = canvas.add("LTXVAudioVAELoader", models=[checkpoint.download], **file)
    with canvas.group("Prompt and size"):
        positive, negative = prompts(canvas, clip, PROMPT + SOUND_PROMPT)
        texts = canvas.add("LTXVConditioning", positive=positive, negative=negative, frame_rate=float(rate))
        video = canvas.add("EmptyLTXVLatentVideo", width=1280, height=704, length=frames)
        sound = dict(audio_vae=audio_vae, frames_number=frames, frame_rate=float(rate))
        sound = canvas.add("LTXVEmptyLatentAudio", **sound)
        latent = canvas.add("LTXVConcatAVLatent", video_latent=video, audio_latent=sound)
    with canvas.group("PSA and sampler", "green"):
        patched = canvas.add("PSAPatch", model=loaded)
        sampled = canvas.add(
            "SamplerCustom",
            model=patched,
            noise_seed=42,
            cfg=4.0,
            positive=texts.output("positive"),
            negative=texts.output("negative"),
            sampler=canvas.add("KSamplerSelect", sampler_name="euler"),
            # Without a latent it takes the shift for 4096 tokens, as LTX-2's own pipeline does for every size.
            sigmas=canvas.add("LTXVScheduler", steps=20),
            latent_image=latent,
        )
        samples = canvas.add("PSAReport", model=patched, samples=sampled.output("output"))
    with canvas.group("Video and sound", "violet"):
        parts = canvas.add("LTXVSeparateAVLatent", av_latent=samples)
        images = canvas.add("VAEDecodeTiled", samples=parts.output("video_latent"), vae=loaded, temporal_size=4096)
        audio = canvas.add("LTXVAudioVAEDecode", samples=parts.output("audio_latent"), audio_vae=audio_vae)
        film = canvas.add("CreateVideo", images=images, audio=audio, fps=float(rate))
        canvas.add("SaveVideo", video=film, filename_prefix="video/psa_ltx2_t2v")


HUNYUAN_LTX_BUILDERS = {
    "hunyuanvideo15_t2v_psa": _hunyuanvideo15_t2v,
    "ltx2_t2v_psa": _ltx2_t2v,
}
