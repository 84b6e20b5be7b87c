"""PSA Calibrate: proposes a sparsity from one short run. Schema and tooltips only."""

from __future__ import annotations

import json
from functools import partial

from comfy_api.latest import io

from ..choices.settings import AUTO, PatchInputs, check_one_pyramid
from ..choices.user_presets import check_name, fingerprint, preset_menu
from ..reports.calibrate import GOALS, NODE, calibrate, check_shape, sampler
from ..reports.draw_curve import draw_calibration
from ..reports.show import check_prefix, to_image
from .base import PSANode
from .pyramid import Pyramid
from .report import save_picture


class PSACalibrate(PSANode):
    """The sparsity that meets a target error or a target speed-up on this machine, with this model and size."""

    rules = (
        partial(check_one_pyramid, node=NODE),
        check_shape,
        partial(check_name, node=NODE),
        partial(check_prefix, node=NODE),
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSACalibrate",
            display_name="PSA Calibrate",
            accept_all_inputs=True,
            category="model/patch",
            description=(
                "Runs a short dense sampling, calls the model again with PSA at seven sparsities from 0.50 to 0.95 "
                "in three of its steps, and proposes the sparsity that meets the target. Use your own model, prompt "
                "and size; it takes about as long as 30 dense steps."
            ),
            search_aliases=["PSA tune", "find sparsity", "sparsity benchmark", "PSA preset", "稀疏度校准"],
            inputs=[
                io.Model.Input("model", tooltip="A loaded video model that PSA Patch supports, without PSA Patch."),
                io.Conditioning.Input("positive", tooltip="A prompt like the ones you use."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; it does not matter at cfg 1."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size you will sample."),
                io.Combo.Input(
                    "goal",
                    options=list(GOALS),
                    default="error",
                    tooltip=(
                        "error: the highest sparsity whose output differs from dense by at most the target. "
                        "speed-up: the lowest sparsity at which a model call is that much faster."
                    ),
                ),
                io.Float.Input(
                    "target",
                    default=0.15,
                    min=0.001,
                    max=20.0,
                    step=0.001,
                    tooltip=(
                        "error: a relative distance; 0.15 gave 28.7 dB on the demo model, 0.09 is close to dense. "
                        "speed-up: a factor; 2.0 halves the time of a step."
                    ),
                ),
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *preset_menu()],
                    default=AUTO,
                    tooltip="Levels and ranking, as in PSA Patch; threshold presets have no sparsity to calibrate.",
                ),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**63 - 1,
                    # A seed that changes after each run would calibrate again every time.
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed for the noise of the short run.",
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=3,
                    max=100,
                    tooltip="Steps of the short run: 8 are enough.",
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=30.0, step=0.1, tooltip="Guidance, as in your sampler."
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.25,
                    min=0.0,
                    max=0.95,
                    step=0.01,
                    advanced=True,
                    tooltip="As in PSA Patch: earlier steps stay dense and are not measured; the default is 0.25.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=PatchInputs.min_tokens,
                    min=0,
                    max=1_000_000,
                    advanced=True,
                    tooltip="As in PSA Patch: shorter sequences stay dense, and there is nothing to calibrate.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    tooltip=(
                        "A name, up to 64 letters. Writes user/psa_presets/NAME.json; PSA Patch lists it as "
                        "user/NAME after a reload (key R). Empty writes nothing."
                    ),
                ),
                io.String.Input(
                    "filename_prefix",
                    default="",
                    advanced=True,
                    tooltip="Where to save the picture in ComfyUI's output folder; empty shows it without saving.",
                ),
                Pyramid.Input(
                    "psa_pyramid",
                    optional=True,
                    tooltip="Your own levels from PSA Pyramid, used instead of the preset.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="sparsity", tooltip="The proposal, 0.50 to 0.95, for PSA Patch."),
                io.String.Output(display_name="figures", tooltip="Error and seconds for every sparsity, as JSON."),
                io.Image.Output(display_name="picture", tooltip="Error and speed against sparsity, 1000 pixels wide."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, preset: str = AUTO, **_):
        return fingerprint(preset)

    @classmethod
    def run(cls, model, positive, negative, latent_image, seed, steps, cfg, filename_prefix, **inputs) -> io.NodeOutput:
        sample = sampler(latent_image, positive, negative, seed=seed, steps=steps, cfg=cfg)
        found = calibrate(model, sample, **inputs)
        picture = to_image(draw_calibration(found.as_dict()))
        figures = json.dumps(found.as_dict())
        saved = save_picture(picture, filename_prefix, cls)
        return io.NodeOutput(found.sparsity, figures, picture, ui={**saved, "text": [figures]})
