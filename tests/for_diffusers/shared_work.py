"""What the tests of several GPUs ask of one process or of several: a sampled tiny model, with PSA and without."""

import importlib.util
import itertools
import logging
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

TESTS = Path(__file__).resolve().parents[1]


def helper(name):
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SelfAttention(TorchFunctionMode):
    """Notes the shapes of all calls with as many queries as keys."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
            if query.shape == key.shape:
                self.shapes.append(tuple(query.shape))
        return func(*args, **kwargs)


def wan(
    *,
    psa=None,
    parallel=None,
    psa_first=True,
    steps=3,
    size=(1, 16, 3, 32, 32),
    heads=4,
    guidance=1.0,
    device="cpu",
    troubled=None,
    experts=1,
    by_token=False,
):
    """A Wan pipeline's latents, and what PSA did.

    Args:
        psa: the arguments of apply_psa; None for dense. parallel: those of ContextParallelConfig; None for one process.
        device: cpu in float32, or cuda in bfloat16, the current one. troubled: the rank that runs out of memory.
        experts: number of transformers. by_token: with a timestep for every token, as Wan 2.2 5B.
    """
    from diffusers import ContextParallelConfig

    from comfyui_psa.for_diffusers import apply_psa

    pipes, dtype = helper("tiny_pipelines"), torch.float32 if device == "cpu" else torch.bfloat16
    models = [pipes.wan(heads=heads, seed=seed).to(device, dtype) for seed in range(experts)]
    pipe = pipes.pipeline(*models)
    pipe.register_to_config(expand_timesteps=by_token)
    applied = apply_psa(pipe, **psa) if psa is not None and psa_first else None
    for model in models if parallel is not None else ():
        model.enable_parallelism(config=ContextParallelConfig(**parallel))
    if psa is not None and not psa_first:
        applied = apply_psa(pipe, **psa)
    guided = {"guidance_scale": guidance, "negative_prompt_embeds": pipes.normal(1, 13, 4096, seed=5).to(device)}
    trouble = short_of_memory() if troubled is not None and troubled == torch.distributed.get_rank() else nullcontext()
    with SelfAttention() as attention, trouble:
        latents = pipes.run(pipe, steps, size, **(guided if guidance > 1 else {}))
    return {"latents": latents.cpu().float(), "self_attention": attention.shapes} | figures(applied)


def cogvideox(
    *,
    kind,
    size,
    psa=None,
    parallel=None,
    psa_first=True,
    steps=3,
    heads=4,
    guidance=1.0,
    fused=False,
    device="cpu",
):
    """The same of a CogVideoX pipeline. parallel: the arguments of enable_ulysses. fused: with fused projections."""
    from comfyui_psa.for_diffusers import apply_psa, enable_ulysses

    tiny = helper("tiny_cogvideox")
    model = tiny.transformer(kind, num_attention_heads=heads)
    model = model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    if fused:
        model.fuse_qkv_projections()
    pipe = SimpleNamespace(transformer=model, scheduler=tiny.scheduler(kind, "dpm"))
    applied = apply_psa(pipe, **psa) if psa is not None and psa_first else None
    if parallel is not None:
        enable_ulysses(pipe, **parallel)
    if psa is not None and not psa_first:
        applied = apply_psa(pipe, **psa)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device, model.dtype)
    text = {name: tiny.text(seed).to(device, model.dtype) for name, seed in (("positive", 5), ("negative", 6))}
    with SelfAttention() as attention:
        latents = tiny.run_pipeline(model, kind, "dpm", noise, steps, guidance=guidance, **text)
    return {"latents": latents.cpu().float(), "self_attention": attention.shapes} | figures(applied)


def wan_from_an_image(*, psa=None, parallel=None):
    """The output of one call of a Wan that is given an image's embedding beside the text, as 2.1 is."""
    from diffusers import ContextParallelConfig

    from comfyui_psa.for_diffusers import apply_psa

    pipes, models = helper("tiny_pipelines"), helper("for_diffusers/test_models")
    sizes = models.WAN | {"in_channels": 36, "image_dim": 48, "added_kv_proj_dim": 256}
    model = models.load(models.Case("WanTransformer3DModel", sizes, None, ()))
    if parallel is not None:
        model.enable_parallelism(config=ContextParallelConfig(**parallel))
    applied = None if psa is None else apply_psa(model, **psa)
    text = {"encoder_hidden_states": models.text(pipes, 32), "timestep": models.TIME}
    given = text | {"encoder_hidden_states_image": pipes.normal(1, 257, 48, seed=5)}
    with torch.no_grad():
        output = model(pipes.normal(1, 36, 3, 28, 32, seed=1), **given, return_dict=False)[0]
    return {"output": output} | figures(applied)


