"""PSA Pyramid: the shape of the pyramid, a slider per level. Schema and tooltips only."""

from __future__ import annotations

from functools import partial

from comfy_api.latest import io

from ..choices.levels import NODE, check_pyramid, make_pyramid
from ..choices.presets import OWN_SHAPE
from ..choices.user_presets import check_name
from ..kernels.config import BLOCK_SIZES, IMPORTANCES, MODES, ORDERS, PRECISIONS, PyramidConfig
from .base import PSANode

Pyramid = io.Custom("PSA_PYRAMID")


def _slider(name: str, default: float, tooltip: str, advanced: bool = False) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        display_mode=io.NumberDisplay.slider,
        tooltip=tooltip,
        advanced=advanced,
    )


def _combo(name: str, options: tuple, default: object, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(
        name, options=[str(value) for value in options], default=str(default), tooltip=tooltip, advanced=True
    )


class PSAPyramid(PSANode):
    """A pyramid of one's own for PSA Patch, in place of a preset."""

    early_rules = (check_pyramid, partial(check_name, node=NODE))

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSAPyramid",
            display_name="PSA Pyramid",
            accept_all_inputs=True,
            category="model/patch",
            description=(
                "How much of the video is seen at which resolution: a slider per level, the most important blocks at "
                "the finest. Connect it to psa_pyramid of PSA Patch; it takes the preset's place. What is left over is "
                "dropped, or seen as one mean row a block with tail."
            ),
            search_aliases=["pyramid levels", "sparse attention levels", "PSA levels", "PSA preset"],
            inputs=[
                _slider(
                    "full",
                    0.10,
                    "Share of the block pairs that are seen at full resolution, the most important ones. Each 0.01 "
                    "costs 0.01 of the dense work.",
                ),
                _slider("half", 0.05, "Share seen at half resolution, two tokens as one. Each 0.01 costs 0.005."),
                _slider("quarter", 0.0, "Share seen at a quarter, four tokens as one. Each 0.01 costs 0.0025."),
                _slider("eighth", 0.20, "Share seen at an eighth, eight tokens as one. Each 0.01 costs 0.00125."),
                io.Boolean.Input(
                    "tail",
                    default=OWN_SHAPE["tail"],
                    tooltip=(
                        "off: blocks of no level are not seen at all; closest to dense on the demo model, by 3 dB at "
                        "sparsity 0.85. on: one mean row of each is kept, 1/64 of its work at block_kv 64; helps where "
                        "attention is flat."
                    ),
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=OWN_SHAPE["mode"],
                    tooltip=(
                        "topk: the levels are shares of the blocks, the same for every row. budget: they are shares of "
                        "the attention mass, so easy rows get fewer blocks, all scaled to meet the slider. threshold: "
                        "shares of the mass as written; the sparsity follows the video."
                    ),
                ),
                io.Boolean.Input(
                    "as_written",
                    default=False,
                    tooltip=(
                        "off: the sparsity slider of PSA Patch scales all levels together until it is met. on: the "
                        "levels are taken as they stand and that slider does not act (0 still is the stock model). "
                        "Threshold mode always takes them as they stand; budget mode never."
                    ),
                ),
                _combo(
                    "block_q",
                    BLOCK_SIZES,
                    PyramidConfig.block_q,
                    "Tokens per query block: 32, 64 or 128. 128 is the fastest.",
                ),
                _combo(
                    "block_kv",
                    BLOCK_SIZES,
                    PyramidConfig.block_kv,
                    "Tokens per key block: 32, 64 or 128. Smaller is finer and slower; 64 is the measured default.",
                ),
                _slider(
                    "similarity_half",
                    0.0,
                    "Only blocks whose neighbouring tokens are at least this alike (cosine, 0 to 1) may be seen at "
                    "half resolution; others are refined, so less is saved. 0 sets no limit; the paper takes 0.70.",
                    advanced=True,
                ),
                _slider(
                    "similarity_quarter",
                    0.0,
                    "The same for a quarter of the resolution. 0 sets no limit; the paper takes 0.65.",
                    advanced=True,
                ),
                _slider(
                    "similarity_eighth",
                    0.0,
                    "The same for an eighth of the resolution. 0 sets no limit; the paper takes 0.60.",
                    advanced=True,
                ),
                _combo(
                    "order",
                    ORDERS,
                    OWN_SHAPE["order"],
                    "How tokens are lined up before blocks are cut. curve: space-filling curve, as published. raster: "
                    "row by row, about a tenth faster. tiles: 8x8 squares.",
                ),
                _combo(
                    "importance",
                    IMPORTANCES,
                    OWN_SHAPE["importance"],
                    "How blocks are ranked. sampled: by a random quarter of the tokens, as published. pooled: by means "
                    "of 8 tokens, 4 times cheaper. means: by one mean per block, cheapest, can leave visible seams.",
                ),
                _combo(
                    "precision",
                    PRECISIONS,
                    PyramidConfig.precision,
                    "bf16: queries and keys in the model's 16 bits. int8: rounded to 8 bits, 0.1 % more error, as fast "
                    "on an H100; needs Triton. auto: bf16.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    advanced=True,
                    tooltip=(
                        "A name, up to 64 letters: running the node writes the pyramid to user/psa_presets/NAME.json, "
                        "and PSA Patch lists it as user/NAME after a reload (key R). Empty writes nothing."
                    ),
                ),
            ],
            outputs=[Pyramid.Output(display_name="psa_pyramid", tooltip="For psa_pyramid of PSA Patch.")],
        )

    @classmethod
    def run(cls, **inputs) -> io.NodeOutput:
        return io.NodeOutput(make_pyramid(**inputs))
