"""PSA Patch: the node between loader and sampler. Schema and tooltips only; the work is done in `patching`."""

from __future__ import annotations

from comfy_api.latest import io

from ..choices.correction import CORRECTIONS
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
    check_preset,
    check_shape,
    check_window,
)
from ..choices.user_presets import fingerprint, preset_menu
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

    rules = (check_preset,)
    early_rules = (check_window, check_one_pyramid, check_place, check_shape, check_blocks)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSAPatch",
            display_name="PSA Patch",
            accept_all_inputs=True,
            category="model/patch",
            description=(
                "Pyramid Sparse Attention: the model sees important parts of the video in full, others at a half, a "
                "quarter or an eighth of their resolution, the rest not at all. Put it between the model loader "
                "(after any LoRA) and the sampler. Supports Wan with VACE, Animate and the others, HunyuanVideo, LTX, "
                "CogVideoX, Kandinsky 5, Cosmos Predict 2, Mochi, MiniMax H3; other models stay dense."
            ),
            # What people type who look for what this node does, the names of other ways to it among them.
            search_aliases=[
                "pyramid sparse attention",
                "sparse attention",
                "PSA",
                "speed up video",
                "wan speed",
                "wan faster",
                "faster video",
                "accelerate",
                "optimize attention",
                "sage attention",
                "teacache",
                "radial attention",
                "稀疏注意力",
                "视频加速",
                "加速采样",
                "优化",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A loaded video model: Wan, HunyuanVideo, LTX, CogVideoX and others."),
                io.Float.Input(
                    "sparsity",
                    default=PatchInputs.sparsity,
                    min=0.0,
                    max=MOST_SPARSITY,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=(
                        "Share of the attention work saved in the sparse steps: 0.70 is closer to dense, 0.95 saves "
                        "most, 0 is the unpatched model. No other effect in threshold mode."
                    ),
                ),
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *preset_menu()],
                    default=PatchInputs.preset,
                    tooltip=(
                        "Levels and ranking. auto: best so far. 4step: for 4-step LoRAs. generic: a model that PSA "
                        "does not know. user/...: your own. paper: as published."
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
                        "Where in the schedule PSA begins; earlier steps stay dense and settle the composition. 0.25 "
                        "is safe, 0.1 faster but less like dense. Not a share of the steps."
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
                    "budget: cuts rows by attention mass, scaled to the slider. topk: the same number of blocks per "
                    "row, scaled to the slider. threshold: the preset's own cuts.",
                ),
                io.String.Input(
                    "pyramid",
                    default=PatchInputs.pyramid,
                    advanced=True,
                    tooltip=(
                        "Share per pooling factor, e.g. '1: 0.10, 2: 0.05, 8: 0.20': of the blocks in topk mode, of "
                        "the attention mass otherwise. Empty uses the preset's."
                    ),
                ),
                _from_preset(
                    "tail",
                    ("on", "off"),
                    "off: blocks without a level are dropped; closest to dense on the demo model. on: keeps one mean "
                    "row of each, 1/64 of its work; helps if attention is flat.",
                ),
                _from_preset(
                    "order",
                    ORDERS,
                    "How tokens are lined up before blocks are cut. curve: as published. raster: a tenth faster. "
                    "tiles: 8x8 squares. semantic, hybrid: by likeness (k-means), slow.",
                ),
                _from_preset(
                    "importance",
                    IMPORTANCES,
                    "How blocks are ranked. sampled: a random quarter of the tokens, as published. pooled: means of "
                    "8, a quarter of the cost. means: one per block, may leave seams.",
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
                    tooltip="Shorter sequences stay dense: below about 10,000 tokens dense is usually faster on a GPU.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default=PatchInputs.backend,
                    advanced=True,
                    tooltip="auto: Triton on a GPU, plain torch on a CPU. If neither works, the model stays dense.",
                ),
                io.Boolean.Input(
                    "verbose", default=PatchInputs.verbose, advanced=True, tooltip="Write one log line per step."
                ),
                # New inputs come last and are optional, so that older workflows and prompts keep working.
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=PatchInputs.precision,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "bf16: queries and keys keep the model's 16 bits. int8: rounded to 8 bits, 0.1 % more error, "
                        "as fast as 16 bits on an H100; Triton only. auto: bf16."
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
                        "Choose the levels only in every so-many-th step and keep them in between. Saves the 10 to "
                        "35 % of attention that choosing takes, but needs memory."
                    ),
                ),
                Pyramid.Input(
                    "psa_pyramid",
                    optional=True,
                    tooltip="Your own levels from PSA Pyramid, used instead of the preset, which must then be auto.",
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
                        "Spend more of the same work in the first sparse steps: at 0.6, density falls from 1.6 to "
                        "0.4 times the slider's. Not tried on real weights. 0: all steps alike."
                    ),
                ),
                io.Combo.Input(
                    "correction",
                    options=list(CORRECTIONS),
                    default=PatchInputs.correction,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Give back what sparsity lost in the last dense step: much closer to dense. full: 3 GB of "
                        "memory for Wan 1.3B at 720p; half to eighth: less. auto: what fits."
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
        shown = {"psa": told(model, patched, node), "psa_asked": [asked], "psa_sparsity": [inputs["sparsity"]]}
        return io.NodeOutput(patched, ui=shown)
