"""The PSA half of the demo workflow at a size of seconds, for the tests of this folder."""

import itertools

from comfyui_psa.workshop.tools.paths import WORKFLOWS
from comfyui_psa.workshop.tools.workflow import load_workflow

STEPS = 4
_seeds = itertools.count(11)


def small_demo(size=256, length=9, steps=STEPS, film=False):
    """The workflow; each has its own seed, so that nothing comes from the server's cache.

    film: with the decoded video, which takes much longer than to sample it.
    """
    found = load_workflow(WORKFLOWS / "psa_demo.json")
    for node in found["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "EmptyHunyuanLatentVideo":
            values[:3] = [size, size, length]
        if node["type"] == "KSampler":
            values[0], values[2] = next(_seeds), steps
        if node["type"] == "PSAPatch":
            values[values.index(4096)] = 0
    dense = [n["id"] for n in found["nodes"] if n.get("title") == "KSampler: dense" or n["type"] == "PSACompare"]
    if film:
        return _without(found, dense)
    films = [n["id"] for n in found["nodes"] if n["type"] == "VAEDecode"]
    kept = {n["id"] for n in found["nodes"] if n["type"] == "PSAReport"}  # it takes the video where there is one
    found["links"] = [link for link in found["links"] if not (link[1] in films and link[3] in kept)]
    return _without(found, [*dense, *films])


def _without(workflow, nodes):
    """Drop nodes and everything that they feed."""
    gone = set(nodes)
    while True:
        fed = {link[3] for link in workflow["links"] if link[1] in gone} - gone
        if not fed:
            break
        gone |= fed
    workflow["nodes"] = [node for node in workflow["nodes"] if node["id"] not in gone]
    workflow["links"] = [link for link in workflow["links"] if link[1] not in gone and link[3] not in gone]
    ids = {link[0] for link in workflow["links"]}
    for node in workflow["nodes"]:
        for slot in node["inputs"]:
            slot["link"] = slot["link"] if slot["link"] in ids else None
        for slot in node["outputs"]:
            slot["links"] = [link for link in slot["links"] if link in ids]
    return workflow
