"""What sparse steps get back in diffusers' pipelines, against a loop over the calls of a run; and the memory for it."""

import contextlib
import dataclasses
import gc
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from comfyui_psa.choices.presets import load_presets
from comfyui_psa.for_diffusers import apply_psa
from comfyui_psa.kernels.attention import pyramid_sparse_attention
from comfyui_psa.kernels.order import TokenLayout

pytestmark = pytest.mark.usefixtures("in_short_runs")

PSA = {"sparsity": 0.6, "min_tokens": 0, "correction": "full", "warm_up": 2}


class Loop(TorchFunctionMode):
    """Dense, sparse and corrected attention of a whole run: calls come block by block, forward by forward."""

    def __init__(self, config, layout, *, forwards, steps, dense=2, blocks=2, renew=8):
        super().__init__()
        sparse = steps - dense
        turns = [(number + block) % renew == 0 for number in range(1, sparse + 1) for block in range(blocks)]
        self.config = dataclasses.replace(config, sparsity=config.sparsity + sum(turns) / len(turns))
        self.layout, self.forwards, self.dense, self.blocks, self.renew = layout, forwards, dense, blocks, renew
        self.calls, self.known = 0, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return output
        q, k, v = args[:3] if len(args) >= 3 else (kwargs[name] for name in ("query", "key", "value"))
        if q.shape != k.shape:
            return output
        block, forward = self.calls % self.blocks, self.calls // self.blocks % self.forwards
        number = self.calls // (self.blocks * self.forwards) - self.dense + 1  # of the sparse step
        self.calls += 1
        if number < 0:
            return output
        rows = [
            self.row((block, forward, i), number, *(x[i : i + 1] for x in (q, k, v, output))) for i in range(len(q))
        ]
        return torch.cat(rows)

    def row(self, place, number, q, k, v, dense):
        given = q, k, v, self.config
        if number == 0 or (number + place[0]) % self.renew == 0:
            result = pyramid_sparse_attention(*given, layout=self.layout, backend="torch")
            lost = (dense - result.output)[:, :, self.layout.before :]
            scale = lost.abs().amax(-1, keepdim=True) / 448
            self.known[place] = result.lists, (lost / scale).to(torch.float8_e4m3fn).float() * scale * 0.95
            return dense
        lists, delta = self.known[place]
        output = pyramid_sparse_attention(*given, layout=self.layout, backend="torch", lists=lists).output.clone()
        output[:, :, self.layout.before :] += delta
        return output


def guided(pipes):
    return {"guidance_scale": 3.0, "negative_prompt_embeds": pipes.normal(1, 13, 4096, seed=5)}


def corrections(applied):
    return [report["correction"] for report in applied.reports()]


def by_step(applied, kind):
    return [step[kind] for step in applied.reports()[0]["steps"]]


def alive(losses):
    return sum(ref() is not None for ref in losses)


