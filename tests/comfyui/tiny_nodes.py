"""Nodes of a test server: tiny models that no file can stand for, and what takes encoders of many GB to make.

ComfyUI loads this file as a pack of its own, with `tiny_families.py` in the same folder.
"""

import comfy.nested_tensor
import torch

from . import tiny_families

KINDS = list(tiny_families.KINDS)
BESIDE = {
    "glyphs": lambda: {"conditioning_byt5small": tiny_families.normal(1, 7, 1472)},
    "vision": lambda: {"clip_vision_output": tiny_families.vision(width=1152)},
    "image": lambda: {"concat_latent_image": tiny_families.normal(1, 32, 5, 11, 13)},
}
"""What HunyuanVideo 1.5 takes besides the text."""


class TinyModel:
    """ComfyUI's detection takes every Mochi and Cosmos Predict 2 for one of the released sizes."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "load", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (KINDS,)}}

    def load(self, kind):
        return (tiny_families.load(kind),)


class TinyConditioning:
    """A prompt without a text encoder."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (KINDS,), "seed": ("INT", {"default": 2}), "beside": ("STRING", {"default": ""})}}

    def make(self, kind, seed, beside):
        extra = {name: value for word in beside.split() for name, value in BESIDE[word]().items()}
        return (tiny_families.conditioning(kind, seed=seed, **extra),)


class TinySound:
    """The video's latent together with a silent one of sound."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "join", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (KINDS,), "video": ("LATENT",)}}

    def join(self, kind, video):
        sound = torch.zeros(tiny_families.KINDS[kind].audio)
        return ({"samples": comfy.nested_tensor.NestedTensor((video["samples"], sound))},)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TinyModel, TinyConditioning, TinySound)}
