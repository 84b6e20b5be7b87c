"""The first call of a kind on a machine is checked, and a broken kernel ends there; in the interpreter or on a GPU."""

import json

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig, TokenLayout, pyramid_sparse_attention
from comfyui_psa.kernels.broken import KernelError
from comfyui_psa.kernels.delta import measure_delta

pytest.importorskip("triton")

from comfyui_psa.kernels.gpu import backend, self_check
from comfyui_psa.kernels.gpu.tiles import AttendTile

from . import broken_kernels

LAYOUT = TokenLayout((2, 5, 9), before=3)
CONFIG = PyramidConfig(mode="topk", sparsity=0.5, block_q=32, block_kv=32, order="curve")
TILE = AttendTile(32, 4, 1)


@pytest.fixture
def machine(triton_device, monkeypatch, tmp_path):
    """A machine that has checked nothing yet; `checks` holds what each check found, `files()` what is kept."""

    class Machine:
        device, checks, rankings = triton_device, [], []

        @staticmethod
        def files():
            return list(tmp_path.rglob(self_check.FILE))

        @staticmethod
        def restart():
            self_check.trust.cache_clear()

    def what_differs(*call):
        Machine.checks.append(genuine(*call))
        return Machine.checks[-1]

    def what_misranks(ranked):
        Machine.rankings.append(genuine_ranking(ranked))
        return Machine.rankings[-1]

    genuine, genuine_ranking = self_check.what_differs, self_check.what_misranks
    monkeypatch.setattr(self_check, "what_differs", what_differs)
    monkeypatch.setattr(self_check, "what_misranks", what_misranks)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    Machine.restart()
    yield Machine
    Machine.restart()


@pytest.fixture
def call(machine, random_tensor):
    """call(**more): a sparse call of the Triton backend."""
    dtype = torch.float32 if machine.device == "cpu" else torch.float16
    q, k, v = (random_tensor(1, 2, LAYOUT.length, 16, seed=seed).to(machine.device, dtype) for seed in (1, 2, 3))

    def run(config=CONFIG, bad=0.0, **more):
        return pyramid_sparse_attention(q, k, v + bad, config, layout=LAYOUT, backend="triton", **more)

    return run


def test_the_first_call_of_a_kind_is_checked_and_no_other_one(machine, call):
    first = call()
    call()
    assert machine.checks == machine.rankings == [None]
    machine.restart()
    call()
    assert machine.checks == machine.rankings == [None], "kept for the next process"
    (file,) = machine.files()
    assert json.loads(file.read_text()) == {"differs": None}
    video = first.output[:, :, LAYOUT.before :]
    delta = measure_delta(video * 1.1, video, first.query_order, 1)
    call(lists=first.lists.packed())
    call(lists=first.lists.packed(), delta=delta)
    assert machine.checks == [None] * 3, "other kernels"
    assert machine.rankings == [None], "these have chosen nothing"
    call(lists=first.lists.packed(), delta=delta)
    assert len(machine.checks) == 3


@pytest.fixture
def look(machine, monkeypatch):
    """look(): what the next process does about a call that is right."""
    monkeypatch.setattr(self_check, "what_differs", lambda *_: machine.checks.append(None))
    kind = self_check.Kind.of(torch.zeros(1, 2, 90, 16), CONFIG, (None, None), None, None, None, TILE)

    def look():
        machine.restart()
        for _ in range(2):
            trust = self_check.trust(torch.device(machine.device), kind)
            if not trust.checked:
                trust.check(None, None)

    return look


@pytest.mark.parametrize("change", ["GPU", "driver", "triton", "torch", "kernels"])
def test_a_machine_that_has_changed_checks_again(machine, look, monkeypatch, change):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A")
    monkeypatch.setattr(self_check, "_driver", lambda: "570.1")
    machine.device = "cuda"
    look()
    look()
    assert machine.checks == [None]
    if change == "GPU":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "B")
    elif change == "driver":
        monkeypatch.setattr(self_check, "_driver", lambda: "570.2")
    elif change == "kernels":
        monkeypatch.setattr(self_check, "source_of", lambda: "0")
    else:
        monkeypatch.setattr(getattr(self_check, change), "__version__", "0.0.1")
    look()
    assert machine.checks == [None, None]