@pytest.mark.parametrize("guidance", [False, True])
def test_wan_is_what_the_loop_computes(pipes, losses, guidance):
    pipe, given = pipes.pipeline(pipes.wan()), guided(pipes) if guidance else {}
    with Loop(load_presets()["module-default"].config(0.6), TokenLayout((3, 16, 16)), forwards=1 + guidance, steps=10):
        expected = pipes.run(pipe, 10, **given)
    applied = apply_psa(pipe, **PSA)
    out = pipes.run(pipe, 10, **given)
    assert pipes.close(out, expected, 1e-5)
    calls = 2 * (1 + guidance)
    assert by_step(applied, "corrected_calls") == [0, 0, *[calls] * 6, *[calls // 2] * 2], "two renewals"
    assert by_step(applied, "learned_calls")[:3] == [0, calls, 0]
    assert losses
    assert alive(losses) == 0, "nothing is held once the pipeline has returned"
    plain = apply_psa(pipe, **PSA | {"correction": "off"})
    assert not pipes.close(pipes.run(pipe, 10, **given), expected, 1e-4)
    assert corrections(plain) == [None]


def test_cogvideox_is_what_the_loop_computes(tiny, pipes, losses):
    """Both prompts come in one batch, and the text before the video is not corrected."""
    model, latents = tiny.transformer("5b"), pipes.normal(1, 16, 6, 24, 32, seed=3)
    config = load_presets()["cogvideox-5b"].config(0.6, block_kv=32)
    with Loop(config, TokenLayout((6, 12, 16), before=tiny.TEXT), forwards=1, steps=10):
        expected = tiny.run_pipeline(model, "5b", "ddim", latents, 10, guidance=4.0)
    pipe = SimpleNamespace(transformer=model, scheduler=tiny.scheduler("5b", "ddim"))
    applied = apply_psa(pipe, **PSA, block_kv=32)
    out = tiny.run_pipeline(model, "5b", "ddim", latents, 10, guidance=4.0)
    assert pipes.close(out, expected, 1e-5)
    assert by_step(applied, "corrected_calls") == [0, 0, *[2] * 6, 1, 1]
    assert alive(losses) == 0


def heun():
    from diffusers import FlowMatchHeunDiscreteScheduler

    return FlowMatchHeunDiscreteScheduler(shift=5.0)


def test_a_scheduler_that_evaluates_twice(pipes, losses):
    pipe = pipes.pipeline(pipes.wan())
    pipe.scheduler = heun()
    applied = apply_psa(pipe, **PSA | {"sparsity": 0.85})
    assert torch.isfinite(pipes.run(pipe, 8, **guided(pipes))).all()
    assert by_step(applied, "corrected_calls") == by_step(applied, "sparse_calls") == [0, 0, *[8] * 6]
    assert alive(losses) == 0


def test_no_warm_up_learns_in_the_first_step(pipes):
    pipe = pipes.pipeline(pipes.wan())
    applied = apply_psa(pipe, **PSA | {"warm_up": 0, "sparsity": 0.85})
    pipes.run(pipe, 4)
    assert by_step(applied, "learned_calls") == [2, 0, 0, 0]
    assert by_step(applied, "corrected_calls") == [0, 2, 2, 2]
    pipes.run(pipe, 2)
    assert by_step(applied, "sparse_calls") == [2, 2], "too few steps to learn"


def test_both_experts_learn_and_the_first_gives_its_memory_to_the_second(pipes, losses):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = pipes.pipeline(pipes.wan(), pipes.wan(seed=1))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # half of the steps for each
    applied = apply_psa(pipe, **PSA | {"sparsity": 0.85})
    held = []

    def look(*_):
        held.append([sum(run.losses.nbytes for run, _ in state._runs.values()) for state in applied.states])

    pipe.transformer_2.blocks[1].ffn.register_forward_pre_hook(look)
    pipes.run(pipe, 12)
    first, second = corrections(applied)
    assert first["learned_calls"] == second["learned_calls"] == 2
    assert min(first["corrected_calls"], second["corrected_calls"]) >= 4
    assert {one for one, _ in held} == {0}
    assert max(two for _, two in held) == second["bytes"] > 0
    assert alive(losses) == 0


def test_what_is_raised_inside_gives_everything_back_and_the_next_run_is_right(pipes, losses):
    pipe = pipes.pipeline(pipes.wan())
    apply_psa(pipe, **PSA)
    expected = pipes.run(pipe, 6)
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("stop")

    losses.clear()
    handle = pipe.transformer.blocks[1].ffn.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="stop"):
        pipes.run(pipe, 6)
    handle.remove()
    assert losses
    assert alive(losses) == 0
    assert torch.equal(pipes.run(pipe, 6), expected)


class Stopped(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("then", ["remove", "again"])
def test_what_stops_a_run_between_two_forwards_is_made_good(pipes, losses, then):
    def stop(pipe, step, *_):
        if step == 3:
            raise Stopped
        return {}

    pipe = pipes.pipeline(pipes.wan())
    stock = pipes.run(pipe, 6)
    applied = apply_psa(pipe, **PSA)
    expected = pipes.run(pipe, 6)
    losses.clear()
    with pytest.raises(Stopped):
        pipes.run(pipe, 6, callback_on_step_end=stop)
    earlier = list(losses)
    assert earlier
    if then == "remove":
        applied.remove()
        assert torch.equal(pipes.run(pipe, 6), stock)
    else:
        assert torch.equal(pipes.run(pipe, 6), expected)
    gc.collect()
    assert alive(earlier) == 0


@pytest.mark.parametrize("reuse_steps", [1, 3])
@pytest.mark.parametrize("how", ["an error", "diffusers' own flag"])
def test_a_run_that_stops_between_two_steps_gives_everything_back_at_once(pipes, losses, how, reuse_steps):
    """Nobody calls the transformer again, and PSA stays on."""

    def stop(pipe, step, *_):
        if step == 3 and how == "an error":
            raise Stopped
        pipe._interrupt = step >= 3
        return {}

    pipe = pipes.pipeline(pipes.wan())
    applied = apply_psa(pipe, **PSA, reuse_steps=reuse_steps)
    expected = pipes.run(pipe, 6)
    with pytest.raises(Stopped) if how == "an error" else contextlib.nullcontext():
        pipes.run(pipe, 6, callback_on_step_end=stop)
    gc.collect()
    assert losses
    assert alive(losses) == 0
    (run,) = [run for run, _ in applied.states[0]._runs.values()]
    assert not run.kept._entries
    assert torch.equal(pipes.run(pipe, 6), expected)


def test_the_end_of_one_pipeline_s_call_leaves_another_s_run(pipes, losses):
    """Two pipelines take turns with one transformer in one thread: the first call ends while the second is running."""
    model = pipes.wan()
    inner, outer = pipes.pipeline(model), pipes.pipeline(model)
    applied = apply_psa(outer, **PSA | {"sparsity": 0.85})

    def between(pipe, step, *_):
        if step == 2:
            pipes.run(inner, 6)
        return {}

    out = pipes.run(outer, 6, callback_on_step_end=between)
    assert torch.isfinite(out).all()
    gc.collect()
    assert alive(losses) == 0
    assert by_step(applied, "corrected_calls") == [0, 2, 2], "the rest of the outer run learned again"


@pytest.mark.parametrize("first", [True, False])
def test_group_offload(pipes, first):
    expected, pipe = (pipes.pipeline(pipes.wan()) for _ in range(2))
    apply_psa(expected, **PSA)
    applied = apply_psa(pipe, **PSA) if first else None
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    applied = applied or apply_psa(pipe, **PSA)
    assert torch.equal(pipes.run(pipe, 6), pipes.run(expected, 6))
    assert corrections(applied)[0]["corrected_calls"] == 8


@pytest.mark.parametrize("size", ["full", "half", "quarter", "eighth"])
def test_a_bare_transformer_has_none(pipes, size):
    model = pipes.wan()
    with pytest.raises(ValueError, match="a bare transformer knows no steps"):
        apply_psa(model, 0.6, **pipes.SETTINGS, correction=size)
    applied = apply_psa(model, 0.6, **pipes.SETTINGS)
    pipes.velocity(model)
    assert applied.sparse_calls == 2
    assert corrections(applied) == [None]


def test_a_wrong_value_is_refused(pipes):
    with pytest.raises(ValueError, match="correction"):
        apply_psa(pipes.pipeline(pipes.wan()), 0.6, correction="most")


def test_a_batch_that_changes_its_size_is_not_corrected_by_another_row(pipes, monkeypatch):
    """As a cache does that leaves out the negative prompt in some steps: row 0 is then another one."""
    from comfyui_psa.for_diffusers import state

    given = []
    genuine = state.attend

    def attend(run, q, *args, prompts, **kwargs):
        given.append([run.losses.has((run.position.block, prompt, run.position.layout, 0, 2)) for prompt in prompts])
        return genuine(run, q, *args, prompts=prompts, **kwargs)

    monkeypatch.setattr(state, "attend", attend)
    pipe = pipes.pipeline(pipes.wan(layers=1))
    apply_psa(pipe, **PSA | {"sparsity": 0.85})
    pipe.scheduler.set_timesteps(6)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        latents = pipes.normal(*pipes.SIZE, seed=1).repeat(1 if step == 4 else 2, 1, 1, 1, 1)
        text = pipes.normal(1, 13, 4096, seed=2).repeat(len(latents), 1, 1)
        with torch.no_grad():
            pipe.transformer(latents, timestep.repeat(len(latents)), text, return_dict=False)
    assert given == [[True, True], [True, True], [False], [True, True]]


def test_processes_on_one_host_share_its_memory(monkeypatch):
    import psutil

    from comfyui_psa.for_diffusers import memory

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=800))
    assert memory.free_on_host() == 400
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_on_host() == 100


