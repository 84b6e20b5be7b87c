"""What the core's nodes and other packs do to a model: LoRAs, caches, windows, compilers, a second GPU."""

import torch


def lora(scale=0.05):
    """Weights of a LoRA on the self-attention of both blocks."""
    generator = torch.Generator().manual_seed(9)
    weights = {}
    for block in (0, 1):
        for name in "qkvo":
            prefix = f"diffusion_model.blocks.{block}.self_attn.{name}."
            weights[prefix + "lora_A.weight"] = torch.randn(4, 256, generator=generator) * scale
            weights[prefix + "lora_B.weight"] = torch.randn(256, 4, generator=generator) * scale
    return weights


def with_lora(model, strength=1.0):
    """The model with that LoRA, as ComfyUI's own loader adds it."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora(), strength, 0.0)[0]


def compiled(model, keys=None, backend="eager", guards_on_options=False, **how):
    """As TorchCompileModel and nodes of other packs do it, by default with the core's filter of guards, and without the
    minutes that generating code takes."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    clone, options = model.clone(), {} if guards_on_options else {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=clone, backend=backend, options=options, keys=keys, **how)
    return clone


def cached(model, node="EasyCacheNode", threshold=1000.0, start=0.15, end=1.0):
    """With EasyCache or LazyCache, which skip every step that they may at this threshold."""
    import comfy_extras.nodes_easycache as nodes

    return getattr(nodes, node).execute(model, threshold, start, end, False).result[0]


def windowed(model, length, overlap, schedule="standard_static"):
    """In context windows of `length` frames of the video; the next window shares `overlap` of them."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    return WanContextWindowsManualNode.execute(
        model, context_length=length, context_overlap=overlap, context_schedule=schedule, context_stride=1,
        closed_loop=False, fuse_method="pyramid", freenoise=False,
    ).result[0]  # fmt: skip


def on_two_devices(model, tiny_wan):
    """As in MultiGPU CFG Split, with a copy of the weights; the CPU under another name plays the second GPU."""
    both = model.clone()
    both.cached_patcher_init = (tiny_wan.load, ("t2v",))
    second = both.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    second.is_multigpu_base_clone = True
    both.set_additional_models("multigpu", [second])
    both.match_multigpu_clones()
    return both
