"""Whether sparse steps were faster than dense ones: what is compared, and the reason if they were not."""

import json
import time

import pytest
import torch

from comfyui_psa.kernels.order import TokenLayout
from comfyui_psa.sampling.figures import summary
from comfyui_psa.sampling.pays import comparable, pays
from comfyui_psa.sampling.record import Record, Step

GPU = torch.device("cuda")
ONE = torch.tensor(0.2)


def step(index, kind, seconds, *, learned=0, attention=None, dense_calls=0):
    made = Step(index, 1.0, 0.0, seconds=seconds, kind=kind, attention=attention, dense_calls=dense_calls)
    made.learned = [(block, ONE) for block in range(learned)]
    made.densities = [(block, ONE) for block in range(4 if kind == "sparse" else 0)]
    return made


def record(*steps, tokens=50_000, backend="triton", tuned=True):
    """A run on a GPU."""
    made = Record()
    made.steps, made.layouts = list(steps), [TokenLayout((1, 1, tokens))]
    made.backend, made.tuned, made.dtype, made.device = backend, tuned, torch.bfloat16, GPU
    return made


def run(dense, sparse, attention=None, **more):
    """A run with a slow first step, a dense step that learns, and a first sparse step that compiles."""
    return record(
        step(0, "dense", 9.0), step(1, "dense", dense), step(2, "dense", 5.0, learned=4), step(3, "skipped", 0.0),
        step(4, "sparse", 20.0, attention=19.0), *(step(i, "sparse", sparse, attention=attention) for i in range(5, 9)),
        **more,
    )  # fmt: skip


def test_steps_that_do_more_are_not_compared():
    found = pays(run(2.0, 1.0))
    assert found == {"dense": 2.0, "sparse": 1.0, "times": 2.0, "why": None}


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [("dense", 2.0, 0)] * 3,
        [("sparse", 2.0, 0)] * 3,
        [("dense", 2.0, 4), ("sparse", 1.0, 0), ("sparse", 1.0, 0)],
        [("dense", 9.0, 0), ("dense", 2.0, 4), ("sparse", 1.0, 0), ("sparse", 1.0, 0)],
        [("dense", 9.0, 0), ("dense", 2.0, 0), ("sparse", 1.0, 0)],
    ],
)
def test_a_run_that_cannot_tell_says_nothing(steps):
    made = [step(i, kind, seconds, learned=learned) for i, (kind, seconds, learned) in enumerate(steps)]
    assert pays(record(*made)) is None


def test_steps_that_renew_a_loss_are_sparse_steps():
    steps = [step(0, "dense", 2.0), step(1, "sparse", 1.0), step(2, "sparse", 1.0, learned=1)]
    assert [one.index for one in comparable(steps, "sparse")] == [2]


def weights_elsewhere(made):
    made.look_for_weights(torch.nn.Linear(2, 2))
    return made


REASONS = {
    "does not fit the GPU": weights_elsewhere(run(1.0, 1.0)),
    "in bfloat16 by plain torch": run(1.0, 1.0, backend="torch"),
    "9000 tokens are so few": run(1.0, 1.0, tokens=9000),
    "takes 81% of a dense step": run(1.0, 0.95, attention=0.14),
    "was not tuned": run(1.0, 0.95, attention=0.6, tuned=False),
    "took about as long": run(1.0, 0.95, attention=0.6),
    "most calls of the sparse steps stayed dense": record(
        step(0, "dense", 1.0), step(1, "dense", 1.0),
        *(step(i, "sparse", 1.0, dense_calls=5) for i in range(2, 5)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", REASONS)
def test_the_reason(words):
    found = pays(REASONS[words])
    assert words in found["why"]
    assert "; " in found["why"], "what to do"


def test_ten_percent_are_enough():
    assert pays(run(1.11, 1.0))["why"] is None
    assert pays(run(1.09, 1.0))["why"] is not None


def test_weights_where_attention_is_computed_are_not_offloaded():
    made = run(1.0, 1.0)
    made.device = torch.device("cpu")
    assert not weights_elsewhere(made).offloaded
    worker = made.for_worker()
    worker.look_for_weights(torch.nn.Linear(2, 2, device="meta"))
    made.take_in(worker)
    assert made.offloaded, "on another GPU, where less fits"


@pytest.mark.parametrize("slow", ["sparse", "dense"])
def test_a_real_run(tiny_wan, monkeypatch, slow):
    """The log, the report and the page say the same; which steps are slow is decided here."""
    from comfyui_psa.patching.patch import KEY, patch_model
    from comfyui_psa.sampling import self_attention

    genuine, ended = self_attention.pyramid_sparse_attention, []

    def attention(*args, **kwargs):
        time.sleep(0.4 if slow == "sparse" else 0)
        return genuine(*args, **kwargs)

    def dense(func, *args, **kwargs):
        time.sleep(0.8 if slow == "dense" else 0)
        return func(*args, **kwargs)

    monkeypatch.setattr(self_attention, "pyramid_sparse_attention", attention)
    model = tiny_wan.load("t2v").clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = dense
    psa = patch_model(
        model, sparsity=0.6, preset="auto", min_tokens=0, start_percent=0.5, end_percent=1.0, on_end=ended.append
    )
    tiny_wan.sample(psa, steps=7)
    report = psa.get_attachment(KEY).report
    found = json.loads(json.dumps(report))["pays"]
    assert found == ended[0]["pays"]
    assert {kind: found[kind] for kind in ("dense", "sparse")} == {
        kind: ended[0]["seconds"][kind] for kind in ("dense", "sparse")
    }
    if slow == "dense":
        assert found["times"] > 1.1
        assert found["why"] is None
        assert f"a sparse step is {found['times']:.1f} times as fast" in summary(report)
    else:
        assert found["times"] < 1
        assert "in float32 by plain torch" in found["why"]
        assert summary(report).endswith(found["why"])