def scaled(model):
    model.set_adapters(["first"], [0.3])


def switched_off(model):
    model.disable_adapters()


def deleted(model):
    model.delete_adapters("first")


def merged(model):
    model.fuse_lora(lora_scale=2.0)


def added(model):
    with_lora(model, "second")


def left(model):
    pass


def with_lora(model, name):
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "ffn.net.2"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), name)


@pytest.mark.parametrize("change", [scaled, switched_off, deleted, merged, added, left])
def test_what_was_lost_with_another_lora_is_not_given_back(pipes, caplog, change):
    """A callback changes it after two sparse steps; from then on, the run is one without correction."""
    runs = []
    for correction in ("full", "off"):
        pipe = pipes.pipeline(pipes.wan())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with_lora(pipe.transformer, "first")
            applied = apply_psa(pipe, 0.6, min_tokens=0, warm_up=1, correction=correction)

            def then(pipe, step, *_):
                if step == 2:
                    change(pipe.transformer)
                return {}

            pipes.run(pipe, 6, callback_on_step_end=then)
        runs.append([step["corrected_calls"] for step in applied.reports()[0]["steps"]])
        applied.remove()
    given_back = [2, 2] if change is not left else [2] * 5
    assert runs == [[0, *given_back, *[0] * (5 - len(given_back))], [0] * 6]
    said = [record.getMessage() for record in caplog.records if "the strength of a LoRA has changed" in record.message]
    assert len(said) == (change is not left)


def test_a_run_learns_again_where_a_lora_changes_its_strength_early(pipes, caplog):
    """The steps that are left can pay for a dense one."""
    pipe = pipes.pipeline(pipes.wan())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with_lora(pipe.transformer, "first")
        applied = apply_psa(pipe, 0.6, min_tokens=0, warm_up=1, correction="full")

        def then(pipe, step, *_):
            if step == 2:
                scaled(pipe.transformer)
            return {}

        pipes.run(pipe, 12, callback_on_step_end=then)
    steps = applied.reports()[0]["steps"]
    applied.remove()
    assert [step["corrected_calls"] for step in steps] == [0, 2, 2, 0, *[2] * 8]
    assert [step["learned_calls"] for step in steps] == [2, 0, 0, 2, *[0] * 8]
    assert "the strength of a LoRA" not in caplog.text
