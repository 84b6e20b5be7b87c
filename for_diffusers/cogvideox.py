"""CogVideoX on several GPUs: how diffusers' context parallel splits it, and the attention that goes with that.

diffusers has no plan for this family, whose attention sees text and video together. Here the video's tokens are split,
and every process has the whole text. Around attention, processes exchange tokens for heads, as Ulysses does (arXiv
2309.14509). Text needs no exchange before attention, and comes back with the video's tokens after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

PROCESSORS = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")
"""diffusers' own, by class name, which `SharedProcessor` does the work of."""


def split_plan() -> dict[str, Any]:
    """The `cp_plan` of a CogVideoXTransformer3DModel for `enable_parallelism`: the video is split, the text is not."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    positions = ContextParallelInput(split_dim=0, expected_dims=2)
    return {
        "": {"image_rotary_emb": [positions, positions]},
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


class SharedProcessor:
    """Attention processor of CogVideoX in which processes share the heads. diffusers tells it how they are shared.

    It does what diffusers' own processors do, also with fused projections.
    """

    _attention_backend: str | None = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [B, part of the video, C], encoder_hidden_states [B, text, C]; the same of the output.

        Raises:
            ValueError: a mask is given, or gradients are asked for.
        """
        if attention_mask is not None:
            raise ValueError("CogVideoX on several GPUs takes no attention_mask; leave it out")
        if torch.is_grad_enabled():
            raise ValueError("CogVideoX on several GPUs computes no gradients; call the model under torch.no_grad()")
        text = encoder_hidden_states.shape[1]
        states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in _projected(attn, states))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            for x in (q, k):
                x[:, :, text:] = apply_rotary_emb(x[:, :, text:], image_rotary_emb)
        output = self._attention(torch.stack([q, k, v]), text).transpose(1, 2).flatten(2)
        output = attn.to_out[1](attn.to_out[0](output))
        return output[:, text:], output[:, :text]

    def _attention(self, qkv: torch.Tensor, text: int) -> torch.Tensor:
        """Attention of q, k, v [3, B, H, text + part, D] over the whole video: [B, H, text + part, D]."""
        if self._parallel_config is None:
            return F.scaled_dot_product_attention(*qkv)
        config = self._parallel_config.context_parallel_config
        group, ranks = config._ulysses_mesh.get_group(), config.ulysses_degree
        rank = config._ulysses_mesh.get_local_rank()
        heads = [len(part) for part in torch.arange(qkv.shape[2]).split(-(-qkv.shape[2] // ranks))]
        here = qkv.shape[3] - text
        tokens = _all_lengths(here, qkv.device, group) if config.ulysses_anything else [here] * ranks

        own = qkv.split(heads, 2)[rank][:, :, :, :text]
        parts = exchange(
            qkv[:, :, :, text:].split(heads, 2),
            [(*qkv.shape[:2], heads[rank], length, qkv.shape[-1]) for length in tokens],
            group,
        )
        output = F.scaled_dot_product_attention(*torch.cat([own, *parts], 3))

        words, video = output[:, :, :text], output[:, :, text:]
        parts = exchange(
            [torch.cat([words, part], 2) for part in video.split(tokens, 2)],
            [(output.shape[0], count, text + here, output.shape[-1]) for count in heads],
            group,
        )
        return torch.cat(parts, 1)


def exchange(sent: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]], group: Any) -> list[torch.Tensor]:
    """Send a tensor to every process of a group, and get one of the given shape from each."""
    flat = torch.cat([part.reshape(-1) for part in sent])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = flat.new_empty(sum(sizes))
    dist.all_to_all_single(received, flat, sizes, [part.numel() for part in sent], group=group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def _all_lengths(length: int, device: torch.device, group: Any) -> list[int]:
    """The lengths that the processes of a group have, in their order. Reads from the device."""
    own = torch.tensor([length], device=device)
    lengths = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, own, group=group)
    return torch.cat(lengths).tolist()


def _projected(attn: Any, states: torch.Tensor) -> Sequence[torch.Tensor]:
    if getattr(attn, "fused_projections", False):
        return attn.to_qkv(states).chunk(3, dim=-1)
    return attn.to_q(states), attn.to_k(states), attn.to_v(states)
