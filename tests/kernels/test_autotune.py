"""The search for a tile: what it chooses, what it keeps, and that nothing about it can break a call."""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from comfyui_psa.kernels import PyramidConfig
from comfyui_psa.kernels.attend import attend_streaming
from comfyui_psa.kernels.gpu.tiles import AttendTile, attend_tile

pytest.importorskip("triton")

from comfyui_psa.kernels.gpu import autotune, cache

CASE = autotune.Case(dim=128, block_q=128, block_kv=64, dtype=torch.bfloat16, int8=False)
CUDA = torch.device("cuda", 0)
TILES = [AttendTile(rows, 4, stages) for rows, stages in itertools.product((32, 64, 128), (1, 2))]
GPUS = {"sm80": 166_912, "sm86": 101_376, "sm89": 101_376, "sm90": 232_448, "sm100": 232_448, "sm120": 101_376}


@pytest.fixture
def other_gpu(monkeypatch, tmp_path):
    """A GPU that nobody has measured, with its searches counted: `searched` holds their cases."""
    searched = []

    def tune(device, case):
        searched.append(case)
        return TILES[3]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(autotune.SWITCH, raising=False)
    monkeypatch.setattr(autotune, "gpu_of", lambda _: "sm86")
    monkeypatch.setattr(autotune, "tune", tune)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    autotune._tuned.cache_clear()
    yield SimpleNamespace(searched=searched, files=lambda: list(tmp_path.rglob(autotune.FILE)))
    autotune._tuned.cache_clear()


@pytest.mark.parametrize("place", range(len(TILES)))
def test_the_fastest_is_taken(place):
    assert autotune.fastest(TILES, lambda tile: 1.0 if tile == TILES[place] else 2.0) == (TILES[place], 1.0)


def test_among_equals_the_first_is_taken():
    assert autotune.fastest(TILES, lambda tile: 1.0) == (TILES[0], 1.0)


def test_tiles_that_fail_are_skipped():
    def time_of(tile):
        if tile.stages == 1:
            raise RuntimeError("out of resources: shared memory")
        return float(tile.rows)

    assert autotune.fastest(TILES, time_of) == (AttendTile(32, 4, 2), 32.0)
    assert autotune.fastest([tile for tile in TILES if tile.stages == 1], time_of) is None


def test_no_tile_begins_that_would_end_too_late():
    """With tiles of 5 s and 16 s in all, the fourth would end after 20."""
    now, tried = [0.0], []

    def time_of(tile):
        tried.append(tile)
        now[0] += 5.0
        return -float(len(tried))

    assert autotune.fastest(TILES, time_of, 16.0, lambda: now[0]) == (TILES[2], -3.0)
    assert tried == TILES[:3]


def test_slow_failures_do_not_end_the_search_before_anything_was_measured():
    now = [0.0]

    def time_of(tile):
        now[0] += 30.0
        if tile != TILES[2]:
            raise RuntimeError
        return 1.0

    assert autotune.fastest(TILES, time_of, 16.0, lambda: now[0]) == (TILES[2], 1.0)


