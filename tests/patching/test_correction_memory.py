"""A correction without room, kernels that fail, runs that are stopped: what is given back, said and reported."""

import dataclasses
import gc

import pytest
import torch

from comfyui_psa.choices import correction as choices
from comfyui_psa.patching import override
from comfyui_psa.patching.override import RUN_KEY
from comfyui_psa.patching.patch import patch_model
from comfyui_psa.sampling import self_attention
from comfyui_psa.sampling.correction import LossStore, Memory
from comfyui_psa.sampling.record import Record
from comfyui_psa.sampling.run import Run

from . import patched
from .patched import by_step, distance, report

pytestmark = pytest.mark.usefixtures("in_short_runs")

PATCH = patched.PATCH | {"sparsity": 0.85, "correction": "full"}
SMALL = {"steps": 5, "size": (1, 16, 3, 16, 32)}


def failing(monkeypatch, error, when):
    """Make the kernels raise `error` where `when(what they are given)` is true; returns what every call was given."""
    calls = []
    genuine = self_attention.pyramid_sparse_attention

    def attention(q, k, v, config, **kwargs):
        given = kwargs | {"config": config, "heads": q.shape[1], "learns": "out" not in kwargs, "number": len(calls)}
        calls.append(given)
        if when(given):
            raise error
        return genuine(q, k, v, config, **kwargs)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    return calls


