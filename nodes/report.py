"""PSA Report: what the last sampling run of a patched model did, as a picture and as JSON. Schema only."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..reports.show import check_prefix, show_report, wrong_prefix
from .base import PSANode


class PSAReport(PSANode):
    """Figures of the last run: sparsity and seconds per step, sparsity per layer, fallbacks, where the model looked."""

    rules = (check_prefix,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSAReport",
            display_name="PSA Report",
            accept_all_inputs=True,
            category="model/patch",
            description=(
                "A picture and the figures of the last sampling run of a model from PSA Patch: sparsity of every "
                "step and layer, seconds, where the model looked at which resolution, which calls stayed dense and "
                "why. Connect the sampler's latent, so that it runs after the sampler."
            ),
            search_aliases=[
                "PSA statistics",
                "sparsity report",
                "PSA picture",
                "attention map",
                "sparsity heat map",
                "注意力图",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model from PSA Patch, the one that the sampler used."),
                io.Latent.Input("samples", tooltip="The sampler's output; passed on unchanged."),
                # Later inputs are optional: prompts from earlier versions of a workflow do not have them.
                io.Int.Input(
                    "layer",
                    default=-1,
                    optional=True,
                    min=-1,
                    max=999,
                    tooltip="Transformer block whose map is drawn, counted from 0; -1 is the middle one.",
                ),
                io.Int.Input(
                    "head",
                    default=0,
                    optional=True,
                    min=0,
                    max=999,
                    tooltip="Attention head whose map is drawn, counted from 0; Wan 1.3B has 12, Wan 14B has 40.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="psa/report",
                    optional=True,
                    advanced=True,
                    tooltip="Where to save the PNG in ComfyUI's output folder; empty shows it without saving.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The decoded video to draw the map on; without it the latent's own preview is used.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The latent, unchanged."),
                io.String.Output(display_name="report", tooltip="All figures as JSON."),
                io.Image.Output(display_name="picture", tooltip="The picture, 1200 pixels wide."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def run(cls, model, samples, layer=-1, head=0, filename_prefix="psa/report", images=None) -> io.NodeOutput:
        report, picture = show_report(model, samples, layer, head, images)
        saved = save_picture(picture, filename_prefix, cls)
        return io.NodeOutput(samples, report, picture, ui={**saved, "text": [report]})


def save_picture(picture, prefix: str, node: type[io.ComfyNode]) -> dict:
    """What the page shows for the IMAGE `picture`: saved to the output folder, or to the temporary one if no prefix."""
    if not prefix.strip():
        return ui.PreviewImage(picture, cls=node).as_dict()
    try:
        return ui.ImageSaveHelper.get_save_images_ui(picture, filename_prefix=prefix, cls=node).as_dict()
    except Exception as error:  # ComfyUI refuses a folder outside its own with a plain Exception
        raise wrong_prefix(prefix, node.define_schema().display_name) from error
