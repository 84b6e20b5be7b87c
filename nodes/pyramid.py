"""PSA Pyramid: the user's own levels, one slider each. Schema and tooltips only."""

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
    """The user's own levels for PSA Patch, used instead of a preset."""

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
                "the finest. Connect it to psa_pyramid of PSA Patch, where it is used instead of the preset. The "
                "rest is dropped, or with tail seen as one mean row per block."
            ),
            search_aliases=["pyramid levels", "sparse attention levels", "PSA levels", "PSA preset", "注意力金字塔"],
            inputs=[
                _slider(
                    "full",
                    0.10,
                    "Share of the block pairs seen at full resolution, the most important ones. Each 0.01 costs 0.01 "
                    "of the dense work.",
                ),
                _slider("half", 0.05, "Share seen at half resolution, two tokens as one. Each 0.01 costs 0.005."),
                _slider("quarter", 0.0, "Share seen at a quarter, four tokens as one. Each 0.01 costs 0.0025."),
                _slider("eighth", 0.20, "Share seen at an eighth, eight tokens as one. Each 0.01 costs 0.00125."),
                io.Boolean.Input(
                    "tail",
                    default=OWN_SHAPE["tail"],
                    tooltip=(
                        "off: blocks without a level are not seen; 3 dB closer to dense on the demo model at 0.85. "
                        "on: keeps one mean row of each; helps if attention is flat."
                    ),
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=OWN_SHAPE["mode"],
                    tooltip=(
                        "topk: levels are shares of the blocks, the same for every row. budget: shares of attention "
                        "mass, scaled to the slider. threshold: shares of the mass as written."
                    ),
                ),
                io.Boolean.Input(
                    "as_written",
                    default=False,
                    tooltip=(
                        "off: the sparsity slider of PSA Patch scales all levels. on: levels are used as set, and of "
                        "the slider only 0 (unpatched) counts. Not in budget mode."
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
                    "Blocks whose neighbouring tokens are less alike than this (cosine, 0 to 1) are seen finer than "
                    "at half resolution. 0: no limit; the paper uses 0.70.",
                    advanced=True,
                ),
                _slider(
                    "similarity_quarter",
                    0.0,
                    "The same for a quarter of the resolution. 0: no limit; the paper uses 0.65.",
                    advanced=True,
                ),
                _slider(
                    "similarity_eighth",
                    0.0,
                    "The same for an eighth of the resolution. 0: no limit; the paper uses 0.60.",
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
                    "How blocks are ranked. sampled: a random quarter of the tokens, as published. pooled: means of "
                    "8, a quarter of the cost. means: one per block, may leave seams.",
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
                        "A name, up to 64 letters. Running the node writes user/psa_presets/NAME.json; PSA Patch "
                        "lists it after a reload (key R). Empty writes nothing."
                    ),
                ),
            ],
            outputs=[Pyramid.Output(display_name="psa_pyramid", tooltip="For psa_pyramid of PSA Patch.")],
        )

    @classmethod
    def run(cls, **inputs) -> io.NodeOutput:
        return io.NodeOutput(make_pyramid(**inputs))
