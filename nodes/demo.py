"""PSA Demo Prompt: conditioning for the small model of the demo, instead of a text prompt."""

from __future__ import annotations

from comfy_api.latest import io

from ..demo.scene import ATTRIBUTES, Scene, conditioning, scene_from_indices, scene_to_indices
from .base import PSANode

_DEFAULT = scene_to_indices(Scene())


class PSADemoScene(PSANode):
    """Two moving objects over a moving background, as conditioning of the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSADemoScene",
            display_name="PSA Demo Prompt",
            accept_all_inputs=True,
            category="PSA/demo",
            description="What the demo model should show, used instead of a text prompt; other models cannot read it.",
            # Nobody who looks for a node wants this one: the template brings it. Search, which would find it by its id
            # too, and menus leave it out unless a user turns developer mode on.
            is_dev_only=True,
            inputs=[
                io.Combo.Input(
                    f"{slot}_{name}",
                    options=list(words),
                    default=words[default],
                    tooltip=f"{name.capitalize()} of the {slot}: one of {len(words)}.",
                )
                for (slot, name, words), default in zip(ATTRIBUTES, _DEFAULT, strict=True)
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def run(cls, **words: str) -> io.NodeOutput:
        indices = [choices.index(words[f"{slot}_{name}"]) for slot, name, choices in ATTRIBUTES]
        return io.NodeOutput([[conditioning([scene_from_indices(indices)]), {}]])
