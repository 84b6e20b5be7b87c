"""Calls that need gradients stay dense with their graph and a reason; afterwards PSA acts again."""

import functools

import pytest
import torch
import torch.utils.checkpoint

from comfyui_psa.for_diffusers import apply_psa


def latents(pipes):
    return pipes.normal(*pipes.SIZE, seed=1).requires_grad_()  # reentrant checkpoints look at their inputs only


def gradient(model, pipes):
    """Of the first query projection, after a forward and a backward pass."""
    model.zero_grad()
    pipes.call(model, latents(pipes)).square().mean().backward()
    return model.blocks[0].attn1.to_q.weight.grad


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_the_graph_is_the_dense_one_and_psa_acts_again_afterwards(pipes, caplog, backend):
    model = pipes.wan().train()
    expected = gradient(model, pipes)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS, backend=backend)
    for times in (1, 2):
        assert torch.equal(gradient(model, pipes), expected)
        assert (applied.sparse_calls, applied.dense_calls) == (0, 2 * times)
    assert list(applied.fallbacks.values()) == [4]
    assert caplog.text.count("PSA: staying dense: gradients are asked for") == len(caplog.records) == 1
    if backend != "triton":  # it needs a GPU
        pipes.velocity(model)
        assert applied.sparse_calls == 2


def test_a_lora_learns_with_psa_on(pipes):
    peft = pytest.importorskip("peft")
    model = pipes.wan()
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    pipes.call(model).square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "attn1" in name}
    assert len(trained) == 8
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained.values())
    assert (applied.sparse_calls, applied.dense_calls) == (0, 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_twice(pipes, reentrant):
    model = pipes.wan().train()
    plain = gradient(model, pipes)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    model.enable_gradient_checkpointing(functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant))
    torch.testing.assert_close(gradient(model, pipes), plain)
    assert applied.sparse_calls == 0


def test_gradients_with_respect_to_the_latents(pipes):
    model = pipes.wan()
    model.requires_grad_(False)
    apply_psa(model, 0.6, **pipes.SETTINGS)
    given = latents(pipes)
    pipes.call(model, given).sum().backward()
    assert given.grad.abs().max() > 0


def test_a_frozen_model_needs_none_whatever_autograd_is_set_to(pipes):
    model = pipes.wan()
    model.requires_grad_(False)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    pipes.call(model)
    assert applied.sparse_calls == 2


def test_the_forward_derivative(pipes):
    from torch.autograd import forward_ad

    model = pipes.wan()
    model.requires_grad_(False)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    for block in model.blocks:  # the one backend that has it
        block.attn1.processor._attention_backend = block.attn2.processor._attention_backend = "_native_math"
    with forward_ad.dual_level(), torch.no_grad():
        given = forward_ad.make_dual(pipes.normal(*pipes.SIZE, seed=1), pipes.normal(*pipes.SIZE, seed=3))
        out = pipes.call(model, given)
        assert forward_ad.unpack_dual(out).tangent is not None
    assert (applied.sparse_calls, applied.dense_calls) == (0, 2)
