"""Everything that PSA assumes about ComfyUI's insides, one function per assumption; checked on 0.30.0 and
0.33.0, what is said of 0.38 against its source.

Each has its own test in tests/patching/test_core.py: if a newer core changes something, the name of the failing test
says what. There is one other assumption, what a model's forward receives; it is in `families/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..sampling.position import NO_BLOCKS

Override = Callable[..., torch.Tensor]
Preferred = dict[tuple[str, int], list[Callable[..., torch.Tensor]]]

OVERRIDE_KEY = "optimized_attention_override"
"""Key in transformer_options under which every attention function looks for a replacement: f(func, q, k, v, heads)."""
STRENGTHS_KEY = "psa_hook_strengths"
"""Key under which `before_call` finds the strengths of the hooks on the weights; it takes it away."""

BLOCK, KIND = "block_index", "block_type"
"""Keys in transformer_options under which a model says which block it computes: its number, and which kind of block,
if each kind counts from 0."""
PREFERRED_KEY = "psa_preferred_attention"
"""Key in transformer_options for what `preferred_attention` found."""
_FORWARD = "diffusion_model.forward"
_COMPILE_KEY = "torch.compile"
"""Key of the wrapper that ComfyUI's compile nodes put around a model."""
_APPLY_MODEL_ARGUMENTS = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")


def unet_config(model: Any) -> Mapping[str, Any]:
    """What ComfyUI worked out about the checkpoint of a MODEL (ModelPatcher); empty if it knows nothing."""
    return getattr(getattr(model.model, "model_config", None), "unet_config", {})


def is_video(model: Any) -> bool:
    """Whether the latents of a MODEL have a time axis, as far as ComfyUI knows."""
    return getattr(getattr(model.model, "latent_format", None), "latent_dimensions", 3) == 3


def is_causal_wan(model: Any) -> bool:
    """Whether a MODEL is Wan's autoregressive variant; its config says t2v, like the others."""
    return type(model.model).__name__ == "WAN21_CausalAR"


def network_of(model: Any) -> Any:
    """The diffusion transformer of a MODEL, with everything that was patched onto it."""
    return model.get_model_object("diffusion_model")


def get_override(model: Any) -> Override | None:
    """The attention override of a MODEL; a clone has its own dictionary."""
    return model.model_options.get("transformer_options", {}).get(OVERRIDE_KEY)


def set_override(model: Any, override: Override | None) -> None:
    """Put an attention override on a MODEL, or take it off."""
    options = model.model_options.setdefault("transformer_options", {})
    if override is None:
        options.pop(OVERRIDE_KEY, None)
    else:
        options[OVERRIDE_KEY] = override


def add_wrappers(model: Any, key: str, *, before_call: Callable, sampling: Callable | None = None) -> None:
    """Run something before every forward of a MODEL's network, and wrap its whole sampling run.

    The second wrapper is outside the network, so a compiled network knows nothing about it.

    Args:
        sampling: sampling(executor, *args, **kwargs) calls the executor and returns its result; `executor.class_obj` is
            the guider.
        before_call: before_call(network, x, context, options, conds): latent [B, C, T, H, W] and context [B, L, C] of
            the forward, its transformer_options, and everything else that it gets, by name. If the model samples video
            and audio together, x is the video. It may return a context manager, in which the forward then runs.
    """
    import comfy.patcher_extension

    kinds = comfy.patcher_extension.WrappersMP
    if sampling is not None:
        model.add_wrapper_with_key(kinds.OUTER_SAMPLE, key, sampling)
    model.add_wrapper_with_key(kinds.APPLY_MODEL, key, ModelCallWrapper(before_call))


