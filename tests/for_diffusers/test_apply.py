"""PSA in diffusers' own pipelines: parity with dense and with PSA in ComfyUI, warm-up, removal, wrong input."""

import re

import pytest
import torch

from comfyui_psa.for_diffusers import apply_psa, remove_psa


def wan_names(state):
    """diffusers' weights of Wan by ComfyUI's names."""
    pairs = [
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."), (".to_q.", ".q."), (".to_k.", ".k."),
        (".to_v.", ".v."), (".to_out.0.", ".o."), (".norm2.", ".norm3."), (".ffn.net.0.proj.", ".ffn.0."),
        (".ffn.net.2.", ".ffn.2."), ("proj_out.", "head.head."),
    ]  # fmt: skip
    renamed = {}
    for key, value in state.items():
        name = key
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        renamed[name] = value.clone()
    return renamed


def test_wan_in_full_is_dense_and_removal_is_exact(pipes):
    model = pipes.wan()
    stock = pipes.velocity(model)
    applied = apply_psa(model, **pipes.FULL)
    assert pipes.close(pipes.velocity(model), stock, 1e-4)
    assert (applied.sparse_calls, applied.dense_calls) == (2, 0)
    assert remove_psa(model)
    assert not remove_psa(model)
    assert torch.equal(pipes.velocity(model), stock)
    assert not any(block.attn1._forward_pre_hooks or block.attn1._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("settings", [{"mode": "topk"}, {"mode": "budget", "order": "raster", "tail": True}])
def test_wan_is_what_comfyui_computes(pipes, tiny_wan, settings):
    import comfy.sd

    from comfyui_psa.patching.patch import patch_model

    model = pipes.wan()
    apply_psa(model, 0.6, **pipes.SETTINGS, **settings)
    ours = pipes.normal(*pipes.SIZE, seed=1) - pipes.velocity(model)  # one Euler step from sigma 1 to 0
    inputs = settings | ({"tail": "on"} if "tail" in settings else {})
    native = patch_model(
        comfy.sd.load_diffusion_model_state_dict(wan_names(model.state_dict())), sparsity=0.6, preset="auto",
        start_percent=0.0, end_percent=1.0, min_tokens=0, **inputs,
    )  # fmt: skip
    conditioning = [[pipes.normal(1, 13, 4096, seed=2), {}]]
    out = tiny_wan.sample(native, noise=pipes.normal(*pipes.SIZE, seed=1), positive=conditioning, negative=conditioning)
    assert pipes.close(native.model.process_latent_in(out), ours, 1e-4)


@pytest.mark.parametrize("kind", ["5b", "1.5"])
def test_cogvideox_pipeline_is_what_comfyui_computes(pipes, tiny, model_folders, kind):
    import comfy.sample

    from comfyui_psa.cogvideox.sampler import make_sampler
    from comfyui_psa.cogvideox.schedule import trailing_sigmas
    from comfyui_psa.loading.checkpoint import load_checkpoint
    from comfyui_psa.patching.patch import patch_model

    size = (1, 16, 6, 24, 32)
    model = tiny.write_folder(model_folders / "diffusers" / f"apply {kind}", kind)
    latents = pipes.normal(*size, seed=3)
    dense = tiny.run_pipeline(model, kind, "dpm", latents, 4)
    applied = apply_psa(model, 0.6, block_kv=32, **pipes.SETTINGS)
    ours = tiny.run_pipeline(model, kind, "dpm", latents, 4)
    assert (applied.sparse_calls, applied.fallbacks) == (8, {})
    assert applied.mean_sparsity() == pytest.approx(0.6, abs=0.05)
    assert not pipes.close(ours, dense, 1e-4)
    native = patch_model(
        load_checkpoint(f"apply {kind}"), sparsity=0.6, preset="auto", start_percent=0.0, end_percent=1.0, min_tokens=0,
        block_kv="32", correction="off",  # as for a transformer that knows no steps
    )  # fmt: skip
    conds = [[tiny.text(), {}]], [[tiny.text(6), {}]]
    out = comfy.sample.sample_custom(
        native, latents, 1.0, make_sampler("dpm"), trailing_sigmas(native, 4, 1.0), *conds, torch.zeros(size), seed=7,
        disable_pbar=True,
    )  # fmt: skip
    assert pipes.close(native.model.process_latent_in(out), ours, 1e-4)


@pytest.mark.parametrize("correction", ["off", "auto"])
@pytest.mark.parametrize(("warm_up", "dense"), [(0, 0), (1, 1), (3, 3), (9, 4), (0.25, 1), (0.3, 2), (1.0, 4)])
def test_warm_up_in_steps_and_as_a_share(pipes, warm_up, dense, correction):
    pipe = pipes.pipeline(pipes.wan())
    applied = apply_psa(pipe, 0.6, min_tokens=0, warm_up=warm_up, correction=correction)
    pipes.run(pipe)
    if correction == "auto":  # one step has to measure what is lost
        dense = max(1, dense)
    assert (applied.dense_calls, applied.sparse_calls) == (2 * dense, 2 * (4 - dense))
    assert not applied.fallbacks


def test_the_density_falls_over_the_sparse_steps(pipes, monkeypatch):
    from comfyui_psa.sampling import self_attention

    asked = []
    genuine = self_attention.pyramid_sparse_attention

    def recording(q, k, v, config, **more):
        asked.append(1 - config.sparsity)
        return genuine(q, k, v, config, **more)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", recording)
    pipe = pipes.pipeline(pipes.wan())
    apply_psa(pipe, 0.6, min_tokens=0, warm_up=1, falling=0.5, correction="off")
    pipes.run(pipe)
    assert asked == pytest.approx([0.6, 0.6, 0.4, 0.4, 0.2, 0.2])


def test_the_4_step_preset_and_both_experts_of_wan_22(pipes):
    pipe = pipes.pipeline(pipes.wan(), pipes.wan(seed=1))
    stock = pipes.run(pipe)
    applied = apply_psa(pipe, 0.6, "wan-4step-lora", min_tokens=0)
    out = pipes.run(pipe)
    assert (applied.dense_calls, applied.sparse_calls) == (2, 6)
    assert all(state.sparse_calls for state in applied.states), "both experts were sparse"
    assert not pipes.close(out, stock, 1e-6)
    apply_psa(pipe, 0.9, min_tokens=0)  # replaces
    applied.remove()
    assert remove_psa(pipe)
    assert torch.equal(pipes.run(pipe), stock)


def test_what_it_cannot_serve_stays_dense_with_a_reason(pipes, caplog):
    model = pipes.wan()
    stock = pipes.velocity(model)
    for changes, reason in (
        ({"min_tokens": 12288}, "fewer than min_tokens"),
        ({"dense_blocks": (0, 1)}, "listed in dense_blocks"),
        ({"backend": "triton"}, "needs a GPU"),
    ):
        applied = apply_psa(model, 0.6, **pipes.SETTINGS | changes)
        assert torch.equal(pipes.velocity(model), stock)
        assert all(reason in text for text in applied.fallbacks)
        assert reason in caplog.text
    assert apply_psa(model, 0.0, **pipes.SETTINGS).sparse_calls == 0
    assert torch.equal(pipes.velocity(model), stock)


def test_a_kernel_that_fails_is_tried_once(pipes, monkeypatch, caplog):
    from comfyui_psa.sampling import self_attention

    tries = []

    def broken(*_, **__):
        tries.append(1)
        raise RuntimeError("ptxas failed\nmore lines")

    model = pipes.wan()
    stock = pipes.velocity(model)
    with monkeypatch.context() as failing:
        failing.setattr(self_attention, "pyramid_sparse_attention", broken)
        applied = apply_psa(model, 0.6, **pipes.SETTINGS)
        for _ in range(2):
            assert torch.equal(pipes.velocity(model), stock)
    assert len(tries) == 1
    assert caplog.text.count("staying dense") == 1
    assert list(applied.fallbacks.values()) == [4]
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    pipes.velocity(model)
    assert applied.sparse_calls == 2


def test_orders_that_follow_the_data(pipes):
    model = pipes.wan()
    applied = apply_psa(model, 0.6, **pipes.SETTINGS, order="hybrid", clusters=(8, 16))
    assert torch.isfinite(pipes.velocity(model)).all()
    assert (applied.sparse_calls, applied.fallbacks) == (2, {})
    assert applied.mean_sparsity() == pytest.approx(0.6, abs=0.05)


def test_an_error_inside_the_transformer_leaves_no_interception_behind(pipes):
    model = pipes.wan()
    apply_psa(model, 0.6, **pipes.SETTINGS)
    hook = model.blocks[0].attn1.to_out[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipes.velocity(model)
    hook.remove()
    assert torch.overrides._len_torch_function_stack() == 0
    pipes.velocity(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: 1.0 was given; allowed: 0 to 0.97"),
        ({"preset": "none such"}, "preset: 'none such' was given; allowed: auto, "),
        ({"warm_up": -1}, "warm_up: -1 was given"),
        ({"falling": 0.9}, "falling: 0.9 was given; allowed: 0 to 0.8"),
        ({"warm_up": 0.5}, "a bare transformer knows no steps"),
        ({"backend": "cuda"}, "backend: 'cuda' was given"),
        ({"block_q": 100}, "block_q: 100 was given"),
        ({"no_such_field": 1}, "no_such_field: 1 was given; allowed: only the settings shares"),
        ({"block_kw": 64}, "rename it to block_kv if that is meant"),
        ({"sparsity": float("nan")}, "sparsity: nan was given; allowed: 0 to 0.97"),
        ({"sparsity": "0.8"}, "sparsity: '0.8' was given; allowed: 0 to 0.97"),
        ({"preset": ["auto"]}, "preset: ['auto'] was given"),
        ({"warm_up": float("nan")}, "warm_up: nan was given"),
        ({"warm_up": "0.3"}, "warm_up: '0.3' was given"),
        ({"dense_blocks": 1}, "dense_blocks: 1 was given; allowed: whole numbers from 0 to 1"),
        ({"dense_blocks": "0, 1"}, "dense_blocks: '0, 1' was given"),
        ({"dense_blocks": (0, 2)}, "dense_blocks: (0, 2) was given; allowed: whole numbers from 0 to 1"),
        ({"dense_blocks": (-1,)}, "dense_blocks: (-1,) was given"),
        ({"dense_blocks": iter((0, 1))}, "pass a tuple of such numbers as dense_blocks"),
        ({"min_tokens": float("nan")}, "min_tokens: nan was given; allowed: a whole number, 0 or more"),
        ({"min_tokens": None}, "min_tokens: None was given"),
        ({"min_tokens": True}, "min_tokens: True was given; allowed: a whole number, 0 or more"),
        ({"dense_blocks": (True, False)}, "dense_blocks: (True, False) was given"),
        ({"warm_up": True}, "warm_up: True was given; allowed: a share from 0.0 to 1.0 or a number of steps"),
        ({"reuse_steps": 1.5}, "reuse_steps: 1.5 was given; allowed: a whole number, 1 to 100"),
        ({"falling": "0.3"}, "falling: '0.3' was given"),
        ({"shares": None}, "shares: None was given"),
        ({"shares": {1: "0.1"}}, "shares: {1: '0.1'} was given"),
        ({"tile": 5}, "tile: 5 was given"),
        ({"tail": "yes"}, "tail: 'yes' was given; allowed: True or False"),
        ({"seed": 2**70}, "allowed: a whole number of at most 64 bits"),
    ],
)
def test_wrong_input_says_what_is_allowed_and_what_to_do_and_changes_nothing(pipes, arguments, message):
    model = pipes.wan()
    with pytest.raises(ValueError, match=r"^apply_psa, ") as caught:
        apply_psa(model, **{"warm_up": 0} | arguments)
    assert message in str(caught.value)
    assert re.search(r"; (pass|set|rename|leave|change|take) [^;]+$", str(caught.value)), "it ends with what to do"
    assert not remove_psa(model)


def test_numbers_of_numpy_mean_what_they_say(pipes):
    numpy = pytest.importorskip("numpy")
    pipe = pipes.pipeline(pipes.wan())
    for warm_up in (numpy.int64(2), numpy.float32(0.5)):
        applied = apply_psa(pipe, numpy.float64(0.6), min_tokens=numpy.int32(0), warm_up=warm_up, correction="off")
        pipes.run(pipe)
        assert (applied.dense_calls, applied.sparse_calls) == (4, 4)


def test_other_models_are_named():
    with pytest.raises(TypeError, match="pipe: 'Linear' was given; allowed: a pipeline with WanTransformer3DModel"):
        apply_psa(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("sparsity", "told"), [(0.6, 1), (0.0, 0)])
def test_a_backend_that_psa_cannot_see_is_named_at_once(pipes, caplog, sparsity, told):
    from diffusers.models.attention_dispatch import AttentionBackendName

    model = pipes.wan()
    for block in model.blocks:
        block.attn1.processor._attention_backend = AttentionBackendName.FLEX
    with caplog.at_level("WARNING"):
        apply_psa(model, sparsity, **pipes.SETTINGS)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == told
    assert all("attention backend: flex" in line and "set_attention_backend('native')" in line for line in lines)


def test_a_backend_for_all_models_is_named_too(pipes, caplog):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    active, _ = _AttentionBackendRegistry.get_active_backend()
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.FLEX)
    try:
        with caplog.at_level("WARNING"):
            apply_psa(pipes.wan(), 0.6, **pipes.SETTINGS)
    finally:
        _AttentionBackendRegistry.set_active_backend(active)
    assert "attention backend: flex" in caplog.text


def test_backends_that_psa_sees_are_not_mentioned(pipes, caplog):
    with caplog.at_level("WARNING"):
        apply_psa(pipes.wan(), 0.6, **pipes.SETTINGS)
    assert caplog.text == ""
