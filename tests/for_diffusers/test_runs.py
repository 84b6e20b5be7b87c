"""Runs of patched pipelines as users make them: schedulers replaced, transformers shared, other sizes, threads."""

import copy
import gc
import threading
import weakref

import pytest
import torch

from comfyui_psa.for_diffusers import apply_psa, remove_psa

PSA = {"sparsity": 0.6, "min_tokens": 0}
WIDE = (1, 16, 3, 16, 64)  # as many tokens as pipes.SIZE in another grid
LONG = (1, 16, 5, 32, 32)


def unipc(shift=3.0):
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def heun():
    from diffusers import FlowMatchHeunDiscreteScheduler

    return FlowMatchHeunDiscreteScheduler(shift=5.0)


@pytest.mark.parametrize("warm_up", [2, 0.25])
@pytest.mark.parametrize("scheduler", [unipc, heun])
def test_a_scheduler_put_in_afterwards(pipes, scheduler, warm_up):
    pipe = pipes.pipeline(pipes.wan(layers=1))
    applied = apply_psa(pipe, **PSA, warm_up=warm_up)
    for times in (1, 2):
        pipe.scheduler = scheduler()
        calls = []
        pipe.transformer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        pipes.run(pipe, 8)
        steps = len(calls)
        dense = 3 if scheduler is heun else 2  # Heun's method evaluates every step but the first twice
        assert (applied.dense_calls, applied.sparse_calls) == (times * dense, times * (steps - dense))
    assert not applied.fallbacks


@pytest.mark.parametrize("patch", ["the first", "the second", "both", "the transformer's own pipeline"])
def test_two_pipelines_that_share_a_transformer(pipes, patch):
    model = pipes.wan(layers=1)
    one, two = pipes.pipeline(model), pipes.pipeline(model)
    two.scheduler = unipc(8.0)
    given = {"the first": [one], "the second": [two], "both": [one, two]}.get(patch, [pipes.pipeline(model)])
    for pipe in given:
        applied = apply_psa(pipe, **PSA, warm_up=2)
    del given, pipe
    for pipe in (one, two):
        pipes.run(pipe, 8)
    assert (applied.dense_calls, applied.sparse_calls) == (4, 12)
    assert not applied.fallbacks


def test_a_loop_of_the_user_s_own_has_the_pipeline_s_scheduler_of_the_moment(pipes):
    pipe = pipes.pipeline(pipes.wan(layers=1))
    applied = apply_psa(pipe, **PSA, warm_up=2)
    pipe.scheduler = unipc()
    pipe.scheduler.set_timesteps(8)
    for timestep in pipe.scheduler.timesteps:
        pipes.velocity(pipe.transformer, timestep=float(timestep.bfloat16()))  # as a model's own type rounds it
    assert (applied.dense_calls, applied.sparse_calls) == (2, 6)


def test_a_step_that_nobody_can_tell_is_dense_with_a_reason(pipes, caplog):
    model = pipes.wan(layers=1)
    applied = apply_psa(pipes.pipeline(model), **PSA, warm_up=2)
    gc.collect()
    pipes.velocity(model)
    assert (applied.dense_calls, applied.sparse_calls) == (1, 0)
    assert "no scheduler is known" in caplog.text


def test_psa_keeps_no_pipeline_alive(pipes):
    pipe = pipes.pipeline(pipes.wan(layers=1))
    applied = apply_psa(pipe, **PSA, warm_up=2)
    pipes.run(pipe, 2)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    assert applied.dense_calls == 2


def test_a_caller_s_variables_are_kept_no_longer_than_without_psa(pipes):
    """Reading a frame keeps what it holds, so a script's own frames are left alone."""
    model = pipes.wan(layers=1)
    pipe = pipes.pipeline(model)
    apply_psa(pipe, **PSA, warm_up=1)
    encoder = torch.nn.Linear(2, 2)
    gone = weakref.ref(encoder)
    pipes.run(pipe, 2)
    pipes.velocity(model, timestep=500.0)
    del encoder
    gc.collect()
    assert gone() is None


