"""Self-attention that PSA cannot see is noticed in the first step and logged once; docs/diffusers.md names what PSA
sees."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from comfyui_psa.for_diffusers import apply_psa

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diffusers.md"


def warnings(caplog):
    return [record for record in caplog.records if record.name == "ComfyUI-PSA"]


class OwnKernel:
    """An attention processor with its own kernel, as users write them."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (attn.norm_q(q), attn.norm_k(k), v))
        out = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def flex(model):
    model.set_attention_backend("flex")


def own_kernel(model):
    for block in model.blocks:
        block.attn1.set_processor(OwnKernel())


def forward_replaced_later(model):
    for block in model.blocks:
        block.attn1.forward = type(block.attn1).forward.__get__(block.attn1)


@pytest.mark.parametrize(
    ("change", "reason", "advice"),
    [
        (flex, "attention backend: flex", "set_attention_backend('native')"),
        (own_kernel, "does not go through torch's scaled_dot_product_attention", "your own attention processor"),
        (forward_replaced_later, "no self-attention of the model reached PSA", "call apply_psa again"),
    ],
)
def test_unseen_attention_is_said_once_in_the_first_forward(pipes, caplog, change, reason, advice):
    model, changed = pipes.wan(), pipes.wan()
    change(changed)
    stock = pipes.velocity(changed)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    change(model)
    for times in (1, 2):
        assert torch.equal(pipes.velocity(model), stock)
        assert (applied.sparse_calls, applied.dense_calls) == (0, 2 * times)
        assert list(applied.fallbacks.values()) == [2 * times]
        assert [record.levelname for record in warnings(caplog)] == ["WARNING"]
    assert reason in next(iter(applied.fallbacks))
    assert warnings(caplog)[0].getMessage() == f"PSA: staying dense: {next(iter(applied.fallbacks))}"
    assert advice in caplog.text


@pytest.mark.parametrize(("unseen", "said"), [([1], "block 1"), ([0, 2, 3], "blocks 0, 2-3")])
def test_unseen_blocks_among_others_are_counted_alone_and_named(pipes, caplog, unseen, said):
    model = pipes.wan(layers=4)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    pipes.velocity(model)
    assert applied.reports()[0]["notes"] == []
    for block in unseen:
        model.blocks[block].attn1.set_processor(OwnKernel())
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    pipes.velocity(model)
    assert (applied.sparse_calls, applied.dense_calls) == (4 - len(unseen), len(unseen))
    assert len(warnings(caplog)) == 1
    (note,) = applied.reports()[0]["notes"]
    assert note.startswith(f"PSA did not see the attention of {said}; fallbacks say why")


def test_a_call_without_attention_is_not_one_that_psa_cannot_see(pipes, work, caplog):
    """Guidance by a weakened model, which LTX-2 has by default: in some blocks the values are the output."""
    models = work.helper("for_diffusers/test_models")
    case = next(case for case in models.CASES if case.name == "LTX2VideoTransformer3DModel")
    model = models.load(dataclasses.replace(case, sizes=case.sizes | {"perturbed_attn": True}))
    inputs = case.inputs(pipes, pipes.normal(*case.size, seed=1), **case.given)

    def outputs():
        with torch.no_grad():
            weakened = {"spatio_temporal_guidance_blocks": [1]}
            return [model(**inputs | more, return_dict=False)[0] for more in ({}, weakened, {}, weakened)]

    stock = outputs()
    applied = apply_psa(model, **pipes.FULL)
    assert all(pipes.close(one, other, 1e-5) for one, other in zip(outputs(), stock, strict=True))
    assert (applied.sparse_calls, applied.dense_calls, applied.fallbacks) == (6, 0, {})
    assert not warnings(caplog)
    model.transformer_blocks[1].attn1.set_processor(OtherProcessor(model.transformer_blocks[1].attn1.processor))
    outputs()
    assert sum(applied.fallbacks.values()) == 4, "another processor may attend where PSA does not see it"


class OtherProcessor:
    """One that attends without scaled_dot_product_attention, by leaving all attention out."""

    def __init__(self, genuine):
        self.genuine = genuine

    def __call__(self, *args, **kwargs):
        return self.genuine(*args, **kwargs | {"perturbation_mask": None, "all_perturbed": True})


