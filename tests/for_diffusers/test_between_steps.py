"""What a call leaves for the same call of the next step, what happens when memory is short, and what is measured."""

import gc
import json
import weakref

import pytest
import torch

from comfyui_psa.for_diffusers import apply_psa
from comfyui_psa.sampling import self_attention

PSA = {"sparsity": 0.6, "min_tokens": 0, "mode": "topk", "correction": "off"}
SEMANTIC = {"order": "semantic", "clusters": (8, 16)}


class Kernels:
    """The kernels, watched; they fail where `error_at(q)` gives an error."""

    def __init__(self, monkeypatch, error_at=lambda q: None):
        self.heads, self.lists, self.centroids, self.results = [], [], [], []
        genuine = self_attention.pyramid_sparse_attention

        def attention(q, k, v, config, **more):
            self.heads.append(q.shape[1])
            error = error_at(q)
            if error is not None:
                raise error
            self.lists.append(more["lists"])
            self.centroids.append(more["centroids"])
            self.results.append(genuine(q, k, v, config, **more))
            return self.results[-1]

        monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)


def guided(pipes):
    """Arguments of a run with two forwards a step, of two prompts."""
    return {"guidance_scale": 5.0, "negative_prompt_embeds": pipes.normal(1, 13, 4096, seed=4)}


@pytest.mark.parametrize("prompts", [1, 2])
def test_centroids_go_on_from_the_same_call_of_the_step_before(pipes, monkeypatch, prompts):
    pipe = pipes.pipeline(pipes.wan())
    applied = apply_psa(pipe, **PSA, **SEMANTIC, warm_up=1)
    calls = 2 * prompts
    for _ in range(2):
        kernels = Kernels(monkeypatch)
        pipes.run(pipe, 4, **guided(pipes) if prompts == 2 else {})
        assert kernels.centroids[:calls] == [None] * calls, "a run begins from scratch"
        for number in range(calls, 3 * calls):
            assert kernels.centroids[number] is kernels.results[number - calls].centroids
    assert not applied.fallbacks


@pytest.mark.parametrize("prompts", [1, 2])
def test_levels_are_kept_for_the_same_call_of_the_next_step(pipes, monkeypatch, prompts):
    pipe = pipes.pipeline(pipes.wan())
    applied = apply_psa(pipe, **PSA, warm_up=1, reuse_steps=2)
    calls = 2 * prompts
    for _ in range(2):
        kernels = Kernels(monkeypatch)
        pipes.run(pipe, 6, **guided(pipes) if prompts == 2 else {})
        assert len(kernels.lists) == 5 * calls
        for number, lists in enumerate(kernels.lists):
            chosen_now = number // calls % 2 == 0
            chosen = None if chosen_now else kernels.results[number - calls].lists.density
            assert (lists and lists.density) is chosen, "the same lists, packed"
    assert not applied.fallbacks
    assert applied.unranked_pairs() == 0


def test_the_levels_of_a_run_do_not_outlive_it(pipes, monkeypatch):
    kernels = Kernels(monkeypatch)
    pipe = pipes.pipeline(pipes.wan())
    apply_psa(pipe, **PSA, warm_up=0, reuse_steps=3)
    pipes.run(pipe, 5)
    left = [weakref.ref(result.lists.density) for result in kernels.results]
    kernels.results.clear()
    kernels.lists.clear()
    gc.collect()
    assert not any(ref() is not None for ref in left)


def test_a_run_of_one_step_again_keeps_nothing(pipes, monkeypatch):
    """Two runs at the same timestep are not two calls of a step."""
    kernels = Kernels(monkeypatch)
    pipe = pipes.pipeline(pipes.wan())
    apply_psa(pipe, **PSA, warm_up=0, reuse_steps=9)
    for _ in range(3):
        pipes.run(pipe, 1)
    assert kernels.lists == [None] * 6


def test_the_same_timesteps_again_are_another_run(pipes, monkeypatch):
    kernels = Kernels(monkeypatch)
    pipe = pipes.pipeline(pipes.wan(layers=1))
    apply_psa(pipe, **PSA, warm_up=0, reuse_steps=9)
    pipe.scheduler.set_timesteps(4)
    for _ in range(2):
        for timestep in pipe.scheduler.timesteps:
            pipes.velocity(pipe.transformer, timestep=float(timestep))
    assert [lists is None for lists in kernels.lists] == [True, False, False, False] * 2