@dataclasses.dataclass(frozen=True)
class ModelCallWrapper:
    """The wrapper around a forward of the network, see `add_wrappers`; a class, so it can go to another process."""

    before_call: Callable

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `before_call`, then the network."""
        given = [*args, *(kwargs.get(name) for name in _APPLY_MODEL_ARGUMENTS[len(args) :])]
        x, _, _, context, _, options = given
        network = executor.class_obj.diffusion_model
        options[STRENGTHS_KEY] = _hook_strengths(executor.class_obj)
        around = self.before_call(network, _video(x, kwargs), context, options, kwargs)
        if _COMPILE_KEY in options.get("wrappers", {}).get("apply_model", {}):
            # Before torch 2.8 `_apart_from_stock` keeps no graphs apart. An extra argument does, for whole models that
            # guard on all of their arguments; models ignore arguments they do not know.
            kwargs["psa_compiled"] = True
        with around or contextlib.nullcontext(), _apart_from_stock():
            return executor(*args, **kwargs)


def _hook_strengths(model: Any) -> tuple[float, ...]:
    """How strongly each hook on the weights acts in a forward of ComfyUI's model; keyframes change it during a run."""
    hooks = getattr(getattr(model, "current_patcher", None), "current_hooks", None)
    return () if hooks is None else tuple(float(hook.strength) for hook in hooks.hooks)


def _video(x: torch.Tensor, conds: Mapping[str, Any]) -> torch.Tensor:
    """The video of a latent in which ComfyUI has packed several, one after the other, as [B, 1, N]."""
    shapes = conds.get("latent_shapes")
    if x.ndim == 5 or not shapes:
        return x
    shape = shapes[0][1:]
    size = math.prod(shape)
    return x[:, 0, :size].unflatten(1, shape) if x.shape[-1] >= size else x


@contextlib.contextmanager
def _apart_from_stock() -> Iterator[None]:
    """Inside it, no compiled graph made without PSA is run, and no graph made here will run without PSA.

    ComfyUI's compile nodes drop every guard on transformer_options, so nothing in a graph shows whether PSA was there.
    But all graphs check the autocast state of this thread. Autocast's cache setting has no effect while autocast is
    off, as it is in ComfyUI.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(not enabled)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def wrap_network(model: Any, key: str, wrapper: Callable) -> None:
    """Wrap every forward of a MODEL's network: wrapper(executor, x, timestep, context, *args, **kwargs) calls the
    executor any number of times and returns its result."""
    import comfy.patcher_extension

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, key, wrapper)


def wrap_forward(model: Any, key: str, wrapper: Callable) -> None:
    """The same as `wrap_network`, also for networks that ask for no wrappers (Mochi, or a forward that another node has
    replaced): there it replaces the forward of this MODEL."""
    forward = model.get_model_object(_FORWARD)
    if _asks_for_wrappers(forward):
        wrap_network(model, key, wrapper)
    else:
        model.add_object_patch(_FORWARD, functools.partial(wrapper, forward))


def _asks_for_wrappers(forward: Any) -> bool:
    """Whether wrappers of the network are called: its forward names them where it looks for them."""
    return "DIFFUSION_MODEL" in getattr(getattr(forward, "__code__", None), "co_names", ())


def options_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer_options among the arguments of a network's forward; some models pass them by position."""
    options = kwargs.get("transformer_options")
    return next((arg for arg in args if isinstance(arg, dict)), {}) if options is None else options


def remove_wrappers(model: Any, key: str) -> None:
    """Remove the wrappers of `key` from a MODEL."""
    import comfy.patcher_extension

    kinds = comfy.patcher_extension.WrappersMP
    for kind in (kinds.OUTER_SAMPLE, kinds.APPLY_MODEL, kinds.DIFFUSION_MODEL):
        model.remove_wrappers_with_key(kind, key)


def percent_to_sigma(guider: Any, percent: float) -> float:
    """The noise level at `percent` of the schedule of the model being sampled; a later shift node counts too."""
    return float(guider.model_patcher.get_model_object("model_sampling").percent_to_sigma(percent))


