"""The CogVideoX nodes: loader, corrections, schedule, sampler, start image. Schemas only; the work is in `loading` and
`cogvideox`."""

from __future__ import annotations

from comfy_api.latest import io

from ..cogvideox.corrections import correct_model
from ..cogvideox.image import check_height, check_length, check_width, image_to_video
from ..cogvideox.sampler import SOLVERS, make_sampler
from ..cogvideox.schedule import trailing_sigmas
from ..loading.checkpoint import WEIGHT_DTYPES, check_checkpoint, checkpoint_state, list_checkpoints, load_checkpoint
from .base import PSANode


class PSACogVideoXLoader(PSANode):
    """Load a CogVideoX model from a diffusers folder or a single file, with everything set as in training."""

    rules = (check_checkpoint,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSACogVideoXLoader",
            display_name="PSA CogVideoX Loader",
            accept_all_inputs=True,
            category="model/loaders",
            description=(
                "Loads CogVideoX 2B, 5B, 5B-I2V, 1.5-5B and 1.5-5B-I2V from a diffusers folder (also in shards) or a "
                "single .safetensors file, and corrects positions and noise schedule to match diffusers. The result "
                "is an ordinary model for LoRA, PSA Patch and every sampler."
            ),
            search_aliases=["cogvideo", "cogvideox", "diffusers folder", "加载 CogVideoX"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=list_checkpoints(),
                    tooltip=(
                        "A folder with transformer/ (and scheduler/) in models/diffusers or models/diffusion_models, "
                        "or a .safetensors file in the latter. 5B in bf16: 11.1 GB."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    advanced=True,
                    tooltip=(
                        "default keeps the file's type: 5B in bf16 takes 11.1 GB. fp8 takes 5.6 GB and loses some "
                        "detail; fp8_e4m3fn_fast also computes in fp8 (RTX 40 or newer)."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None = None, **_: object) -> object:
        return checkpoint_state(checkpoint)

    @classmethod
    def run(cls, checkpoint: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(load_checkpoint(checkpoint, weight_dtype))


class PSACogVideoXFix(PSANode):
    """The corrections of PSA CogVideoX Loader for a CogVideoX model from another loader."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSACogVideoXFix",
            display_name="PSA CogVideoX Fix",
            accept_all_inputs=True,
            category="model/patch",
            description=(
                "Corrects positions and noise schedule of a CogVideoX model from another loader to match diffusers. "
                "Not needed after PSA CogVideoX Loader. Do not add ModelSamplingDiscrete or VOIDSampler to it."
            ),
            search_aliases=["cogvideo", "cogvideox", "rope", "v prediction", "zero snr", "修正 CogVideoX"],
            inputs=[io.Model.Input("model", tooltip="A CogVideoX model, 1.0 or 1.5, any size.")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def run(cls, model) -> io.NodeOutput:
        return io.NodeOutput(correct_model(model))


class PSACogVideoXSigmas(PSANode):
    """The trailing timesteps of diffusers as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSACogVideoXSigmas",
            display_name="PSA CogVideoX Sigmas",
            accept_all_inputs=True,
            category="model/sampling/schedulers",
            description=(
                "Noise levels of diffusers' trailing timesteps (999, 749, 499, 249 for 4 steps), for any number of "
                "steps. For Custom Sampler, together with PSA CogVideoX Sampler."
            ),
            search_aliases=["cogvideo", "trailing", "timesteps", "scheduler", "调度器"],
            inputs=[
                io.Model.Input("model", tooltip="The model from PSA CogVideoX Loader or PSA CogVideoX Fix."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="Sampling steps: 4 with the 4-step LoRA, 50 without it.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "1.0 makes a new video. Below 1, part of the input latent is kept: with 0.5 the same number "
                        "of steps covers the second half of the schedule."
                    ),
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def run(cls, model, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(trailing_sigmas(model, steps, denoise))


class PSACogVideoXSampler(PSANode):
    """diffusers' CogVideoX schedulers as a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSACogVideoXSampler",
            display_name="PSA CogVideoX Sampler",
            accept_all_inputs=True,
            category="model/sampling/samplers",
            description=(
                "diffusers' CogVideoXDPMScheduler or CogVideoXDDIMScheduler, for Custom Sampler. The 4-step LoRA "
                "needs dpm: no other sampler gives the same result."
            ),
            search_aliases=["cogvideo", "dpm", "ddim", "4 steps", "采样器"],
            inputs=[
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default="dpm",
                    tooltip=(
                        "dpm: second order, adds noise in every step; for the 4-step LoRA, 5B and 1.5. ddim: first "
                        "order, adds no noise; 2B was released with it."
                    ),
                )
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def run(cls, solver: str) -> io.NodeOutput:
        return io.NodeOutput(make_sampler(solver))


class PSACogVideoXImageToVideo(PSANode):
    """A start image for the image-to-video models."""

    rules = (check_width, check_height, check_length)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSACogVideoXImageToVideo",
            display_name="PSA CogVideoX Image To Video",
            accept_all_inputs=True,
            category="model/conditioning/cogvideox",
            description="Conditioning and empty latent for the CogVideoX image-to-video models (5B-I2V, 1.5-5B-I2V).",
            search_aliases=["cogvideo", "i2v", "start image", "图生视频"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Vae.Input("vae", tooltip="The CogVideoX VAE."),
                io.Image.Input(
                    "start_image", tooltip="The first frame. Only the first picture is used, cropped to the size."
                ),
                io.Int.Input(
                    "width",
                    default=1360,
                    min=16,
                    max=16384,
                    step=16,
                    tooltip="Pixels, a multiple of 16: 768 to 1360 for 1.5, 720 for 5B-I2V.",
                ),
                io.Int.Input(
                    "height",
                    default=768,
                    min=16,
                    max=16384,
                    step=16,
                    tooltip="Pixels, a multiple of 16: 768 for 1.5, 480 for 5B-I2V.",
                ),
                io.Int.Input(
                    "length",
                    default=81,
                    min=1,
                    max=16384,
                    step=4,
                    tooltip="Frames, 4n + 1: 81 (5 s at 16 per second) for 1.5, 49 (6 s at 8) for 5B-I2V.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos in one run, 1 to 64."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def run(cls, positive, negative, vae, start_image, width, height, length, batch_size) -> io.NodeOutput:
        return io.NodeOutput(*image_to_video(positive, negative, vae, start_image, width, height, length, batch_size))