def test_a_loop_at_one_timestep_piles_up_nothing(pipes):
    pipe = pipes.pipeline(pipes.wan(layers=1))
    applied = apply_psa(pipe, **PSA, warm_up=0, dense_blocks=(0,))
    for _ in range(200):
        with torch.no_grad():
            pipes.call(pipe.transformer, pipes.normal(1, 16, 2, 16, 16), timestep=500.0)
    assert applied.dense_calls == 200
    assert applied.reports()[0]["steps"][0]["dense_calls"] < 100


def test_out_of_memory_is_tried_again_with_fewer_heads(pipes, monkeypatch, caplog):
    pipe = pipes.pipeline(pipes.wan())
    apply_psa(pipe, **PSA, warm_up=1)
    expected = pipes.run(pipe, 4)
    applied = apply_psa(pipe, **PSA, warm_up=1)
    kernels = Kernels(monkeypatch, lambda q: torch.OutOfMemoryError("full") if q.shape[1] > 1 else None)
    assert pipes.close(pipes.run(pipe, 4), expected, 1e-5)  # topk: the heads do not know of each other
    assert kernels.heads == [2, *[1] * 12], "once found, the size stays"
    assert (applied.sparse_calls, applied.dense_calls) == (6, 2)
    assert not applied.fallbacks
    assert caplog.text.count("out of memory") == 1


def test_out_of_memory_without_end_is_dense_and_said_once(pipes, monkeypatch, caplog):
    model = pipes.wan()
    stock = pipes.velocity(model)
    applied = apply_psa(model, **PSA, warm_up=0)
    kernels = Kernels(monkeypatch, lambda q: torch.OutOfMemoryError("full"))
    for _ in range(2):
        assert torch.equal(pipes.velocity(model), stock)
    assert kernels.heads == [2, 1]
    assert applied.fallbacks == {"PSA ran out of memory, even with one head at a time": 4}
    assert caplog.text.count("staying dense: PSA ran out of memory") == 1


@pytest.mark.parametrize(("correction", "learned"), [("off", 0), ("auto", 1)])
def test_figures_of_the_last_run_are_those_of_the_node(pipes, correction, learned):
    pipe = pipes.pipeline(pipes.wan())
    applied = apply_psa(pipe, **PSA | {"correction": correction}, warm_up=1, dense_blocks=(1,))
    assert applied.reports() == [None]
    for steps in (3, 4):
        pipes.run(pipe, steps)
    (report,) = applied.reports()
    assert [step["kind"] for step in report["steps"]] == ["dense", "sparse", "sparse", "sparse"]
    assert [step["sparse_calls"] for step in report["steps"]] == [0, 1, 1, 1]
    assert [step["sigma"] for step in report["steps"]] == pytest.approx(pipe.scheduler.timesteps.tolist())
    assert report["grid"] == [3, 16, 16]
    assert report["fallbacks"] == [{"reason": "block 1 is listed in dense_blocks", "calls": 3}]
    assert report["mean_sparsity"] == pytest.approx(applied.mean_sparsity(), abs=1e-4)
    assert report["mean_sparsity"] == pytest.approx(0.6, abs=0.05)
    assert [step["learned_calls"] for step in report["steps"]] == [learned, 0, 0, 0]
    # All calls are equally sparse, also the one that only measures what is lost.
    assert report["saved"] == pytest.approx((report["mean_sparsity"] * 3 - (1 - report["mean_sparsity"]) * learned) / 8)
    assert all(step["seconds"] > 0 for step in report["steps"])
    json.dumps(report)
    assert (applied.sparse_calls, applied.dense_calls) == (2 + 3, 4 + 5), "of both runs"


def test_figures_and_counts_stay_after_removal(pipes):
    model = pipes.wan()
    applied = apply_psa(model, **PSA, warm_up=0)
    pipes.velocity(model)
    applied.remove()
    assert (applied.sparse_calls, applied.dense_calls) == (2, 0)
    assert applied.mean_sparsity() == pytest.approx(0.6, abs=0.05)
    assert applied.reports()[0]["mean_sparsity"] == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({"reuse_steps": 0}, "reuse_steps: 0 was given; allowed: a whole number, 1 to 100"),
        ({"reuse_steps": 2, **SEMANTIC}, "reuse_steps: 2 was given; allowed: 1 with the order semantic"),
    ],
)
def test_steps_that_cannot_be_kept_are_refused(pipes, given, allowed):
    with pytest.raises(ValueError, match=allowed):
        apply_psa(pipes.pipeline(pipes.wan(layers=1)), **PSA, **given)


def test_a_bare_transformer_knows_no_steps_to_keep(pipes):
    with pytest.raises(ValueError, match="reuse_steps: 2 was given; allowed: 1, a bare transformer knows no steps"):
        apply_psa(pipes.wan(layers=1), **PSA, warm_up=0, reuse_steps=2)
