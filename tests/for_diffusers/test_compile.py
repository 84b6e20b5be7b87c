"""Transformers that are compiled, as a whole and block by block, before and after `apply_psa`."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.for_diffusers import apply_psa
from comfyui_psa.for_diffusers.operator import attention_operator
from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.sampling import self_attention

SETTINGS = {"min_tokens": 0, "warm_up": 1}
MANY = 10  # more than the graphs that a compiler makes of one piece of code before it gives up

pytestmark = pytest.mark.slow(seconds=10)


@pytest.fixture(autouse=True)
def compiler():
    """The compiler's counters, from nothing."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def whole(pipe, **how):
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager", **how)


def in_place(pipe, **how):
    pipe.transformer.compile(backend="aot_eager", **how)


def blocks(pipe, **how):
    for block in pipe.transformer.blocks:
        block.compile(backend="aot_eager", **how)


def repeated(pipe, **how):
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", **how)


def expected(pipes, layers=2, **settings):
    pipe = pipes.pipeline(pipes.wan(layers))
    applied = apply_psa(pipe, 0.6, **SETTINGS | settings)
    return pipes.run(pipe), (applied.sparse_calls, applied.dense_calls)


@pytest.mark.parametrize("compile_it", [whole, in_place, blocks, repeated])
@pytest.mark.parametrize("correction", ["full", "off"])
def test_a_compiled_transformer_is_accepted_and_let_go_again(pipes, compiler, compile_it, correction):
    wanted, counts = expected(pipes, correction=correction)
    stock = pipes.run(pipes.pipeline(pipes.wan()))
    pipe = pipes.pipeline(pipes.wan())
    compile_it(pipe, **{} if compile_it is in_place else {"fullgraph": True})
    without = pipes.run(pipe)
    assert pipes.close(without, stock, 1e-5)
    before = compiler["stats"]["unique_graphs"]
    for _ in range(2):
        applied = apply_psa(pipe, 0.6, **SETTINGS, correction=correction)
        assert pipes.close(pipes.run(pipe), wanted, 1e-5)
        assert (applied.sparse_calls, applied.dense_calls) == counts
        assert not applied.fallbacks
        assert compiler["stats"]["unique_graphs"] <= before + 1, "one graph for all blocks, steps and settings"
        applied.remove()
        assert torch.equal(pipes.run(pipe), without)


@pytest.mark.parametrize("compile_it", [whole, in_place, blocks, repeated])
def test_compiled_after_psa(pipes, compile_it):
    wanted, counts = expected(pipes)
    pipe = pipes.pipeline(pipes.wan())
    applied = apply_psa(pipe, 0.6, **SETTINGS)
    compile_it(pipe)
    assert pipes.close(pipes.run(pipe), wanted, 1e-5)
    assert (applied.sparse_calls, applied.dense_calls) == counts


def test_one_graph_for_any_number_of_blocks(pipes, compiler):
    wanted, counts = expected(pipes, MANY)
    pipe = pipes.pipeline(pipes.wan(MANY))
    applied = apply_psa(pipe, 0.6, **SETTINGS)
    repeated(pipe, fullgraph=True)
    assert pipes.close(pipes.run(pipe), wanted, 1e-5)
    assert (applied.sparse_calls, applied.dense_calls) == counts
    assert compiler["stats"]["unique_graphs"] == 1


def test_a_graph_that_cannot_hold_the_step_says_what_to_do(pipes):
    pipe = pipes.pipeline(pipes.wan())
    in_place(pipe, fullgraph=True)
    apply_psa(pipe, 0.6, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"torch\.compile\(pipe\.transformer, \.\.\.\) before apply_psa"):
        pipes.run(pipe)


def test_cogvideox(tiny, pipes):
    """Its attention returns two outputs, and its text is in the same sequence."""
    latents = pipes.normal(1, 16, 5, 24, 32)
    outputs, sparse = [], []
    for compiles in (False, True):
        model = tiny.transformer("5b")
        applied = apply_psa(model, 0.6, min_tokens=0, warm_up=0)
        if compiles:
            for block in model.transformer_blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        outputs.append(tiny.run_pipeline(model, "5b", "dpm", latents, 3))
        sparse.append(applied.sparse_calls)
    assert pipes.close(outputs[1], outputs[0], 1e-4)
    assert sparse[0] == sparse[1] > 0