def test_size_a_then_b_then_a(pipes):
    pipe = pipes.pipeline(pipes.wan())
    apply_psa(pipe, **PSA, warm_up=0)
    first = pipes.run(pipe, 2)
    orders = [weakref.ref(part) for part in tensors_of(pipe.transformer) if part.numel() == 768]
    assert orders, "the order of the first size is kept for the next run"
    for size in (WIDE, LONG):
        pipes.run(pipe, 2, size=size)
        gc.collect()
        assert not any(order() is not None for order in orders)
    assert torch.equal(pipes.run(pipe, 2), first)


def tensors_of(model):
    """Everything that the model's hooks and wrappers hold, to any depth, besides its weights."""
    weights, found, seen = {id(p) for p in model.parameters()}, [], set()
    roots = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    roots = [getattr(root, "__wrapped__", root) for root in roots]
    roots = [getattr(root, "__self__", root) for root in roots] + [block.attn1.__dict__ for block in model.blocks]
    while roots:
        one = roots.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found += [] if id(one) in weights else [one]
        elif isinstance(one, dict | list | tuple | set):
            roots += list(one.values()) if isinstance(one, dict) else list(one)
        elif type(one).__module__.startswith("comfyui_psa") and hasattr(one, "__dict__"):
            roots += list(vars(one).values())
    return found


@pytest.mark.parametrize("size", [WIDE, LONG])
def test_a_size_that_fails_leaves_the_others_sparse(pipes, monkeypatch, size):
    from comfyui_psa.sampling import self_attention

    genuine = self_attention.pyramid_sparse_attention

    def failing(q, *args, **more):
        if more["layout"].grid == (3, 16, 16):
            raise RuntimeError("not at this size")
        return genuine(q, *args, **more)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", failing)
    pipe = pipes.pipeline(pipes.wan())
    applied = apply_psa(pipe, **PSA, warm_up=0)
    pipes.run(pipe, 1)
    pipes.run(pipe, 1, size=size)
    assert (applied.dense_calls, applied.sparse_calls) == (2, 2)
    assert list(applied.fallbacks) == ["PSA failed: not at this size (until apply_psa is called again)"]


