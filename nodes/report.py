"""PSA Report: what the last sampling run of a patched model did, as JSON. Schema only."""

from __future__ import annotations

import json

from comfy_api.latest import io

from ..errors import require_model
from ..patching.patch import KEY, PatchHandle


class PSAReport(io.ComfyNode):
    """Figures of the last run: sparsity and seconds per step, sparsity per layer, fallbacks, one map of levels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSAReport",
            display_name="PSA Report",
            category="model/patch",
            description=(
                "Figures of the last sampling run of a model from PSA Patch: sparsity and seconds per step, sparsity "
                "per layer, calls that stayed dense and why. Wire the sampler's latent through it, so that it runs "
                "after the sampler."
            ),
            search_aliases=["PSA statistics", "sparsity report"],
            inputs=[
                io.Model.Input("model", tooltip="The model from PSA Patch, the one that the sampler used."),
                io.Latent.Input("samples", tooltip="The sampler's output; handed on unchanged."),
            ],
            outputs=[io.Latent.Output(display_name="samples"), io.String.Output(display_name="report")],
            has_intermediate_output=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model, samples) -> io.NodeOutput:
        require_model(model, "PSA Report")
        handle: PatchHandle | None = model.get_attachment(KEY)
        if handle is None:
            raise ValueError("PSA Report, input model: it did not come from PSA Patch; wire PSA Patch's output here")
        report = json.dumps(handle.report or {"note": handle.note})
        return io.NodeOutput(samples, report, ui={"text": [report]})
