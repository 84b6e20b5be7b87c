"""PSA Compare: two videos side by side with their difference and its figures. Schema only."""

from __future__ import annotations

from comfy_api.latest import io

from ..reports.compare import check_lpips, compare_images
from .base import PSANode


class PSACompare(PSANode):
    """How different two videos are: PSNR, SSIM, LPIPS, and a picture of the difference."""

    rules = (check_lpips,)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSACompare",
            display_name="PSA Compare",
            accept_all_inputs=True,
            category="model/patch",
            description=(
                "Two videos (or batches of images) of the same size, side by side with their difference, and how "
                "similar they are. Give it the video with PSA and the one without, sampled from the same seed."
            ),
            search_aliases=[
                "PSNR",
                "SSIM",
                "LPIPS",
                "video difference",
                "side by side",
                "compare videos",
                "video quality",
                "视频对比",
                "视频质量",
            ],
            inputs=[
                io.Image.Input("images_a", tooltip="The first video, for example from the unpatched model."),
                io.Image.Input("images_b", tooltip="The second video: the same size and number of frames."),
                io.String.Input("name_a", default="dense", tooltip="Title above the first video, up to 40 letters."),
                io.String.Input("name_b", default="PSA", tooltip="Title above the second video, up to 40 letters."),
                io.Float.Input(
                    "difference_gain",
                    default=4.0,
                    min=1.0,
                    max=32.0,
                    step=1.0,
                    tooltip="How much brighter the difference is drawn: 4 shows what the eye may miss, 1 leaves "
                    "it as it is.",
                ),
                io.Boolean.Input(
                    "lpips",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Also compute LPIPS, 0 (alike) to about 1. Needs the package lpips; torchvision downloads "
                        "its network (AlexNet, 233 MB) on first use."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="side_by_side", tooltip="First, second, difference: three times as wide."),
                io.Float.Output(
                    display_name="psnr", tooltip="dB over all pixels; above 40 hardly visible, 30 visible, 20 far off."
                ),
                io.Float.Output(
                    display_name="ssim", tooltip="Mean over the frames; 1 means equal, above 0.95 is close."
                ),
                io.String.Output(display_name="figures", tooltip="All figures, also those of every frame, as JSON."),
            ],
        )

    @classmethod
    def run(cls, images_a, images_b, name_a, name_b, difference_gain, lpips) -> io.NodeOutput:
        picture, psnr, ssim, figures = compare_images(images_a, images_b, name_a, name_b, difference_gain, lpips)
        return io.NodeOutput(picture, psnr, ssim, figures, ui={"text": [figures]})