@pytest.mark.parametrize("name", ["LTX2Video", "HunyuanVideo15"])
def test_blocks_of_other_families(pipes, work, compiler, name):
    """Sound beside the video; text after it, with padding that a mask hides."""
    models = work.helper("for_diffusers/test_models")
    case = next(case for case in models.CASES if case.name == f"{name}Transformer3DModel")
    inputs, outputs = case.inputs(pipes, pipes.normal(*case.size, seed=1), **case.given), []
    for compiles in (False, True):
        model = models.load(case)
        applied = apply_psa(model, 0.6, mode="topk", **pipes.SETTINGS)
        if compiles:
            repeated(SimpleNamespace(transformer=model), fullgraph=True)
        with torch.no_grad():
            outputs.append(model(**inputs, return_dict=False)[0])
        assert (applied.sparse_calls, applied.dense_calls) == (case.calls, 0)
    assert pipes.close(outputs[1], outputs[0], 1e-4)
    assert compiler["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("correction", ["off", "full"])
def test_inside_autocast(pipes, work, compiler, monkeypatch, correction):
    """The model then hands over queries and keys in another type than values, and torch's attention makes them one."""
    models = work.helper("for_diffusers/test_models")
    case = next(case for case in models.CASES if case.name == "HunyuanVideo15Transformer3DModel")
    inputs, outputs = case.inputs(pipes, pipes.normal(*case.size, seed=1), **case.given), []
    types = set()

    def spy(q, k, v, *args, **kwargs):
        types.update(x.dtype for x in (q, k, v))
        return pyramid_sparse_attention(q, k, v, *args, **kwargs)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", spy)
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 500.0, 100.0]))
    for psa, compiles in ((False, False), (False, True), (True, False), (True, True)):
        model = models.load(case)
        if psa:
            pipe = SimpleNamespace(transformer=model, scheduler=scheduler)
            applied = apply_psa(pipe, **pipes.FULL | {"warm_up": 1, "correction": correction})
        if compiles:
            repeated(SimpleNamespace(transformer=model), fullgraph=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for timestep in scheduler.timesteps:
                output = model(**inputs | {"timestep": timestep[None]}, return_dict=False)[0]
        outputs.append(output)
        assert not psa or (applied.sparse_calls, applied.dense_calls) == (2 * case.calls, case.calls)
    assert types == {torch.bfloat16}
    assert all(output.dtype == outputs[0].dtype and pipes.close(output, outputs[0], 0.01) for output in outputs)


class OwnKernel:
    """An attention processor that does not call scaled_dot_product_attention."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (attn.norm_q(q), attn.norm_k(k), v))
        out = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Breaking(OwnKernel):
    """One that breaks graphs, and does call it."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        torch._dynamo.graph_break()
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (attn.norm_q(q), attn.norm_k(k), v))
        out = F.scaled_dot_product_attention(q, k, v)
        torch._dynamo.graph_break()
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("processor", [OwnKernel, Breaking])
@pytest.mark.parametrize("compile_it", [whole, repeated])
def test_attention_that_a_graph_does_not_hold(pipes, compile_it, processor):
    def prepared():
        model = pipes.wan()
        for block in model.blocks:
            block.attn1.set_processor(processor())
        pipe = pipes.pipeline(model)
        return pipe, apply_psa(pipe, 0.6, **SETTINGS)

    (eager, wanted), (pipe, applied) = prepared(), prepared()
    compile_it(pipe)
    assert pipes.close(pipes.run(pipe), pipes.run(eager), 1e-5)
    assert (applied.sparse_calls, applied.dense_calls) == (wanted.sparse_calls, wanted.dense_calls)
    assert applied.fallbacks == wanted.fallbacks


def test_training_stays_dense_with_the_reason(pipes):
    eager, model = pipes.wan(), pipes.wan()
    wanted, applied = (apply_psa(one, 0.6, **pipes.SETTINGS) for one in (eager, model))
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for one in (eager, model):
        pipes.call(one).square().sum().backward()
    assert applied.fallbacks == wanted.fallbacks
    assert applied.sparse_calls == 0 < applied.dense_calls
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5 * other.grad.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_torchs_rules(dtype):
    q, k, v = torch.randn(3, 2, 3, 64, 32).to(dtype)
    arguments = (q, k, v, torch.tensor(1), torch.zeros(64, 64, dtype=dtype), 0.0, False, 0.25, False)
    torch.library.opcheck(attention_operator(), arguments)
    assert torch.equal(attention_operator()(*arguments), F.scaled_dot_product_attention(q, k, v, scale=0.25))
    assert torch.Tag.cudagraph_unsafe in attention_operator().tags