def run_sigmas(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[float]:
    """The noise levels of a sampling run, from the arguments of the wrapper around it; the last is where it ends.

    KSampler (Advanced) hands over only its own part of the schedule.
    """
    return (args[3] if len(args) > 3 else kwargs["sigmas"]).tolist()


def latent_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """(time, height, width) of the latent that a sampling run works on, from the wrapper's arguments; () if it has
    other axes. If several latents are packed into one, the video's come first."""
    noise: Any = args[0] if args else kwargs.get("noise")
    shape, *_ = kwargs.get("latent_shapes") or [getattr(noise, "shape", ())]
    return tuple(shape[2:]) if len(shape) == 5 else ()


def pixels_per_latent(model: Any) -> tuple[int, int] | None:
    """How many frames and pixels one latent frame and pixel stand for, in time and along a side, if the format says."""
    latent_format = getattr(model.model, "latent_format", None)
    ratios = (getattr(latent_format, f"{axis}_downscale_ratio", None) for axis in ("temporal", "spacial"))
    time, side = ratios
    return (time, side) if isinstance(time, int) and isinstance(side, int) else None


def replaced_forwards(network: Any) -> list[str]:
    """Parts of a network whose forward was replaced on the object itself, as packs with their own forward do. Single
    layers, which have no parts, do not count, nor does a part that has got its own forward back."""
    return [
        f"{name}.{attribute}".lstrip(".")
        for name, part in network.named_modules()
        if next(part.children(), None) is not None
        for attribute, value in vars(part).items()
        if "forward" in attribute and callable(value) and callable(own := getattr(type(part), attribute, None))
        if getattr(value, "__func__", value) is not own
    ]


def run_options(guider: Any) -> dict[str, Any]:
    """The transformer_options of one sampling run: a copy that lasts for the run; all its model calls inherit it."""
    return guider.model_options["transformer_options"]


def current_sigma(options: Mapping[str, Any]) -> float:
    """The noise level of a forward. Reads from the device: once per forward, never per attention call."""
    return float(options["sigmas"].flatten()[0])


def schedule(options: Mapping[str, Any]) -> list[float] | None:
    """The noise levels of the sampler's run (steps + 1), if it gives them; `run_sigmas` gets the same from outside."""
    sigmas = options.get("sample_sigmas")
    return None if sigmas is None else sigmas.tolist()


def prompts_of(options: Mapping[str, Any], batch: int) -> list[tuple]:
    """What each of the `batch` entries of a forward is computed for, the same in every step: its prompt, its place
    among the videos that are sampled together, the frames of a context window, and which parts of the model are
    replaced: guidance by a weakened model asks for the same prompt again, without some blocks.

    ComfyUI puts several prompts in one forward if there is memory for it, and may split them again in a later step.
    """
    window = tuple(getattr(options.get("context_window"), "index_list", ()))
    replaced = frozenset((kind, part) for kind, parts in options.get("patches_replace", {}).items() for part in parts)
    prompts = tuple(options.get("uuids", ())) or tuple(options.get("cond_or_uncond", ()))
    if not prompts or batch % len(prompts):
        return [(prompts, batch, entry, window, replaced) for entry in range(batch)]
    return [(prompt, entry, window, replaced) for prompt in prompts for entry in range(batch // len(prompts))]


def prompt_count(guider: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many prompts a step of a sampling run has, times its videos, from the arguments of the wrapper around it."""
    noise: Any = args[0] if args else kwargs.get("noise")
    unused = "negative" if getattr(guider, "cfg", None) == 1.0 else None  # as the core does without guidance
    prompts = sum(len(conds) for name, conds in getattr(guider, "conds", {}).items() if name != unused)
    return max(1, prompts) * (noise.shape[0] if hasattr(noise, "shape") else 1)


def free_for_run(device: torch.device) -> int:
    """Bytes that a run may hold on a device besides what its model needs, as ComfyUI counts memory.

    What torch has reserved is not counted: the model has used it in this run and will use it again.
    """
    import comfy.model_management

    total, reserved = comfy.model_management.get_free_memory(device, torch_free_too=True)
    unused = total if device.type == "cpu" else total - reserved
    return max(0, int(unused - comfy.model_management.minimum_inference_memory()))


def free_on_host() -> int:
    """Bytes that may be pinned on the host: half of what is free, and no more than ComfyUI pins."""
    import comfy.model_management as memory

    free = memory.get_free_memory(torch.device("cpu")) // 2
    limit = memory.MAX_PINNED_MEMORY - memory.TOTAL_PINNED_MEMORY
    return int(max(0, min(free, limit)))


def pin(tensor: torch.Tensor) -> None:
    """Pin a tensor of the host, counted by ComfyUI."""
    import comfy.model_management

    comfy.model_management.pin_memory(tensor)


def unpin(tensor: torch.Tensor) -> None:
    """Undo `pin`."""
    import comfy.model_management

    if tensor.is_pinned():
        comfy.model_management.unpin_memory(tensor)


def dense_attention() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """The attention that models call, and what it wraps, which is what an override gets as its `func`.

    From 0.33 on a model may hand over q, k and v in containers with `peek()` and `take()`, so that they can be freed
    as soon as they have been used. An override gets them if it has a `container_function(q, k, v, heads, ...)`, which
    is not told its `func`. The first of the two takes containers, and does not ask the override again.
    """
    import comfy.ldm.modules.attention

    wrapped: Any = comfy.ldm.modules.attention.optimized_attention
    return wrapped, wrapped.__wrapped__


def preferred_attention(network: Any) -> Preferred:
    """What the checkpoint wants the attention of a block computed with, in the order of the block's parts, by the name
    of the list that the block is in, and its number there; empty if it does not say.

    In newer cores (0.38) a checkpoint can name an attention in int8. ComfyUI uses it unless there is an override, which
    is not told; so a node that adds an override has to find it itself.
    """
    found: Preferred = {}
    for name, part in network.named_modules():
        function = getattr(getattr(part, "comfy_attention", None), "function", None)
        words = name.split(".")
        numbered = next((place for place, word in enumerate(words) if word.isdigit()), 0)
        if function is not None and numbered:
            found.setdefault((words[numbered - 1], int(words[numbered])), []).append(function)
    return found


def preferred_in_block(options: Mapping[str, Any]) -> list[Callable[..., torch.Tensor]]:
    """The part of `preferred_attention` for the block that an attention call is in; the block's self-attention comes
    first."""
    found: Preferred = options.get(PREFERRED_KEY, {})
    lists = [(name, functions) for (name, number), functions in found.items() if number == options.get(BLOCK)]
    kind = options.get(KIND, "")
    return next((functions for name, functions in lists if name.startswith(kind)), lists[0][1] if lists else [])


def outside_malloc_graph() -> contextlib.AbstractContextManager[Any]:
    """A context for memory that is held longer than a block of the model runs. Newer cores (0.38) record what a block
    allocates, and expect it back at the block's end."""
    try:
        import comfy.model_prefetch as prefetch
    except ImportError:
        return contextlib.nullcontext()
    pause = getattr(prefetch, "pause_malloc_graph", contextlib.nullcontext)
    return pause()


def block_index(options: Mapping[str, Any], first_blocks: Mapping[str, int] = NO_BLOCKS) -> int | None:
    """The transformer block of an attention call, if the model gives it.

    Args:
        first_blocks: number of the first block of each kind that ComfyUI counts from 0 again, see `layout.ModelCall`.
    """
    index = options.get(BLOCK)
    return None if index is None else index + first_blocks.get(options.get(KIND, ""), 0)


def block_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The part of transformer_options that says which block an attention call is in."""
    return {key: options[key] for key in (BLOCK, KIND) if key in options}


def is_on_several_gpus(model: Any) -> bool:
    """Whether a MODEL is split over several GPUs, see `worker_of`."""
    return bool(model.get_additional_models_with_key("multigpu"))


def worker_of(options: Mapping[str, Any]) -> torch.device | None:
    """The GPU that runs this forward, if ComfyUI computes the prompts of a step on several GPUs at once, one thread
    each; None in every other run."""
    return options.get("multigpu_thread_device")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device's memory is full."""
    import comfy.model_management

    return bool(comfy.model_management.is_oom(error))


def free_cached_memory() -> None:
    """Give unused memory back to the device."""
    import comfy.model_management

    comfy.model_management.soft_empty_cache()
