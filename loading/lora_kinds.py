"""Which model a LoRA was probably made for, from its names alone: for the message when it does not fit."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

# (what to say, ComfyUI's family, what its modules are called), the most telling first.
_KINDS = (
    ("Stable Diffusion (1.5, 2 or XL)", "sd", r"(?:down|up|mid|input|output|middle)_blocks?[._]"),
    ("Stable Diffusion 3", "sd3", r"joint_blocks[._]\d"),
    ("Qwen-Image", "qwen_image", r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp|mod)"),
    ("HunyuanVideo", "hunyuan_video", r"double_blocks[._]\d+[._]img_(?:attn_qkv|attn_proj|mlp[._]fc)"),
    ("Flux", "flux", r"(?:double|single)_blocks[._]\d|single_transformer_blocks[._]\d"),
    ("Stable Diffusion 3", "sd3", r"transformer_blocks[._]\d+[._]attn[._]add_[qkv]_proj"),
    ("Z-Image or Lumina", "lumina2", r"(?<!encoder[._])layers[._]\d+[._](?:attention|feed_forward)[._]"),
    ("LTX-Video or PixArt", "ltxv", r"transformer_blocks[._]\d+[._]attn2[._]to_"),
    ("CogVideoX", "cogvideox", r"transformer_blocks[._]\d+[._](?:attn1[._]to_|ff[._]net)"),
    ("Wan", "wan2.1", r"blocks[._]\d+[._](?:(?:self|cross)_attn[._][qkvo][._]|attn[12][._]to_|ffn[._])"),
)


def looks_like(keys: Iterable[str], family: str) -> str | None:
    """The kind of model that a LoRA's keys look like, in words; None for the model's own family or if unknown."""
    text = "\n".join(keys)
    kinds = ((words, theirs) for words, theirs, pattern in _KINDS if re.search(pattern, text))
    words, theirs = next(kinds, (None, None))
    return None if theirs is not None and theirs == family else words


_TWINS = {"hunyuan_video": ("Flux", {"double_blocks": 19, "single_blocks": 38})}
"""Family -> a model with the same names and sizes, and the number of its blocks, of which it has fewer."""
_BLOCK = re.compile(r"diffusion_model\.(\w+)\.(\d+)\.")


def twin_of(patched: Iterable[str], family: str) -> str | None:
    """The model with all names and sizes of a family, if weights are patched in each of its blocks and no others."""
    twin, blocks = _TWINS.get(family, (None, {}))
    found = defaultdict(set)
    for match in filter(None, map(_BLOCK.match, patched)):
        found[match[1]].add(int(match[2]))
    stacks = [stack for stack in blocks if stack in found]
    return twin if stacks and all(found[stack] == set(range(blocks[stack])) for stack in stacks) else None
