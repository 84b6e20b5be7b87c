"""PSA Patch: the node between loader and sampler. Schema and tooltips only; the work is done in `patching`."""

from __future__ import annotations

from comfy_api.latest import io

from ..choices.picture import suggested_sparsities
from ..choices.settings import (
    AUTO,
    FROM_PRESET,
    MOST_REUSE_STEPS,
    MOST_SPARSITY,
    PatchInputs,
    check_blocks,
    check_one_pyramid,
    check_place,
    check_shape,
    check_window,
)
from ..choices.user_presets import fingerprint, preset_names
from ..kernels.backends import BACKENDS
from ..kernels.config import BLOCK_SIZES, IMPORTANCES, MODES, ORDERS, PRECISIONS
from ..kernels.falling import MOST_FALLING
from ..patching.live import asked_of, listeners, told
from ..patching.patch import patch_model
from .base import PSANode
from .pyramid import Pyramid


def _from_preset(name: str, options: tuple, tooltip: str) -> io.Combo.Input:
    values = [FROM_PRESET, *map(str, options)]
    return io.Combo.Input(name, options=values, default=getattr(PatchInputs, name), tooltip=tooltip, advanced=True)


class PSAPatch(PSANode):
    """Patch a video model with Pyramid Sparse Attention (arXiv 2512.04025)."""

    early_rules = (check_window, check_one_pyramid, check_place, check_shape, check_blocks)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSAPatch",
            display_name="PSA Patch",
            accept_all_inputs=True,
            category="model/patch",
            description=(
                "Pyramid Sparse Attention: important parts of the video are attended in full, others at a half, a "
                "quarter or an eighth, the rest not at all. Put it between the model loader (after any LoRA) and the "
                "sampler. Serves Wan2.1 and Wan2.2 with VACE, Animate and the others, and CogVideoX; others stay dense."
            ),
            search_aliases=["pyramid sparse attention", "sparse attention", "PSA", "speed up video", "wan speed"],
            inputs=[
                io.Model.Input("model", tooltip="A loaded Wan2.1, Wan2.2 or CogVideoX model."),
                io.Float.Input(
                    "sparsity",
                    default=PatchInputs.sparsity,
                    min=0.0,
                    max=MOST_SPARSITY,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Share of the attention work that is saved in the sparse steps. 0.85 leaves 15 % of it, 0.70 "
                        "leaves 30 % and is closer to the dense video, 0.95 leaves 5 %. 0 is the stock model. Met "
                        "within 0.01 in budget and topk mode; in threshold mode sparsity follows the data."
                    ),
                ),
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *preset_names()],
                    default=PatchInputs.preset,
                    tooltip=(
                        "Shape of the pyramid. auto takes module-default, the best so far. The entries marked "
                        "published are the paper's and its release's settings, unchanged. user/... are files of yours "
                        "in ComfyUI's user/psa_presets folder."
                    ),
                    extra_dict={"psa_sparsities": suggested_sparsities()},
                ),
                io.Float.Input(
                    "start_percent",
                    default=PatchInputs.start_percent,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Where in the schedule PSA begins. The steps before it stay dense and settle the composition: "
                        "0.25 is safe, 0.1 is faster and further from the dense video; below a sparsity of 0.70, 0.30 "
                        "is closer to it for the same work. It is schedule time, not a share of the steps."
                    ),
                ),
                io.Float.Input(
                    "end_percent",
                    default=PatchInputs.end_percent,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the schedule PSA ends; 1.0 is the last step.",
                ),
                _from_preset(
                    "mode",
                    MODES,
                    "budget: cut each row by its attention mass, all cuts scaled to meet the slider. topk: the same "
                    "number of blocks for every row, scaled to the slider. threshold: the preset's cuts as they are.",
                ),
                io.String.Input(
                    "pyramid",
                    default=PatchInputs.pyramid,
                    advanced=True,
                    tooltip=(
                        "Share per pooling factor, e.g. '1: 0.10, 2: 0.05, 8: 0.20': of the blocks in topk mode, of "
                        "the attention mass in budget and threshold mode. Empty takes the preset's."
                    ),
                ),
                _from_preset(
                    "tail",
                    ("on", "off"),
                    "off: blocks that no level takes are dropped, as published; closest to dense on the demo model. "
                    "on: one mean row of each is kept, 1/64 of its work at block_kv 64; helps where attention is flat.",
                ),
                _from_preset(
                    "order",
                    ORDERS,
                    "How tokens are lined up before blocks are cut. curve: space-filling curve, as published; closest "
                    "to dense above 0.7. raster: row by row, about a tenth faster. tiles: 8x8 squares. semantic: "
                    "by k-means, 200 kinds of queries and 1000 of keys a head; hybrid: keys alone. Both are slow.",
                ),
                _from_preset(
                    "importance",
                    IMPORTANCES,
                    "How blocks are ranked. sampled: by a random quarter of the tokens, as published. pooled: by means "
                    "of 8 tokens, 4 times cheaper. means: by one mean per block, cheapest, can leave visible seams.",
                ),
                _from_preset("block_q", BLOCK_SIZES, "Tokens per query block; 128 by default."),
                _from_preset("block_kv", BLOCK_SIZES, "Tokens per key block; 64 by default, smaller is finer."),
                io.String.Input(
                    "dense_blocks",
                    default=PatchInputs.dense_blocks,
                    advanced=True,
                    tooltip="Transformer blocks that stay dense, e.g. '0, 1, 38-39'.",
                ),
                io.Int.Input(
                    "min_tokens",
                    default=PatchInputs.min_tokens,
                    min=0,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Shorter sequences stay dense: below about 12,000 tokens dense is usually faster on a GPU.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default=PatchInputs.backend,
                    advanced=True,
                    tooltip="auto: Triton on a GPU, plain torch on a CPU. Where neither serves, the model stays dense.",
                ),
                io.Boolean.Input(
                    "verbose", default=PatchInputs.verbose, advanced=True, tooltip="Write one log line per step."
                ),
                # New inputs come last and are optional, so that workflows and prompts saved before keep working.
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PatchInputs.precision,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "bf16: queries and keys stay in the model's 16 bits. int8: they are rounded to 8 bits with one "
                        "scale a block, 0.1 % more error; as fast as 16 bits on an H100. auto: bf16. Triton only."
                    ),
                ),
                io.Int.Input(
                    "reuse_steps",
                    default=PatchInputs.reuse_steps,
                    min=1,
                    max=MOST_REUSE_STEPS,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Choose the levels in every step (1), or only in every second (2), third (3) ... one and keep "
                        "them in between: saves the 10 to 35 % of the attention that choosing takes, for 4 bytes per "
                        "pair of blocks, head and layer (0.7 GB for Wan 1.3B at 720p). On the demo model the video is "
                        "as close to dense as without."
                    ),
                ),
                Pyramid.Input(
                    "psa_pyramid",
                    optional=True,
                    tooltip="A pyramid of your own from PSA Pyramid, in place of the preset, which must then be auto.",
                ),
                io.Float.Input(
                    "falling",
                    default=PatchInputs.falling,
                    min=0.0,
                    max=MOST_FALLING,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Spend more of the same work in the first sparse steps: at 0.6 their density falls from 1.6 to "
                        "0.4 times what the slider says. On eight clips of the demo model 0.4 to 1.2 dB closer to "
                        "dense at no cost in time, on the demo's own clip 0.1 dB further away (1.7 dB where "
                        "start_percent is 0.25); not tried on real weights. 0: all steps alike."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def fingerprint_inputs(cls, preset: str = PatchInputs.preset, **_):
        return fingerprint(preset)

    @classmethod
    def run(cls, model, **inputs) -> io.NodeOutput:
        node = cls.hidden.unique_id
        asked = asked_of(cls.hidden.prompt, node)
        patched = patch_model(model, **inputs, **listeners(node, asked))
        return io.NodeOutput(patched, ui={"psa": told(model, patched, node), "psa_asked": [asked]})
