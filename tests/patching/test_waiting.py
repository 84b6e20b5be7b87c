"""No sparse call waits for the device. A thread that waits in the middle of a model call launches the rest too late: on
several GPUs, where ComfyUI copies the other prompt's output to the first one, only after that GPU's step."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_psa.patching.override import PSAOverride
from comfyui_psa.patching.patch import KEY, patch_model

READ = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")


class Waiting(TorchDispatchMode):
    """The operators inside it that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        # A list of numbers becomes a tensor of the device; single numbers are arguments of kernels.
        if name.startswith(READ) or (name.startswith("aten.lift_fresh") and args[0].ndim):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("order", "correction"), [("curve", "full"), ("raster", "off")])
def test_no_sparse_call_waits_for_the_device(tiny_wan, monkeypatch, order, correction):
    seen, act = {}, PSAOverride._act

    def watched(self, run, *args, **kwargs):
        if run.learns:
            return act(self, run, *args, **kwargs)
        with Waiting() as waiting:
            output = act(self, run, *args, **kwargs)
        seen.setdefault(run.position.step, []).extend(waiting.found)
        return output

    monkeypatch.setattr(PSAOverride, "_act", watched)
    psa = patch_model(
        tiny_wan.load("t2v"), sparsity=0.6, preset="auto", mode="topk", min_tokens=0, start_percent=0.25,
        end_percent=1.0, order=order, correction=correction,
    )  # fmt: skip
    tiny_wan.sample(psa, steps=6)
    assert psa.get_attachment(KEY).maps is not None, "the last sparse step is pictured"
    steps = sorted(seen)
    assert len(steps) >= 4
    assert not [found for step in steps[1:] for found in seen[step]]  # the first one may set up what is kept
