"""apply_psa with the Triton kernels on a CUDA device."""

from types import SimpleNamespace

import pytest
import torch

from comfyui_psa.for_diffusers import apply_psa

pytestmark = pytest.mark.gpu
BACKENDS = ["native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"]
PSA = {"sparsity": 0.6, "min_tokens": 0}


@pytest.fixture
def model(pipes):
    return pipes.wan().to("cuda", torch.bfloat16)


def velocity(pipes, model, device="cuda", latents=None):
    latents = pipes.normal(*pipes.SIZE, seed=1) if latents is None else latents
    given = latents.to(device, torch.bfloat16), torch.tensor([999.0], device=device)
    return model(*given, pipes.normal(1, 13, 4096, seed=2).to(device, torch.bfloat16), return_dict=False)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backends_of_the_readme(pipes, model, backend):
    model.set_attention_backend(backend)
    applied = apply_psa(model, **PSA, warm_up=0)
    with torch.no_grad():
        sparse = velocity(pipes, model)
    assert (applied.sparse_calls, applied.fallbacks) == (2, {})
    with torch.no_grad():
        apply_psa(model, **PSA, warm_up=0, backend="torch")
        assert pipes.close(sparse.float(), velocity(pipes, model).float(), 0.02)


def test_a_lora_learns_and_psa_acts_again(pipes, model):
    peft = pytest.importorskip("peft")
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    applied = apply_psa(model, **PSA, warm_up=0, backend="triton")
    velocity(pipes, model).float().square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "attn1" in name}
    assert len(trained) == 8
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained.values())
    assert (applied.sparse_calls, applied.dense_calls) == (0, 2)
    with torch.no_grad():
        velocity(pipes, model)
    assert applied.sparse_calls == 2


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_before_and_after(pipes, how, first):
    """diffusers takes its hooks off and puts them on again after every run."""
    pipe = pipes.pipeline(pipes.wan().to(torch.bfloat16))
    applied = apply_psa(pipe, **PSA, warm_up=1) if first else None
    getattr(pipe, how)()
    applied = applied or apply_psa(pipe, **PSA, warm_up=1)
    outputs = [pipes.run(pipe, 3) for _ in range(2)]
    assert (applied.dense_calls, applied.sparse_calls) == (2 * 2, 2 * 4)
    assert torch.equal(*outputs)
    assert not applied.fallbacks
    applied.remove()
    pipes.run(pipe, 3)
    assert applied.sparse_calls == 8


def test_group_offload_with_a_stream(pipes):
    expected, model = (pipes.wan().to(torch.bfloat16) for _ in range(2))
    apply_psa(expected.cuda(), **PSA, warm_up=0)
    applied = apply_psa(model, **PSA, warm_up=0)
    model.enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="block_level",
        num_blocks_per_group=1, use_stream=True,
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(velocity(pipes, model), velocity(pipes, expected))
    assert applied.sparse_calls == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_pipeline_that_moves_to_the_other_device(pipes, model):
    applied = apply_psa(model, **PSA, warm_up=0)
    with torch.no_grad():
        first = velocity(pipes, model)
        model.to("cuda:1")
        second = velocity(pipes, model, "cuda:1")
    assert (applied.sparse_calls, applied.fallbacks) == (4, {})
    assert torch.equal(first.cpu(), second.cpu())
    assert applied.mean_sparsity() == pytest.approx(0.6, abs=0.05)


def ranks_of(start_ranks, count):
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices")
    return start_ranks(count)


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("psa", [None, {}, {"order": "semantic"}, {"correction": "full"}, {"mode": "budget"}])
def test_several_gpus_make_what_one_makes(pipes, start_ranks, work, psa, count):
    ranks = ranks_of(start_ranks, count)
    given = {"psa": None if psa is None else PSA | {"warm_up": 1, "correction": "off"} | psa, "device": "cuda"}
    alone = work.wan(**given)
    for rank in ranks.run(work.__file__, "wan", parallel={"ulysses_degree": count}, **given):
        assert pipes.close(rank["latents"], alone["latents"], 0.02)
        assert rank.get("sparse") == alone.get("sparse")
        assert not rank.get("fallbacks")


@pytest.mark.parametrize("correction", ["full", "off"])
def test_compiled_blocks(pipes, correction):
    """Without CUDA graphs: those of single blocks overwrite each other's outputs."""

    def prepared():
        pipe = pipes.pipeline(pipes.wan().to("cuda", torch.float16))
        return pipe, apply_psa(pipe, 0.9, min_tokens=0, warm_up=1, correction=correction)

    (eager, wanted), (pipe, applied) = prepared(), prepared()
    expected = pipes.run(eager, 5).float()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    for number in (1, 2, 3):
        assert pipes.close(pipes.run(pipe, 5).float(), expected, 5e-3)
        assert (applied.sparse_calls, applied.dense_calls) == (
            number * wanted.sparse_calls,
            number * wanted.dense_calls,
        )
    assert not applied.fallbacks
    torch._dynamo.reset()


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("correction", ["full", "off"])
def test_inside_autocast(pipes, work, correction, compiles):
    """The model then hands over queries and keys in float32, and values in bfloat16."""
    models = work.helper("for_diffusers/test_models")
    case = next(case for case in models.CASES if case.name == "HunyuanVideo15Transformer3DModel")
    inputs = case.inputs(pipes, pipes.normal(*case.size, seed=1), **case.given)
    inputs = {name: x.cuda() if torch.is_tensor(x) else x for name, x in inputs.items()}
    timesteps, outputs = torch.tensor([900.0, 500.0, 100.0], device="cuda"), []
    for psa in (None, pipes.FULL | {"warm_up": 1, "correction": correction, "backend": "triton"}):
        model = models.load(case).cuda()
        pipe = SimpleNamespace(transformer=model, scheduler=SimpleNamespace(timesteps=timesteps))
        applied = psa and apply_psa(pipe, **psa)
        if psa and compiles:
            model.compile_repeated_blocks(fullgraph=True)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            outputs += [model(**inputs | {"timestep": t[None]}, return_dict=False)[0].float() for t in timesteps]
    assert (applied.sparse_calls, applied.dense_calls, applied.fallbacks) == (2 * case.calls, case.calls, {})
    assert all(pipes.close(ours, dense, 0.02) for ours, dense in zip(outputs[3:], outputs[:3], strict=True))
    torch._dynamo.reset()


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("heads", [4, 7])
def test_several_gpus_make_the_cogvideox_of_one(pipes, start_ranks, work, heads, count):
    ranks = ranks_of(start_ranks, count)
    given = {"kind": "5b", "size": (1, 16, 5, 22, 26), "psa": PSA | {"warm_up": 1}, "heads": heads, "device": "cuda"}
    alone = work.cogvideox(**given, parallel=None)
    for rank in ranks.run(work.__file__, "cogvideox", parallel={"uneven": True}, **given):
        assert pipes.close(rank["latents"], alone["latents"], 0.02)
        assert rank["sparse"] == alone["sparse"] > 0
        assert not rank["fallbacks"]
