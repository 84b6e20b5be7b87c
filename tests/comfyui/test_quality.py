"""`python dev.py quality --workflow` on a real server, with the demo's workflow at 5 frames of 256 x 256."""

import json
import math

import pytest

from comfyui_psa.workshop.quality.results import read_runs
from comfyui_psa.workshop.quality.workflow import measure_workflow, to_measured
from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.terminal import Failure
from comfyui_psa.workshop.tools.workflow import load_workflow


@pytest.mark.slow(seconds=30)
def test_a_workflow_is_measured(client, tmp_path):
    workflow = load_workflow(WORKFLOWS / "psa_demo.json")
    for node in workflow["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "EmptyHunyuanLatentVideo":
            values[:3] = [256, 256, 5]
        if node["type"] == "KSampler":
            values[2] = 4
        if node["type"] == "PSAPatch":
            values[values.index(4096)] = 0
    file = tmp_path / "small.json"
    file.write_text(json.dumps(workflow), encoding="utf-8")
    full = {"name": "full", "sparsity": 0.0}
    lean, half = {"name": "lean", "sparsity": 0.9}, {"name": "half", "sparsity": 0.5}
    told = measure_workflow(client, file, [full, half, lean], 1, tmp_path / "out", print)
    rows = {row.setting: row for row in read_runs(tmp_path / "out")}
    assert list(rows) == ["dense", "full", "half", "lean"] == [row.setting for row in told]
    assert math.isinf(rows["full"].psnr)
    assert rows["full"].compute == 1
    assert rows["half"].psnr > rows["lean"].psnr + 1
    # Two of four steps are dense; few blocks at this size, so the slider is met coarsely.
    assert rows["half"].compute == pytest.approx(0.5 + 0.5 * 0.5, abs=0.04)
    assert rows["lean"].compute == pytest.approx(0.5 + 0.5 * 0.1, abs=0.07)
    assert rows["lean"].steps == 4
    assert rows["lean"].run_s > 0
    assert rows["lean"].warm_up == 0.5


def test_a_workflow_without_psa_patch_is_refused():
    with pytest.raises(Failure, match="no PSA Patch"):
        to_measured({"1": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0]}}})
