"""A model with PSA: the inputs that most tests give PSA Patch, and what the report of its latest run says."""

from comfyui_psa.patching.patch import KEY

PATCH = {"sparsity": 0.6, "preset": "auto", "mode": "topk", "min_tokens": 0, "start_percent": 0.25, "end_percent": 1.0}
PLAIN = PATCH | {"correction": "off"}
SPARSE = PATCH | {"sparsity": 0.5, "start_percent": 0.0}
"""In every step."""
FULL = PATCH | {"sparsity": 0.01, "pyramid": "1: 1.0", "start_percent": 0.0}
"""In every step, with everything in full: as dense."""


def report(model):
    """The report of the latest run."""
    return model.get_attachment(KEY).report


def by_step(model, name):
    """One entry of every step in the report."""
    return [step[name] for step in report(model)["steps"]]


def sparse_calls(model):
    """How many calls of every step were sparse."""
    return by_step(model, "sparse_calls")


def kinds(model):
    """What every step was: dense, sparse, skipped, unseen or interrupted."""
    return by_step(model, "kind")


def calls(model):
    """What the report counts: (sparse, dense) calls of every step, reasons and notes."""
    steps = list(zip(by_step(model, "sparse_calls"), by_step(model, "dense_calls"), strict=True))
    return steps, report(model)["fallbacks"], report(model)["notes"]


def reports_nothing(model):
    """Whether nothing stayed dense unasked and nothing is to be noted."""
    return report(model)["fallbacks"] == report(model)["notes"] == []


def layouts(kernel_calls):
    """Where the tokens of the sparse calls lay: (before, grid, after)."""
    found = (call.given["layout"] for call in kernel_calls)
    return {(layout.before, layout.grid, layout.after) for layout in found}


def distance(out, expected):
    """Relative distance of two tensors."""
    out, expected = out.float().cpu(), expected.float().cpu()
    return float((out - expected).norm() / expected.norm())
