"""Let the processes of torch.distributed share a pipeline's video by Ulysses: diffusers' context parallel in one call.

It only calls `enable_parallelism`, and gives it what diffusers lacks for CogVideoX. PSA works with and without it.
"""

from __future__ import annotations

from typing import Any

from . import cogvideox
from .apply import find_transformers
from .layout import family_of
from .parallel import check_heads

_COGVIDEOX = "CogVideoXTransformer3DModel"
SHARED = ("WanTransformer3DModel", _COGVIDEOX)
"""By class name. diffusers also has plans for LTX and LTX-2, but fails with them (0.42.1), and none for the rest."""


def enable_ulysses(pipe: Any, *, uneven: bool = False) -> None:
    """Split the tokens of a pipeline's transformers, and around attention their heads, over all processes.

    Call it in every process, once, after `torch.distributed.init_process_group`; before or after `apply_psa`.

    Args:
        pipe: a CogVideoX, Wan2.1 or Wan2.2 pipeline, or one of their transformers.
        uneven: by default, the number of processes must divide the heads and the video's tokens. With this it need not,
            at the cost of a short wait in every attention call (diffusers' `ulysses_anything`).

    Raises:
        TypeError: not a pipeline or transformer that PSA knows.
        ValueError: processes cannot share this transformer, its heads cannot be shared by so many, or a CogVideoX has
            an attention processor of its own.
        RuntimeError: there are no processes to share with, or parallelism is enabled already.
    """
    import torch.distributed
    from diffusers import ContextParallelConfig

    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise RuntimeError(
            "enable_ulysses needs several processes: start the script with torchrun, and call "
            "torch.distributed.init_process_group first"
        )
    degree = torch.distributed.get_world_size()
    transformers = [transformer for transformer, _ in find_transformers(pipe, "enable_ulysses")]
    for transformer in transformers:
        _check(transformer)
        check_heads(transformer.config.num_attention_heads, degree, uneven)
    for transformer in transformers:
        plan = {}
        if family_of(transformer) == _COGVIDEOX:
            transformer.set_attn_processor(cogvideox.SharedProcessor())
            plan = {"cp_plan": cogvideox.split_plan()}
        config = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=uneven)
        transformer.enable_parallelism(config=config, **plan)


def _check(transformer: Any) -> None:
    name = family_of(transformer)
    if name not in SHARED:
        raise ValueError(
            f"enable_ulysses, pipe: {name} was given; allowed: {', '.join(SHARED)}; make a video on each GPU instead"
        )
    if name != _COGVIDEOX:
        return
    foreign = {type(one).__name__ for one in transformer.attn_processors.values()} - set(cogvideox.PROCESSORS)
    if foreign:
        raise ValueError(
            f"enable_ulysses, pipe: attention processors {', '.join(sorted(foreign))} were given; allowed: those of "
            f"diffusers, {', '.join(cogvideox.PROCESSORS)}; set one of them"
        )