def lines(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


FULL = torch.OutOfMemoryError("full")


def test_out_of_memory_while_learning_gives_the_correction_up(model, sample, monkeypatch, caplog):
    plain = sample(patch_model(model, **PATCH | {"correction": "off"}), **SMALL)
    psa = patch_model(model, **PATCH)
    calls = failing(monkeypatch, FULL, lambda given: given["learns"] and given["number"])
    out = sample(psa, **SMALL)
    assert distance(out, plain) < 1e-5
    assert {given["heads"] for given in calls} == {2}, "calls are not computed in parts for it"
    (line,) = lines(caplog)
    assert "no correction: the memory is full; set correction to eighth" in line
    assert report(psa)["correction"]["reason"] in line
    assert report(psa)["correction"]["corrected_calls"] == 0
    assert report(psa)["fallbacks"] == []


def test_out_of_memory_in_a_sparse_call_gives_the_correction_up_first(model, sample, monkeypatch, caplog):
    psa, held = patch_model(model, **PATCH), []

    def when(given):
        if given.get("delta") is not None and given["number"] == 5:
            held.append(1)
            return True
        return False

    calls = failing(monkeypatch, FULL, when)
    assert torch.isfinite(sample(psa, **SMALL)).all()
    assert held
    assert {given["heads"] for given in calls} == {2}
    assert all(given.get("delta") is None for given in calls[6:])
    (line,) = lines(caplog)
    assert "no correction from here on: the memory is full" in line
    found = report(psa)
    assert found["fallbacks"] == []
    assert 0 < found["correction"]["corrected_calls"] < sum(by_step(psa, "sparse_calls"))
    assert by_step(psa, "sparse_calls")[-1] == 2


def test_memory_that_is_still_too_small_goes_on_with_fewer_heads(model, sample, monkeypatch, caplog):
    calls = failing(monkeypatch, FULL, lambda given: not given["learns"] and given["heads"] > 1)
    psa = patch_model(model, **PATCH)
    sample(psa, **SMALL)
    assert [given["heads"] for given in calls if not given["learns"]][:3] == [2, 2, 1]
    assert caplog.text.count("out of memory; continuing with 2 groups") == 1
    assert caplog.text.count("no correction from here on") == 1
    assert report(psa)["fallbacks"] == []


def test_kernels_that_fail_with_a_correction_are_tried_without(model, sample, monkeypatch, caplog):
    failing(monkeypatch, RuntimeError("bad tile"), lambda given: given.get("delta") is not None)
    psa = patch_model(model, **PATCH)
    sample(psa, **SMALL)
    assert report(psa)["fallbacks"] == []
    assert sum(by_step(psa, "sparse_calls")) > 0
    (line,) = lines(caplog)
    assert "no correction from here on" in line
    assert "bad tile" in line


def test_kernels_that_fail_without_one_too_are_dense(model, sample, monkeypatch, caplog):
    failing(monkeypatch, RuntimeError("bad tile"), lambda given: not given["learns"])
    psa = patch_model(model, **PATCH)
    assert torch.equal(sample(psa, **SMALL), sample(model, **SMALL))
    assert [line.partition(":")[2].split(":")[0].strip() for line in lines(caplog)] == [
        "no correction from here on", "staying dense",
    ]  # fmt: skip


def test_kernels_that_fail_while_learning_are_tried_once(model, sample, monkeypatch, caplog):
    calls = failing(monkeypatch, RuntimeError("does not compile"), lambda given: True)
    psa = patch_model(model, **PATCH)
    assert torch.equal(sample(psa, **SMALL), sample(model, **SMALL))
    assert len(calls) == 1
    assert caplog.text.count("does not compile") == 1


def test_a_type_that_cannot_be_held_is_plain_psa(model, sample, monkeypatch, caplog):
    """Some devices have no float8."""

    def without(*args, **kwargs):
        raise TypeError("no float8 here")

    plain = sample(patch_model(model, **PATCH | {"correction": "off"}), **SMALL)
    monkeypatch.setattr(self_attention, "measure_delta", without)
    psa = patch_model(model, **PATCH)
    assert torch.equal(sample(psa, **SMALL), plain)
    (line,) = lines(caplog)
    assert "no correction: the kernels failed on this machine (no float8 here)" in line
    assert "the run goes on without it" in line
    assert "stays dense" not in line, "it is sparse"


def test_a_part_that_cannot_be_sparse_leaves_the_others_corrected(model, sample, tiny_wan):
    part = tiny_wan.area(8, 32, 16, 0, 0)
    psa = patch_model(model, **PATCH | {"block_kv": "128"})
    sample(psa, steps=5, positive=part + tiny_wan.conditioning())
    whole, small = report(psa)["grids"]
    assert (small["sparse_calls"], whole["sparse_calls"]) == (0, report(psa)["correction"]["corrected_calls"])
    assert whole["sparse_calls"] > 0
    assert report(psa)["correction"]["reason"] is None


def with_memory(monkeypatch, free):
    """ComfyUI, with so much memory."""
    host = override.COMFYUI
    memory = Memory(free, lambda: 0, host.memory.pin, host.memory.unpin)
    monkeypatch.setattr(override, "COMFYUI", dataclasses.replace(host, memory=memory))


def test_no_memory_is_plain_psa_with_one_line(model, sample, monkeypatch, caplog):
    plain = sample(patch_model(model, **PATCH | {"correction": "off"}), **SMALL)
    with_memory(monkeypatch, lambda device: 1000)
    psa = patch_model(model, **PATCH)
    assert torch.equal(sample(psa, **SMALL), plain)
    (line,) = lines(caplog)
    assert "no correction: it needs" in line
    assert "close other programs" in line
    assert report(psa)["correction"]["reason"] in line


@pytest.mark.parametrize(("asked", "start"), [("auto", 0.25), ("full", 0.25), ("auto", 0.0)])
def test_a_size_that_fell_to_an_eighth_renews_as_an_eighth_does(model, sample, loops, monkeypatch, asked, start):
    """Finer sizes renew some blocks, and their sparse calls pay for it; in so few steps an eighth renews none."""
    monkeypatch.setattr(choices, "COARSE_RENEWALS", ())
    patch, steps = PATCH | {"sparsity": 0.6, "start_percent": start}, {"steps": 10}
    eighth = patch_model(model, **patch | {"correction": "eighth"})
    sample(eighth, **steps)
    with_memory(monkeypatch, lambda device: report(eighth)["correction"]["bytes"])
    psa = patch_model(model, **patch | {"correction": asked})
    expected, loop = loops.looped(model, sample, patch, steps, group=8)
    assert distance(sample(psa, **steps), expected) < 2e-5
    assert report(psa)["correction"]["size"] == "eighth"
    assert report(psa)["correction"]["bytes"] == report(eighth)["correction"]["bytes"]
    assert by_step(psa, "corrected_calls") == loop.corrected


def test_levels_that_grow_when_nothing_is_renewed_are_counted(model, sample, monkeypatch, caplog):
    """An eighth fits with the levels of the sparser calls that pay for renewals; its own calls keep longer ones."""
    monkeypatch.setattr(choices, "COARSE_RENEWALS", ())
    patch = PATCH | {"sparsity": 0.6, "correction": "auto"}
    eighth = patch_model(model, **patch | {"correction": "eighth"})
    sample(eighth, steps=10)
    plain = sample(patch_model(model, **patch | {"correction": "off"}), steps=10)
    with_memory(monkeypatch, lambda device: report(eighth)["correction"]["bytes"] - 1)
    psa = patch_model(model, **patch)
    assert torch.equal(sample(psa, steps=10), plain)
    assert report(psa)["correction"]["size"] is None
    (line,) = lines(caplog)
    assert "no correction: it needs" in line


def test_what_follows_a_failure_in_the_same_step_has_the_density_of_the_slider(model, sample, monkeypatch):
    """Nothing is renewed any more, so nothing has to be saved for it."""
    patch = PATCH | {"sparsity": 0.6}
    calls = failing(monkeypatch, FULL, lambda given: given.get("delta") is not None and given["number"] >= 6)
    sample(patch_model(model, **patch), steps=10)
    first = next(number for number, given in enumerate(calls) if given["number"] >= 6 and given["delta"] is not None)
    assert calls[first]["config"].sparsity > 0.65
    assert {given["config"].sparsity for given in calls[first + 1 :]} == {0.6}


def test_a_prompt_that_replaces_another_takes_its_room(model, sample, monkeypatch, tiny_wan):
    prompts = tiny_wan.conditioning(end_percent=0.48) + tiny_wan.conditioning(seed=8, start_percent=0.48)
    arguments = {"steps": 20, "size": (1, 16, 3, 16, 32), "positive": prompts}
    roomy = patch_model(model, **PATCH | {"sparsity": 0.6})
    expected = sample(roomy, **arguments)
    bytes_of_both = report(roomy)["correction"]["bytes"]
    with_memory(monkeypatch, lambda device: 0.6 * bytes_of_both)
    psa = patch_model(model, **PATCH | {"sparsity": 0.6})
    assert torch.equal(sample(psa, **arguments), expected)
    found = report(psa)["correction"]
    assert (found["size"], found["without_room"]) == ("full", 0)
    assert found["bytes"] <= 0.6 * bytes_of_both
    assert by_step(psa, "sparse_calls") == by_step(psa, "corrected_calls")


def test_losses_without_room_are_in_the_report_and_a_note(model, sample, monkeypatch, caplog):
    """The size was chosen for one prompt; another one appears that needs room too."""
    genuine = LossStore.choose_size

    def choose(self, *args):
        genuine(self, *args)
        self._budget = 1

    monkeypatch.setattr(LossStore, "choose_size", choose)
    psa = patch_model(model, **PATCH)
    sample(psa, **SMALL)
    found = report(psa)
    assert found["correction"]["without_room"] == 2
    (note,) = found["notes"]
    assert "not corrected" in note
    assert "set correction to eighth" in note
    assert caplog.text.count(note) == 1
    assert [step["kind"] for step in found["steps"]].count("sparse") >= 2, "the run does not stay dense to learn"


def alive(losses):
    gc.collect()
    return sum(ref() is not None for ref in losses)


def test_nothing_is_left_after_50_runs(model, sample, losses):
    psa = patch_model(model, **PATCH | {"sparsity": 0.6})
    counts = []
    for _ in range(50):
        sample(psa, steps=4, size=(1, 16, 2, 16, 32))
        counts.append(len(losses))
        assert not any(ref() is not None for ref in losses), "given back at once, not by the collector"
        losses.clear()
    assert min(counts) == max(counts) > 0, "every run holds as much"


class Stopped(BaseException):
    """As ComfyUI's interrupt: no Exception."""


@pytest.mark.parametrize("error", [Stopped, RuntimeError])
@pytest.mark.parametrize("stage", ["learning", "sparse", "callback"])
def test_a_run_that_is_stopped_gives_everything_back(model, sample, monkeypatch, losses, stage, error):
    psa = patch_model(model, **PATCH)
    expected = sample(psa, **SMALL)

    def stop(step=3, *_):
        if step == 3:
            raise error("stop")

    losses.clear()
    with monkeypatch.context() as patch:
        if stage == "callback":
            given = {"callback": stop}
        else:
            given = {}
            genuine = psa.get_model_object("diffusion_model").blocks[1].ffn.forward
            calls = []

            def forward(*args):
                calls.append(1)
                if len(calls) == (2 if stage == "learning" else 4):
                    stop()
                return genuine(*args)

            patch.setattr(psa.get_model_object("diffusion_model").blocks[1].ffn, "forward", forward)
        with pytest.raises(error):
            sample(psa, **SMALL, **given)
    assert losses
    assert alive(losses) == 0
    assert RUN_KEY not in psa.model_options["transformer_options"]
    assert torch.equal(sample(psa, **SMALL), expected)


def test_figures_that_cannot_be_read_keep_no_memory(model, sample, monkeypatch):
    """A device that failed raises when it is read, which is after the run."""
    stores, genuine = [], LossStore.__init__

    def made(self, *args):
        genuine(self, *args)
        stores.append(self)

    def fail(*_):
        raise RuntimeError("device-side assert")

    psa = patch_model(model, **PATCH | {"end_percent": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(LossStore, "__init__", made)
        patch.setattr(Record, "end", fail)
        sample(psa, **SMALL)
    assert [(store.most > 0, store.nbytes, len(store)) for store in stores] == [(True, 0, 0)]


def test_a_run_is_gone_when_it_ends(model, sample):
    """Without waiting for the garbage collector: until it came, small tensors of every call would stay on the GPU."""
    psa = patch_model(model, **PATCH)
    sample(psa, **SMALL)
    gc.collect()
    kept = [found for found in gc.get_objects() if type(found) is Run]  # by errors that earlier tests looked at
    gc.disable()
    try:
        sample(psa, **SMALL)
        assert [found for found in gc.get_objects() if type(found) is Run] == kept
    finally:
        gc.enable()