FAULTS = [
    ("attend_triton", broken_kernels.louder),
    ("build_pyramid_triton", broken_kernels.flat_pyramid),
    ("choose_lists_triton", broken_kernels.doubled_lists),
    ("attend_triton", broken_kernels.no_text),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_kernel_is_refused_here_and_in_the_next_process(machine, call, monkeypatch, name, fault):
    calls = []
    monkeypatch.setattr(backend, name, lambda *a, **k: calls.append(1) or fault(*a, **k))
    for _ in range(2):
        with pytest.raises(KernelError, match=r"compute wrong results on .*: .*; update"):
            call()
        machine.restart()
    assert len(calls) == 1, "what is known to be wrong is not tried"
    assert [found for found in machine.checks + machine.rankings if found] == [
        json.loads(machine.files()[0].read_text())["differs"]
    ]


MISRANKED = {
    "pool_triton": ("means", [broken_kernels.unordered_means, broken_kernels.forgotten_block]),
    "reduced_softmax_triton": (
        "scores",
        [broken_kernels.upside_down, broken_kernels.flat, broken_kernels.one_wrong_score],
    ),
    "choose_lists_triton": (
        "levels",
        [
            broken_kernels.doubled_lists,
            broken_kernels.least_important,
            broken_kernels.swapped,
            broken_kernels.too_many,
            broken_kernels.one_head_with_more,
            broken_kernels.wrong_density,
            broken_kernels.wrong_best,
        ],
    ),
}
MODES = {
    "topk": {"mode": "topk", "sparsity": 0.6},
    "threshold": {"mode": "threshold", "sparsity": None, "shares": {1: 0.3, 2: 0.2, 8: 0.2}},
    "budget": {"mode": "budget", "sparsity": 0.6},
}
IN_ALL_MODES = (broken_kernels.swapped, broken_kernels.too_many, broken_kernels.one_head_with_more)
LONG = TokenLayout((4, 8, 12), before=3)


@pytest.fixture
def rank(machine, random_tensor, monkeypatch):
    """rank(config, change): a call of two heads with 12 blocks of keys, without the attention itself."""
    dtype = torch.float32 if machine.device == "cpu" else torch.float16
    q, k, v = (random_tensor(1, 2, LONG.length, 16, seed=seed).to(machine.device, dtype) for seed in (1, 2, 3))
    monkeypatch.setattr(backend, "_attend", lambda *_: None)
    monkeypatch.setattr(self_check, "what_differs", lambda *_: None)

    def run(change=lambda q: q, **settings):
        config = PyramidConfig(**{"block_q": 32, "block_kv": 32, "order": "curve"} | settings)
        return pyramid_sparse_attention(change(2 * q), k, v, config, layout=LONG, backend="triton")

    return run


@pytest.mark.parametrize(
    ("name", "part", "fault", "mode"),
    [
        (name, part, fault, mode)
        for name, (part, faults) in MISRANKED.items()
        for fault in faults
        for mode in (MODES if fault in IN_ALL_MODES else ["topk"])
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_broken_ranking_is_refused(machine, rank, monkeypatch, name, part, fault, mode):
    """Exact attention over the levels that were chosen would show nothing."""
    monkeypatch.setattr(backend, name, fault)
    for _ in range(2):
        with pytest.raises(KernelError, match=rf"the {part} of head \d are wrong; update"):
            rank(**MODES[mode])
        machine.restart()
    assert len(machine.rankings) == 1, "what is known to be wrong is not tried"


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "topk", "importance": "means"}, {"mode": "budget", "importance": "sampled"},
        {"mode": "topk", "order": "semantic", "clusters": (3, 4)}, {**MODES["threshold"], "reduction": "mean"},
        {"mode": "budget", "similarity_cap": {2: 0.2}}, {"mode": "budget", "tail": False},
        {"mode": "topk", "shares": {1: 0.2, 32: 0.3}}, {"mode": "topk", "block_q": 128, "block_kv": 64},
        {**MODES["budget"], "sparsity": 0.9},
    ],
    ids=str,
)  # fmt: skip
def test_a_right_ranking_passes(machine, rank, settings):
    rank(**{"sparsity": 0.6} | settings)
    assert machine.rankings == [None]