@pytest.mark.parametrize("int8", [False, True], ids=["16 bit", "int8"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("gpu", GPUS)
def test_candidates_begin_with_the_built_in_tile_and_fit(gpu, dim, int8):
    case = dataclasses.replace(CASE, dim=dim, int8=int8)
    tiles = autotune.candidates(gpu, case, GPUS[gpu])
    assert tiles[0] == attend_tile(gpu, dim)
    assert len(tiles) == len(set(tiles)) >= 4
    # Keys and values that wait lie in shared memory.
    bytes_of_a_row = dim * (3 if int8 else 4)
    assert all(tile.rows * max(1, tile.stages - 1) * bytes_of_a_row <= GPUS[gpu] for tile in tiles[1:])


@pytest.mark.parametrize("gpu", ["interpreter", "hip", "sm90"])
def test_no_search_where_the_tile_is_known(other_gpu, monkeypatch, gpu):
    monkeypatch.setattr(autotune, "gpu_of", lambda _: gpu)
    assert autotune.choose_tile(CUDA, CASE) == attend_tile(gpu, 128)
    assert not other_gpu.searched


def test_the_switch_and_a_stream_that_records_a_graph_leave_the_built_in_tile(other_gpu, monkeypatch):
    monkeypatch.setenv(autotune.SWITCH, "0")
    assert autotune.choose_tile(CUDA, CASE) == attend_tile("sm86", 128)
    monkeypatch.delenv(autotune.SWITCH)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert autotune.choose_tile(CUDA, CASE) == attend_tile("sm86", 128)
    assert not other_gpu.searched
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert autotune.choose_tile(CUDA, CASE) == TILES[3]


def test_one_search_for_a_kind_of_call_in_this_process_and_in_the_next(other_gpu):
    cases = [CASE, *(dataclasses.replace(CASE, **change) for change in CHANGES)]
    for _ in range(2):
        assert [autotune.choose_tile(CUDA, case) for case in cases] == [TILES[3]] * len(cases)
    assert other_gpu.searched == cases
    assert len(other_gpu.files()) == len(cases)
    autotune._tuned.cache_clear()  # as in a new process
    assert autotune.choose_tile(CUDA, CASE) == TILES[3]
    assert other_gpu.searched == cases


CHANGES = [{"dim": 64}, {"block_q": 64}, {"block_kv": 128}, {"dtype": torch.float16}, {"int8": True}]


def test_the_key_holds_all_that_a_tile_depends_on(monkeypatch):
    triton = pytest.importorskip("triton")
    keys = [autotune.cache_key("A", CASE), autotune.cache_key("B", CASE)]
    keys += [autotune.cache_key("A", dataclasses.replace(CASE, **change)) for change in CHANGES]
    monkeypatch.setattr(triton, "__version__", "0.0.1")
    keys.append(autotune.cache_key("A", CASE))
    assert len(set(keys)) == len(keys)


def entry(**changes):
    return json.dumps({**dataclasses.asdict(TILES[0]), **changes})


@pytest.mark.parametrize(
    "content",
    [
        "", "not json", "[1]", "null", "3", '{"rows": 64}', '{"rows": 64, "warps": 4, "sta', "[" * 50_000, "\x00" * 64,
        b"\xff\xfe\x80", entry(rows="64"), entry(rows=-1), entry(stages=0), entry(warps=4.0), entry(rows=True),
        entry(bulk="no"), entry(halves=None), entry(colour=1),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_written_again(other_gpu, content):
    assert autotune.choose_tile(CUDA, CASE) == TILES[3]
    (file,) = other_gpu.files()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    autotune._tuned.cache_clear()  # as in a new process
    assert autotune.choose_tile(CUDA, CASE) == TILES[3]
    assert other_gpu.searched == [CASE, CASE]
    assert autotune.read_tile(autotune.cache_key("Some GPU", CASE)) == TILES[3]
    assert [path.name for path in file.parent.iterdir()] == [autotune.FILE]


@pytest.mark.parametrize("where", ["inside a file", "a name that is too long", "a home that is a file"])
def test_a_folder_that_cannot_be_made_costs_only_the_next_search(other_gpu, monkeypatch, tmp_path, where):
    blocked = tmp_path / "file"
    blocked.write_text("")
    if where == "a home that is a file":
        # Not HOME: Triton reads that once, when it is imported.
        monkeypatch.delenv("TRITON_CACHE_DIR")
        monkeypatch.setenv("TRITON_HOME", str(blocked))
    else:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(blocked / "folder" if where == "inside a file" else "x" * 300))
    assert [autotune.choose_tile(CUDA, CASE) for _ in range(2)] == [TILES[3]] * 2
    assert other_gpu.searched == [CASE]
    assert not other_gpu.files()


def test_a_cache_manager_of_the_users_own_may_fail(other_gpu, monkeypatch):
    class Unreachable:
        def __init__(self, key):
            pass

        def get_file(self, filename):
            raise TimeoutError("the cache does not answer")

        put = get_file

    monkeypatch.setattr(cache, "get_cache_manager", Unreachable)
    assert [autotune.choose_tile(CUDA, CASE) for _ in range(2)] == [TILES[3]] * 2
    assert other_gpu.searched == [CASE]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="nothing is read-only to this user")
def test_a_read_only_folder(other_gpu, monkeypatch, tmp_path):
    tmp_path.chmod(0o500)
    assert autotune.choose_tile(CUDA, CASE) == TILES[3]
    tmp_path.chmod(0o700)
    assert not other_gpu.files()


def test_a_search_without_a_result_leaves_the_built_in_tile_and_no_file(other_gpu, monkeypatch):
    """The call then fails as it would have without a search."""
    monkeypatch.setattr(autotune, "tune", lambda *_: None)
    assert autotune.choose_tile(CUDA, CASE) == attend_tile("sm86", 128)
    assert not other_gpu.files()


def test_a_search_that_cannot_begin_says_so_once_and_raises_nothing(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")

    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(autotune, "_problem", no_memory)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    with caplog.at_level("INFO", logger="ComfyUI-PSA"):
        assert autotune.tune(CUDA, CASE) is None
    assert [record.getMessage() for record in caplog.records] == [
        "PSA tunes its attention kernel for Some GPU, heads of 128, bfloat16: up to 20 s, once per GPU",
        "PSA could not tune its attention kernel: no memory left",
    ]


@pytest.mark.parametrize(
    ("sixteen", "eight", "times"), [(2.0, 1.0, "2.00"), (1.06, 1.0, "1.06"), (1.0, 1.0, None), (1.0, 2.0, None)]
)
def test_int8_that_is_measured_faster_is_said_with_the_figure(monkeypatch, caplog, sixteen, eight, times):
    """And it changes nothing: the tile is that of 16 bits."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(autotune, "gpu_of", lambda _: "sm86")
    monkeypatch.setattr(autotune, "_shared_memory", lambda _: GPUS["sm86"])
    monkeypatch.setattr(autotune, "_problem", lambda _, case: case)
    monkeypatch.setattr(autotune, "_milliseconds", lambda case, tile: eight if case.int8 else sixteen)
    with caplog.at_level("INFO", logger="ComfyUI-PSA"):
        assert autotune.tune(CUDA, CASE) == attend_tile("sm86", 128)
        assert autotune.tune(CUDA, dataclasses.replace(CASE, int8=True)) == attend_tile("sm86", 128)
    said = [record.getMessage() for record in caplog.records if "int8 keys (" in record.getMessage()]
    if times is None:
        assert said == []
    else:
        assert said == [
            f"PSA: on Some GPU the attention kernel is {times} times as fast with int8 keys ({eight:.2f} instead of "
            f"{sixteen:.2f} ms); precision auto stays at 16 bits, set precision to int8 to try it"
        ]


def test_int8_that_cannot_be_measured_costs_nothing(monkeypatch):
    def problem(_, case):
        if case.int8:
            raise torch.OutOfMemoryError("no memory left")
        return case

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(autotune, "gpu_of", lambda _: "sm86")
    monkeypatch.setattr(autotune, "_shared_memory", lambda _: GPUS["sm86"])
    monkeypatch.setattr(autotune, "_problem", problem)
    monkeypatch.setattr(autotune, "_milliseconds", lambda *_: 1.0)
    assert autotune.tune(CUDA, CASE) == attend_tile("sm86", 128)


@pytest.mark.parametrize(("dim", "int8", "expected"), [(80, False, 128), (16, False, 16), (8, True, 32)])
def test_the_kind_of_a_call(dim, int8, expected):
    q = torch.zeros(1, 2, 200, dim, dtype=torch.float16)
    config = PyramidConfig(block_q=32, block_kv=64, precision="int8" if int8 else "auto")
    assert autotune.Case.of(q, config) == autotune.Case(expected, 32, 64, torch.float16, int8)


def test_the_problem_has_the_density_of_the_presets(monkeypatch):
    lists = autotune._lists(torch.Generator().manual_seed(0), CASE, torch.device("cpu"))
    assert lists.levels == (1, 2, 8)
    assert float(lists.density.mean()) == pytest.approx(0.15, abs=0.003)


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True], ids=["16 bit", "int8"])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_real_search(triton_device, monkeypatch, tmp_path, dim, int8):
    """The tile that it finds computes what the reference does."""
    if triton_device == "cpu":
        pytest.skip("needs a GPU")
    from comfyui_psa.kernels.gpu.attend import attend_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = dataclasses.replace(CASE, dim=dim, int8=int8)
    before = torch.cuda.get_rng_state()
    tile = autotune.tune(CUDA, case)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert tile is not None
    monkeypatch.setattr(autotune, "_TOKENS", 1000)
    generator = torch.Generator(CUDA).manual_seed(1)
    q, k, v = (torch.randn(1, 4, 1000, dim, device=CUDA, generator=generator).bfloat16() for _ in range(3))
    lists = autotune._lists(generator, case, CUDA)
    out = torch.empty_like(q)
    attend_triton(q, autotune._pyramid(k, v, case), lists, 128, dim**-0.5, None, None, out, tile=tile)
    expected = attend_streaming(
        q, autotune._pyramid(k, v, dataclasses.replace(case, int8=False)), lists.factors(), 128, dim**-0.5
    )
    tolerance = 6e-2 if int8 else 3e-2
    torch.testing.assert_close(out.float(), expected.float(), atol=tolerance, rtol=tolerance)