def test_two_threads_one_transformer(pipes):
    """Of equal length and another grid: mixed up, nothing would notice."""
    model = pipes.wan()
    given = [pipes.normal(*size, seed=5) for size in (pipes.SIZE, WIDE)]
    applied = apply_psa(model, **PSA, warm_up=0)
    with torch.no_grad():
        alone = [pipes.call(model, latents) for latents in given]
    ready, wrong = threading.Barrier(2), []

    def work(latents, expected):
        for _ in range(4):
            ready.wait()
            with torch.no_grad():
                if not torch.equal(pipes.call(model, latents), expected):
                    wrong.append(latents.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(given, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (applied.sparse_calls, applied.dense_calls) == (2 * 2 + 2 * 2 * 4, 0)
    assert torch.overrides._len_torch_function_stack() == 0


@pytest.mark.parametrize(
    ("given", "calls"),
    [({"guidance_scale": 5.0}, 2), ({"num_videos_per_prompt": 2, "latents": None}, 1)],
)
def test_guidance_and_several_videos(pipes, given, calls):
    pipe = pipes.pipeline(pipes.wan(layers=1))
    applied = apply_psa(pipe, **PSA, warm_up=1)
    negative = {"negative_prompt_embeds": pipes.normal(1, 13, 4096, seed=4)}
    pipes.run(pipe, 3, generator=torch.Generator().manual_seed(0), **given, **negative)
    assert (applied.dense_calls, applied.sparse_calls) == (calls, 2 * calls)
    assert not applied.fallbacks


def test_a_run_stopped_by_its_callback_and_the_next_one(pipes):
    pipe = pipes.pipeline(pipes.wan(layers=1))
    applied = apply_psa(pipe, **PSA, warm_up=2)
    expected = pipes.run(pipe, 6)

    def stop(pipe, step, *_):
        pipe._interrupt = step == 3
        return {}

    pipes.run(pipe, 6, callback_on_step_end=stop)
    assert (applied.dense_calls, applied.sparse_calls) == (2 + 2, 4 + 2)
    assert torch.equal(pipes.run(pipe, 6), expected)


def test_a_copied_pipeline_is_a_patched_one_of_its_own(pipes):
    pipe = pipes.pipeline(pipes.wan())
    stock = pipes.run(pipe, 2)
    applied = apply_psa(pipe, **PSA, warm_up=1)
    expected = pipes.run(pipe, 2)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.zero_()
    before = applied.sparse_calls
    assert torch.equal(pipes.run(twin, 2), expected)
    assert applied.sparse_calls == before
    assert remove_psa(twin)
    assert torch.equal(pipes.run(twin, 2), stock)
    pipes.run(pipe, 2)
    assert applied.sparse_calls == before + 2
    assert remove_psa(pipe)


def test_a_saved_pipeline_is_the_stock_one(pipes, tmp_path):
    from diffusers import WanTransformer3DModel

    model = pipes.wan()
    stock = pipes.velocity(model)
    apply_psa(model, **PSA, warm_up=0)
    pipes.velocity(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(pipes.velocity(WanTransformer3DModel.from_pretrained(tmp_path)), stock)


def test_a_patched_transformer_can_be_pickled(pipes, tmp_path):
    """As Ray and spawned processes send it."""
    model = pipes.wan()
    apply_psa(model, **PSA, warm_up=0)
    expected = pipes.velocity(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(pipes.velocity(again), expected)


@pytest.mark.parametrize("correction", ["off", "auto"])
@pytest.mark.parametrize(("warm_up", "dense"), [(2, 2), (0.25, 1), (0.5, 2)])
def test_the_first_steps_are_those_that_a_pipeline_takes(pipes, warm_up, dense, correction):
    """Video to video leaves out the first steps of the schedule: of 8 steps, a strength of .5 takes the last 4."""
    from diffusers import WanVideoToVideoPipeline

    model = pipes.wan(layers=1)
    pipe = WanVideoToVideoPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=unipc())
    pipe.set_progress_bar_config(disable=True)
    applied = apply_psa(pipe, **PSA, warm_up=warm_up, correction=correction)
    pipe(
        prompt_embeds=pipes.normal(1, 13, 4096, seed=2), num_inference_steps=8, strength=0.5, guidance_scale=1.0,
        latents=pipes.normal(*pipes.SIZE, seed=1), height=256, width=256, output_type="latent",
    )  # fmt: skip
    assert (applied.dense_calls, applied.sparse_calls) == (dense, 4 - dense)
    assert [step["dense_calls"] for step in applied.reports()[0]["steps"]] == [1] * dense + [0] * (4 - dense)


def derived(model):
    """As fully_shard of torch makes a model's class one of its own."""
    model.__class__ = type("FSDPWanTransformer3DModel", (type(model),), {})
    return model


def with_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def compiled(model):
    return torch.compile(with_peft(model), backend="eager")


class Shared(torch.nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [derived, with_peft, compiled, Shared])
def test_a_transformer_inside_of_other_modules(pipes, wrap):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outer = wrap(pipes.wan())
    stock = pipes.velocity(outer)
    applied = apply_psa(outer, **pipes.FULL)
    assert pipes.close(pipes.velocity(outer), stock, 1e-5)
    assert (applied.dense_calls, applied.sparse_calls) == (0, 2)
    assert not applied.fallbacks
    assert remove_psa(outer)
    assert torch.equal(pipes.velocity(outer), stock)


def test_a_pipeline_whose_transformer_peft_has_wrapped(pipes):
    pipe = pipes.pipeline(pipes.wan())
    pipe.transformer = with_peft(pipe.transformer)
    applied = apply_psa(pipe, **PSA, warm_up=1)
    pipes.run(pipe, 3)
    assert (applied.dense_calls, applied.sparse_calls) == (2, 4)


def test_a_transformer_taken_out_of_other_modules_is_named(pipes, caplog):
    pytest.importorskip("peft")
    pipe = pipes.pipeline(pipes.wan())
    pipe.transformer = with_peft(pipe.transformer)
    applied = apply_psa(pipe, **PSA, warm_up=1)
    pipe.transformer = pipe.transformer.merge_and_unload()
    pipes.run(pipe, 2)
    assert applied.sparse_calls == 0
    said = [record.getMessage() for record in caplog.records if record.name == "ComfyUI-PSA"]
    assert [("call apply_psa again" in line, "around it" in line) for line in said] == [(True, True)]
