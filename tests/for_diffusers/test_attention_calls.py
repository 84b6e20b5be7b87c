"""Attention processors of users' own, whose calls of torch's attention are not those of diffusers' processors."""

import pytest
import torch
import torch.nn.functional as F

from comfyui_psa.for_diffusers import LocalAttention, apply_psa


class Own:
    """attend(q, k, v), all [B, H, L, D], gives the output."""

    def __init__(self, attend):
        self.attend = attend

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (attn.norm_q(q), attn.norm_k(k), v))
        return attn.to_out[0](self.attend(q, k, v).transpose(1, 2).flatten(2))


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)


def grouped_by_name(q, k, v):
    return F.scaled_dot_product_attention(query=q, key=k[:, :1], value=v[:, :1], enable_gqa=True)


def head_by_head(q, k, v):
    parts = zip(*(x.split(1, 1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 1)


def without_batch(q, k, v):
    return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, q.shape[:2])


def one_matrix(q, k, v):
    heads = zip(*(x[0] for x in (q, k, v)), strict=True)
    return torch.stack([F.scaled_dot_product_attention(*head) for head in heads])[None]


def split_values(q, k, v):
    return torch.cat([F.scaled_dot_product_attention(q, k, half) for half in v.chunk(2, -1)], -1)


def query_parts(q, k, v):
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.chunk(3, 2)], 2)


def model_with(pipes, attend):
    model = pipes.wan(layers=1, heads=4)
    model.blocks[0].attn1.set_processor(Own(attend))
    return model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("attend", "calls"), [(grouped, 1), (grouped_by_name, 1), (head_by_head, 4)])
def test_what_psa_can_compute_is_sparse(pipes, attend, calls, compiled):
    model = model_with(pipes, attend)
    stock = pipes.velocity(model)
    applied = apply_psa(model, **pipes.FULL)
    if compiled:
        model.compile(backend="eager")
    assert pipes.close(pipes.velocity(model), stock, 1e-5)
    assert (applied.sparse_calls, applied.dense_calls) == (calls, 0)
    torch._dynamo.reset()


@pytest.mark.parametrize("correction", ["off", "full"])
def test_grouped_heads_are_corrected_as_others_are(pipes, correction):
    """Against the same call with its keys and values written out for every head."""
    found = []
    for attend in (grouped, lambda q, k, v: F.scaled_dot_product_attention(q, *twice(k, v))):
        pipe = pipes.pipeline(model_with(pipes, attend))
        applied = apply_psa(pipe, 0.6, min_tokens=0, warm_up=1, correction=correction)
        found.append(pipes.run(pipe))
        assert (applied.sparse_calls, applied.dense_calls) == (3, 1)
    assert pipes.close(*found, 1e-5)


def twice(*tensors):
    return [x[:, [0, 0, 1, 1]] for x in tensors]


@pytest.mark.parametrize(
    ("attend", "calls", "reason"),
    [
        (without_batch, 1, "on tensors of 3 dimensions"),
        (one_matrix, 4, "on tensors of 2 dimensions"),
        (split_values, 2, "keys or values of other heads than its queries"),
        (query_parts, 3, "256 and 768 tokens, but 768 are expected"),
    ],
)
def test_what_it_cannot_stays_dense_for_a_true_reason(pipes, attend, calls, reason):
    model = model_with(pipes, attend)
    stock = pipes.velocity(model)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    assert torch.equal(pipes.velocity(model), stock)
    ((said, count),) = applied.fallbacks.items()
    assert reason in said
    assert count == calls == applied.dense_calls


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("keys", [768, 50])
def test_an_engine_whose_heads_share_keys(sparse, keys):
    attention = LocalAttention((3, 16, 16), 0.01, mode="topk", shares={1: 1.0})
    attention.sparse = sparse
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, *size, 64, generator=draw) for size in ((768, 4), (keys, 2), (keys, 2)))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, *(x.repeat_interleave(2, 2) for x in (k, v))))
    )
    output, _ = attention(q, k, v)
    assert (output - expected.transpose(1, 2)).norm() / expected.norm() < 1e-5
    assert attention.sparse_calls == (sparse and keys == 768)
