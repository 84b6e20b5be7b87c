"""An override that is copied or sent to another process goes without its run."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import torch

from comfyui_psa.patching import core
from comfyui_psa.patching.override import RUN_KEY, PSAOverride
from comfyui_psa.patching.patch import patch_model

from .patched import PATCH


def test_the_override_travels_without_its_run(model, sample):
    psa = patch_model(model, **PATCH | {"reuse_steps": 2})
    wrappers = {kind: dict(keys) for kind, keys in psa.wrappers.items()}
    travelled = pickle.loads(pickle.dumps((psa.model_options["transformer_options"], wrappers)))
    there = model.clone()
    there.model_options["transformer_options"], there.wrappers = travelled
    assert isinstance(core.get_override(there), PSAOverride)
    assert torch.equal(sample(there, steps=4), sample(psa, steps=4))

    options = []
    watched = psa.clone()
    core.add_wrappers(watched, "psa_test", before_call=lambda network, x, context, given, conds: options.append(given))
    sample(watched, steps=2)
    assert pickle.loads(pickle.dumps(options[-1][RUN_KEY])) is None
    assert copy.deepcopy(options[-1][RUN_KEY]) is options[-1][RUN_KEY]


def test_an_override_in_another_process(tmp_path):
    """A process that knows nothing of this one, but has the pack, as ComfyUI's workers have."""
    (tmp_path / "override").write_bytes(pickle.dumps(PSAOverride(PSAOverride(None))))
    script = f"""
import pickle, runpy, torch
runpy.run_path({str(Path(__file__).parents[1] / "conftest.py")!r})
override = pickle.loads(open({str(tmp_path / "override")!r}, "rb").read())
q = torch.randn(1, 64, 128)
print(torch.equal(override(lambda q, k, v, heads, **_: q + heads, q, q, q, 2, transformer_options={{}}), q + 2))
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "True"