ODD = {
    "equal scores": torch.zeros_like,
    "one query is not finite": lambda q: q.index_fill(2, torch.tensor([40], device=q.device), float("nan")),
    "very peaky": lambda q: 30 * q,
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
@pytest.mark.parametrize("mode", MODES)
def test_odd_scores_raise_no_false_alarm(machine, rank, mode, change):
    rank(change, **MODES[mode])
    assert machine.rankings == [None]


EXTREME = {
    "logits that overflow": lambda q, k, v: (q * 1e30, k * 1e37, v),
    "keys whose sums overflow": lambda q, k, v: (q * 1e-38, k.sign() * 3e38, v),
}


@pytest.mark.parametrize("change", EXTREME.values(), ids=EXTREME)
def test_extreme_numbers_raise_no_false_alarm(machine, random_tensor, change):
    dtype = torch.float32 if machine.device == "cpu" else torch.bfloat16  # alike in their range
    random = (random_tensor(1, 2, LAYOUT.length, 16, seed=seed).to(machine.device, dtype) for seed in (1, 2, 3))
    q, k, v = change(*random)
    pyramid_sparse_attention(q, k, v, CONFIG, layout=LAYOUT, backend="triton")
    assert machine.rankings == [None]
    assert machine.checks in ([None], [""]), "right, or too large to tell"


def test_a_broken_correction_is_refused_and_plain_calls_are_not(machine, call, monkeypatch):
    monkeypatch.setattr(backend, "attend_triton", broken_kernels.no_correction)
    first = call()
    video = first.output[:, :, LAYOUT.before :]
    delta = measure_delta(video * 1.5, video, first.query_order, 1)
    with pytest.raises(KernelError):
        call(delta=delta, lists=first.lists)
    call(lists=first.lists)


def test_a_cache_that_cannot_be_written_costs_one_check_in_a_process(machine, look, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "folder"))
    look()
    assert machine.checks == [None]
    assert not machine.files()
    look()
    assert machine.checks == [None, None]


@pytest.mark.parametrize("content", ["", "not json", "[1]", "null", "{}", '{"differs": 3}', '{"differs": tru'])
def test_a_file_that_makes_no_sense_is_written_again(machine, look, content):
    look()
    (file,) = machine.files()
    file.write_text(content)
    look()
    look()
    assert machine.checks == [None, None]
    assert json.loads(file.read_text()) == {"differs": None}


def test_what_runs_other_code_is_another_kind(machine):
    """What only changes numbers is not: the slider, the length, the seed."""
    q = torch.zeros(1, 2, 90, 16)

    def kind(q=q, config=CONFIG, orders=(None, None), extra=None, **change):
        settings = {**{name: getattr(config, name) for name in config.__dataclass_fields__}, **change}
        return self_check.Kind.of(q, PyramidConfig(**settings), orders, None, extra, None, TILE)

    assert kind() == kind(sparsity=0.7) == kind(seed=3) == kind(q=torch.zeros(2, 5, 70, 16))
    others = [
        kind(q=q.half()), kind(q=q[..., :8]), kind(block_q=64), kind(block_kv=64), kind(precision="int8"),
        kind(mode="budget"), kind(shares={1: 0.5}), kind(importance="sampled"), kind(reduction="mean"),
        kind(similarity_cap={2: 0.5}), kind(orders=(torch.arange(3), None)), kind(extra=q),
    ]  # fmt: skip
    assert len({kind(), *others}) == 1 + len(others)


def test_asking_the_driver_never_fails():
    assert self_check._driver()


def test_a_call_that_says_nothing_is_no_verdict_for_later_processes(machine, call):
    """With nothing but NaN in the values every kernel is as right as any other."""
    nothing = call(bad=float("nan"))
    assert nothing.output.isnan().any()
    assert machine.checks == [""]
    assert machine.files() == []
    call()
    assert machine.checks == [""], "once in a process"
    machine.restart()
    call()
    assert machine.checks == ["", None]
    assert len(machine.files()) == 1


def test_rules_outside_of_the_kernels_are_a_reason_to_check_again(monkeypatch, tmp_path):
    from comfyui_psa.kernels.gpu import cache

    (tmp_path / "gpu").mkdir()
    for name in ("gpu/cache.py", "levels.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "gpu" / "cache.py"))
    before = cache.source_of()
    (tmp_path / "levels.py").write_text("2")
    assert cache.source_of() != before