def own_processors(*, fused):
    """What is said of attention processors that share nothing, set after enable_ulysses."""
    from comfyui_psa.for_diffusers import apply_psa, enable_ulysses

    settings = {"sparsity": 0.6, "min_tokens": 0, "warm_up": 0}
    if fused:
        tiny = helper("tiny_cogvideox")
        model = tiny.transformer("5b", num_attention_heads=2)
        enable_ulysses(model)
        model.fuse_qkv_projections()
        given = torch.zeros(1, 6, 16, 24, 32), tiny.text(), torch.tensor([900.0])
    else:
        pipes = helper("tiny_pipelines")
        model = pipes.wan()
        enable_ulysses(model)
        model.blocks[1].attn1.processor = lambda *_: None
        given = pipes.normal(*pipes.SIZE), torch.tensor([900.0]), pipes.normal(1, 13, 4096)
    apply_psa(model, **settings)
    try:
        with torch.no_grad():
            model(*given)
    except ValueError as error:
        return str(error)
    return "nothing"


def yunchang(*, layer, grid, text):
    """This process' part of the attention of a layer of yunchang."""
    import yunchang
    from yunchang.kernels import AttnType

    from comfyui_psa.for_diffusers import LocalAttention

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    attention = LocalAttention(grid, 0.6, text_before=text)
    if layer == "UlyssesAttention":
        shared = yunchang.UlyssesAttention(torch.distributed.group.WORLD, attn_type=AttnType.TORCH_MATH)
        shared.attn_fn = attention
    else:
        yunchang.set_seq_parallel_pg(ranks, 1, rank, ranks)
        shared = yunchang.LongContextAttention(attn_type="psa", attn_processor=attention)
    whole = helper("for_diffusers/test_local").tensors(text, heads=4)
    return {"output": shared(*whole.chunk(ranks, 2)[rank]), "sparse_calls": attention.sparse_calls}


def xdit(*, snippet, grid, text):
    """This process' part of xDiT's attention, self and cross, after the page's snippet has run."""
    import yunchang
    from xfuser.core.distributed.attention_backend import AttentionBackendType
    from xfuser.model_executor.layers import usp

    names = {}
    exec(snippet, names)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    yunchang.set_seq_parallel_pg(ranks, 1, rank, ranks)
    chosen = SimpleNamespace(use_spargeattn_head_balance=False)
    state = SimpleNamespace(attention_backend=AttentionBackendType.SDPA, runtime_config=chosen, fp8_comms=None)
    # What xDiT sets up for GPUs only.
    stand_ins = {
        "PROCESS_GROUP": yunchang.globals.PROCESS_GROUP,
        "get_runtime_state": lambda: state,
        "get_sequence_parallel_world_size": lambda: ranks,
        "get_ulysses_parallel_world_size": lambda: ranks,
        "get_ring_parallel_world_size": lambda: 1,
    }
    whole = helper("for_diffusers/test_local").tensors(text, heads=4)
    with mock.patch.multiple(usp, **stand_ins):
        q, k, v = (x.transpose(1, 2) for x in whole.chunk(ranks, 2)[rank])
        output = usp.USP(q, k, v).transpose(1, 2)
        cross = usp.attention(q, k[:, :, :50], v[:, :, :50]).transpose(1, 2)
    return {"output": output, "cross": cross, "sparse_calls": names["attention"].sparse_calls}


def refused(**given):
    """What the error of such a run says."""
    try:
        wan(**given)
    except ValueError as error:
        return str(error)
    return "nothing"


def ring():
    """A sampled Wan with ring attention, dense and with PSA, and what was logged."""
    from diffusers.models import attention_dispatch

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("ComfyUI-PSA").addHandler(handler)
    settings = {"sparsity": 0.6, "min_tokens": 0, "warm_up": 1}
    with mock.patch.object(attention_dispatch, "_native_attention_forward_op", with_sums_of_exponentials):
        dense, sparse = (wan(psa=psa, parallel={"ring_degree": 2}) for psa in (None, settings))
    same = torch.equal(dense["latents"], sparse["latents"])
    return {"same": same, "said": said, "dense": sparse["dense"], "fallbacks": sparse["fallbacks"]}


def with_sums_of_exponentials(_, query, key, value, *__, **___):
    """What ring attention needs of a kernel, and no kernel of torch gives on a CPU. All are [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)


@contextmanager
def short_of_memory():
    """The first call of PSA has no memory, and the fourth has none left after it has chosen its levels."""
    from comfyui_psa.sampling import self_attention

    genuine, calls = self_attention.pyramid_sparse_attention, itertools.count()

    def attention(*args, **kwargs):
        number = next(calls)
        output = None if number == 0 else genuine(*args, **kwargs)
        if number in (0, 3):
            raise torch.cuda.OutOfMemoryError
        return output

    with mock.patch.object(self_attention, "pyramid_sparse_attention", attention):
        yield


def figures(applied):
    if applied is None:
        return {}
    return {
        "sparse": applied.sparse_calls,
        "dense": applied.dense_calls,
        "fallbacks": dict(applied.fallbacks),
        "sparsity": applied.mean_sparsity(),
    }
