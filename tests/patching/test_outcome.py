"""What a node says in bold: the figures of its run, why nothing was sparse and what to do, that another one counts."""

import sys
from types import SimpleNamespace

import pytest

from comfyui_psa.patching import core, live
from comfyui_psa.patching.patch import patch_model
from comfyui_psa.sampling import self_attention

from .patched import PATCH, report

BLOCKS, STEPS = 2, 4


@pytest.fixture
def told(model, tiny_wan):
    """Samples with changed inputs and returns what the page is told at the end of the run."""

    def run(steps=STEPS, model=model, sampler="euler", **changes):
        ended = []
        psa = patch_model(model, **PATCH | changes, on_end=ended.append)
        tiny_wan.sample(psa, steps=steps, sampler=sampler)
        (found,) = ended
        assert report(psa)["dense"] == found["dense"], "PSA Report says the same"
        return found

    return run


@pytest.mark.parametrize("correction", ["off", "auto"])
@pytest.mark.parametrize("changes", [{}, {"dense_blocks": "1"}, {"start_percent": 0.6}, {"start_percent": 0.0}])
def test_what_is_saved_is_a_share_of_all_attention_of_the_run(told, model, kernel_calls, changes, correction):
    dense = []

    def earlier(func, q, k, *args, **kwargs):
        dense.append(q.shape == k.shape)
        return func(q, k, *args, **kwargs)

    counted = model.clone()
    core.set_override(counted, earlier)
    found = told(model=counted, correction=correction, **changes)
    densities = [float(call.result.density) for call in kernel_calls]
    learned = len(densities) + sum(dense) - BLOCKS * STEPS
    assert (len(densities) > learned, learned > 0) == (True, correction == "auto")
    # Work that was done: the density of every call of PSA, also of those that only measure what is lost, and 1 for
    # every self-attention that the override from before was left with.
    done = sum(densities) + sum(dense)
    assert found["saved"] == pytest.approx(1 - done / (BLOCKS * STEPS), abs=1e-6)
    assert found["dense"] is None
    assert set(found["seconds"]) == set(found["kinds"])


@pytest.mark.parametrize(
    ("changes", "why", "do"),
    [
        ({"min_tokens": 100000}, "fewer than min_tokens 100000", "set min_tokens to"),
        ({"dense_blocks": "0-1"}, "all blocks are listed in dense_blocks", "list fewer"),
        ({"start_percent": 0.97, "end_percent": 0.98}, "between start_percent and end_percent", "lower start_percent"),
        ({"sparsity": 0.97}, "0.97 is out of reach", "move the slider"),
    ],
)
def test_a_run_in_which_all_stayed_dense_says_why_and_what_to_do(told, changes, why, do):
    found = told(**changes)
    reason, advice = found["dense"].split("; ", 1)[0], found["dense"].split("; ", 1)[1]
    assert why in reason
    assert do in advice
    assert found["saved"] == 0


def test_calls_between_dense_steps_say_why_they_stayed_dense(told):
    """PSA's part has no step in it, only what the sampler asks between two."""
    found = told(steps=2, sampler="dpm_2", start_percent=0.1, end_percent=0.3, min_tokens=100000)
    assert found["kinds"] == {"dense": 2}
    assert list(found["reasons"].values()) == [BLOCKS]
    assert "fewer than min_tokens 100000" in found["dense"]


def test_a_run_that_was_broken_off_gives_no_reason(model, tiny_wan, monkeypatch):
    class Stopped(BaseException):
        pass

    def stop(*args, **kwargs):
        raise Stopped

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", stop)
    ended = []
    with pytest.raises(Stopped):
        tiny_wan.sample(patch_model(model, **PATCH, on_end=ended.append), steps=STEPS)
    assert (ended[0]["completed"], ended[0]["dense"]) == (False, None)


def test_a_second_patch_tells_the_first(model, monkeypatch, caplog):
    def patch_for(node, model, **inputs):
        patched = patch_model(model, **PATCH | inputs)
        live.told(model, patched, node)
        return patched

    sent = []
    server = SimpleNamespace(client_id="page", send_sync=lambda event, data, client: sent.append((event, data)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    first = patch_for("5", model)
    with caplog.at_level("INFO"):
        second = patch_for("10", first, sparsity=0.0)
    assert sent == [("psa.replaced", {"node": "5", "by": "10"})]
    assert "PSA Patch #5 is replaced by PSA Patch #10" in caplog.text
    patch_for("5", patch_for("5", model))
    patch_for(None, second)
    assert len(sent) == 1


def test_the_page_gets_back_what_it_queued():
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "a"}},
        "2:5": {"class_type": "PSAPyramid", "inputs": {"full": 0.1, "tail": True, "half": ["7", 0]}},
        "3": {"class_type": "PSAPatch", "inputs": {"model": ["1", 0], "sparsity": 0.85, "psa_pyramid": ["2:5", 0]}},
        "4": {"class_type": "PSAPatch", "inputs": {"model": ["1", 0], "psa_pyramid": ["1", 0]}},
    }
    pyramid = {"full": 0.1, "tail": True, "half": None}
    assert live.asked_of(prompt, "3") == {"model": None, "sparsity": 0.85, "psa_pyramid": pyramid}
    assert live.asked_of(prompt, "4") == {"model": None, "psa_pyramid": None}
    assert live.asked_of(None, "3") == live.asked_of(prompt, "9") == {}
