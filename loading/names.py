"""Names of the same module in diffusers and in ComfyUI, for CogVideoX and Wan. Names only; no tensors.

A table holds pairs (diffusers, native) of dotted parts of a name. They are replaced in this order.
"""

from __future__ import annotations

from collections.abc import Sequence

Table = Sequence[tuple[str, str]]

COGVIDEOX: Table = (
    (".transformer_blocks.", ".blocks."),
    (".attn1.to_q.", ".q."),
    (".attn1.to_k.", ".k."),
    (".attn1.to_v.", ".v."),
    (".attn1.norm_q.", ".norm_q."),
    (".attn1.norm_k.", ".norm_k."),
    (".attn1.to_out.0.", ".attn_out."),
    (".ff.net.0.proj.", ".ff_proj."),
    (".ff.net.2.", ".ff_out."),
    (".time_embedding.linear_1.", ".time_embedding_linear_1."),
    (".time_embedding.linear_2.", ".time_embedding_linear_2."),
    (".ofs_embedding.linear_1.", ".ofs_embedding_linear_1."),
    (".ofs_embedding.linear_2.", ".ofs_embedding_linear_2."),
)

WAN: Table = (
    *(
        (f".{theirs}.{part}.", f".{ours}.{native}.")
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for part, native in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    ),
    (".attn2.add_k_proj.", ".cross_attn.k_img."),
    (".attn2.add_v_proj.", ".cross_attn.v_img."),
    (".attn2.norm_added_k.", ".cross_attn.norm_k_img."),
    *(
        (f".{theirs}.norm_{part}.", f".{ours}.norm_{part}.")
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for part in "qk"
    ),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".condition_embedder.time_embedder.linear_1.", ".time_embedding.0."),
    (".condition_embedder.time_embedder.linear_2.", ".time_embedding.2."),
    (".condition_embedder.time_proj.", ".time_projection.1."),
    (".condition_embedder.text_embedder.linear_1.", ".text_embedding.0."),
    (".condition_embedder.text_embedder.linear_2.", ".text_embedding.2."),
    (".condition_embedder.image_embedder.ff.net.0.proj.", ".img_emb.proj.1."),
    (".condition_embedder.image_embedder.ff.net.2.", ".img_emb.proj.3."),
    (".condition_embedder.image_embedder.norm1.", ".img_emb.proj.0."),
    (".condition_embedder.image_embedder.norm2.", ".img_emb.proj.4."),
    (".norm2.", ".norm3."),
    (".scale_shift_table.", ".modulation."),
    (".proj_out.", ".head.head."),
    (".proj_in.", ".before_proj."),
    (".proj_out.", ".after_proj."),  # of VACE's blocks
)

TABLES = {"cogvideox": COGVIDEOX, "wan2.1": WAN}
"""By ComfyUI's `image_model`."""


def to_native(name: str, table: Table) -> str:
    """A diffusers name ('transformer_blocks.0.attn1.to_q.weight') as ComfyUI has it ('blocks.0.q.weight')."""
    return _replaced(name, table)


def to_diffusers(name: str, table: Table) -> str:
    """The inverse of `to_native`."""
    return _replaced(name, [(native, diffusers) for diffusers, native in table])


def _replaced(name: str, pairs: Table) -> str:
    name = f".{name}."
    for old, new in pairs:
        name = name.replace(old, new, 1)
    return name[1:-1]