def test_a_block_that_a_hook_skips_is_named_without_fallbacks(pipes, caplog):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    model = pipes.wan()
    apply_layer_skip(model, LayerSkipConfig(indices=[1]))
    stock = pipes.velocity(model)
    applied = apply_psa(model, **pipes.FULL)
    assert pipes.close(pipes.velocity(model), stock, 1e-5)
    assert (applied.sparse_calls, applied.dense_calls, applied.fallbacks) == (1, 0, {})
    (note,) = applied.reports()[0]["notes"]
    assert note.startswith("PSA did not see the attention of block 1: a cache, a hook or")


@pytest.mark.parametrize("ends", ["in torch's function", "in a kernel of its own"])
def test_a_script_that_replaces_torchs_function(pipes, caplog, monkeypatch, ends):
    """For example by SageAttention, as its own page shows it; or by one that only looks at the calls."""
    genuine = torch.nn.functional.scaled_dot_product_attention
    asked = []

    def replacement(query, key, value, **given):
        asked.append(query.shape)
        if ends == "in torch's function":
            return genuine(query, key, value, **given)
        return (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1) @ value

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", replacement)
    model = pipes.wan()
    stock, calls = pipes.velocity(model), len(asked)
    applied = apply_psa(model, **pipes.FULL)
    asked.clear()
    assert pipes.close(pipes.velocity(model), stock, 1e-5)
    assert len(asked) == calls
    if ends == "in torch's function":
        assert (applied.sparse_calls, applied.dense_calls, applied.fallbacks) == (2, 0, {})
    else:
        assert (applied.sparse_calls, applied.dense_calls) == (0, 2)
        assert "what replaces torch's function" in next(iter(applied.fallbacks))


def test_it_is_said_in_the_warm_up_already(pipes, caplog):
    pipe = pipes.pipeline(pipes.wan())
    flex(pipe.transformer)
    applied = apply_psa(pipe, 0.6, min_tokens=0, warm_up=2)
    said = []
    pipes.run(pipe, callback_on_step_end=lambda *_: said.append(len(warnings(caplog))) or {})
    assert said == [1, 1, 1, 1]
    assert (applied.dense_calls, sum(applied.fallbacks.values())) == (8, 4)


def test_a_backend_chosen_for_a_while(pipes, caplog):
    from diffusers.models.attention_dispatch import attention_backend

    model = pipes.wan()
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    with attention_backend("flex"):
        pipes.velocity(model)
    pipes.velocity(model)
    assert (applied.sparse_calls, applied.dense_calls) == (2, 2)
    assert len(warnings(caplog)) == 1


def test_nothing_is_said_of_a_pipeline_that_psa_is_off_in(pipes, caplog):
    model = pipes.wan()
    flex(model)
    apply_psa(model, 0.0, **pipes.SETTINGS)
    pipes.velocity(model)
    assert not warnings(caplog)


def promised_backends():
    """The backends that the page promises."""
    sentence = re.search(r"PSA sees these attention backends: ([^.]+)\.", PAGE.read_text(encoding="utf-8"))
    return re.findall(r"`(\w+)`", sentence[1])


def self_attention_by(backend, model):
    """Only the self-attention: on a CPU some of the backends have no kernel for the cross-attention."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    _check_attention_backend_requirements(AttentionBackendName(backend))
    for block in model.blocks:
        block.attn1.processor._attention_backend = AttentionBackendName(backend)


@pytest.mark.parametrize("backend", promised_backends())
def test_the_backends_of_the_page_work(pipes, caplog, backend):
    model, expected = pipes.wan(), pipes.wan()
    apply_psa(expected, 0.6, **pipes.SETTINGS)
    self_attention_by(backend, model)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    assert pipes.close(pipes.velocity(model), pipes.velocity(expected), 1e-6)
    assert (applied.sparse_calls, applied.dense_calls) == (2, 0)
    assert not warnings(caplog)


def test_the_page_leaves_no_working_backend_out(pipes):
    from diffusers.models.attention_dispatch import AttentionBackendName

    works = []
    for backend in AttentionBackendName:
        model = pipes.wan(layers=1)
        applied = apply_psa(model, 0.6, **pipes.SETTINGS)
        try:
            self_attention_by(backend, model)
            pipes.velocity(model)
        except (RuntimeError, ValueError, TypeError, NameError, ImportError):
            continue  # needs a package or a device that is not here
        if applied.sparse_calls:
            works.append(backend.value)
    assert sorted(works) == sorted(promised_backends())
