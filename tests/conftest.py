"""Loads the pack the way ComfyUI does: from its `__init__.py`, under its own name, with the root never on sys.path."""

import dataclasses
import functools
import importlib
import os
import runpy
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Before torch is imported. Servers and other processes that tests start inherit all of it.
if IS_WORKER:  # as many workers as cores, so each of them computes on one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# What would otherwise be written into the user's home.
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".dev" / "cache" / "triton"))
os.environ.setdefault("MPLCONFIGDIR", str(ROOT / ".dev" / "cache" / "matplotlib"))

pack = runpy.run_path(str(ROOT / "workshop" / "pack.py"))
pack["load_pack"]()
pack["load_package"]("workshop", ROOT / "workshop")

from workshop.tools.comfyui_source import version_of  # noqa: E402
from workshop.tools.paths import chosen_comfyui, comfyui_folder  # noqa: E402


def pytest_configure():
    """A core that was asked for is tested or refused, never silently replaced or skipped."""
    chosen = chosen_comfyui()
    if chosen is not None and not (chosen / "main.py").is_file():
        raise pytest.UsageError(f"COMFYUI_PATH: there is no ComfyUI in {chosen}: main.py is missing.")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`-n auto`, which `dev.py test` asks for: a worker per core; none for a single file or where tests share a GPU.

    With a worker more, tests took 1.5 times as long and all of them no less: what they start fills the cores."""
    import torch

    files = {argument.split("::")[0] for argument in config.args}
    is_one_file = len(files) == 1 and files.pop().endswith(".py")
    if is_one_file or config.option.capture == "no" or torch.cuda.is_available():
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_collection_modifyitems(items):
    """In a worker the files with the most to do come first, so that none of them is left over at the end.

    The tests of a file stay together: they share a server, and some a model.
    """
    if not IS_WORKER:
        return
    seconds = Counter()
    for item in items:
        seconds[item.path] -= sum(mark.kwargs.get("seconds", 10) for mark in item.iter_markers("slow"))
    items.sort(key=lambda item: seconds[item.path])


def pytest_runtest_setup(item):
    """Tests of a GPU are skipped where there is none, and where ComfyUI samples on the CPU."""
    mark = item.get_closest_marker("gpu")
    if mark is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if mark.kwargs.get("comfyui") and os.environ.get("PSA_TEST_DEVICE") != "cuda":
        pytest.skip("needs PSA_TEST_DEVICE=cuda, which has ComfyUI sample on the GPU")


def pytest_report_header():
    """Which core is tested."""
    folder = comfyui_folder()
    return f"ComfyUI {version_of(folder)} in {folder}" if folder.is_dir() else f"no ComfyUI in {folder}"


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter, where the tests run in it, without what it computes in vain.

    It replaces the functions of its language when a kernel starts and again, by the same, at every call of one jitted
    function by another, which takes half of the time. Here only where they are not replaced yet. And it looks at every
    sum and product of integers for overflows, which takes a third, and forgets what it found unless it debugs. And it
    writes down all types of numpy to look up one.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    languages, numpy_type = (interpreter.tl, interpreter.tl.core), interpreter._get_np_dtype

    @functools.cache
    def used(function):
        return [value for value in function.__globals__.values() if any(value is known for known in languages)]

    def call(function, *args, **kwargs):
        if any(language.range.__module__ != interpreter.__name__ for language in used(function.fn)):
            interpreter._patch_lang(function.fn)
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    of_scalar = functools.cache(numpy_type)

    def numpy_type_of(dtype):
        return numpy_type(dtype) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)

    interpreter._get_np_dtype = numpy_type_of
    builder = interpreter.interpreter_builder
    if hasattr(builder.options, "sanitize_overflow") and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory):
    """start_ranks(count): that many processes that compute together, see `ranks.py` next to this file."""
    import torch

    from .ranks import Ranks

    ranks, threads = Ranks(tmp_path_factory.mktemp("ranks")), torch.get_num_threads()
    torch.set_num_threads(1)  # as in each of them, so that sums are the same to the last bit
    yield lambda count: SimpleNamespace(run=functools.partial(ranks.run, count))
    ranks.stop()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny():
    """The module `tiny_cogvideox.py` next to this file: tiny random models, made and sampled by diffusers."""
    return importlib.import_module(".tiny_cogvideox", __package__)


@pytest.fixture(scope="session")
def model_folders(comfyui, tmp_path_factory):
    """Empty model folders instead of ComfyUI's, by category; in this process only."""
    import folder_paths

    root = tmp_path_factory.mktemp("models")
    for category in ("diffusers", "diffusion_models", "loras"):
        (root / category).mkdir()
        extensions = folder_paths.folder_names_and_paths[category][1]
        folder_paths.folder_names_and_paths[category] = ([str(root / category)], extensions)
    return root


@pytest.fixture(scope="session")
def comfyui():
    """The folder of a real ComfyUI, importable; tests that need it are skipped with the reason where there is none.

    ComfyUI takes one device for the whole process, the CPU unless PSA_TEST_DEVICE=cuda says otherwise.
    """
    folder = comfyui_folder()
    if not (folder / "comfy").is_dir():
        pytest.skip(f"no ComfyUI in {folder}; `python dev.py setup` brings one")
    sys.path.insert(0, str(folder))
    on_cpu = os.environ.get("PSA_TEST_DEVICE", "cpu") == "cpu"
    sys.argv = [sys.argv[0], "--cpu"] if on_cpu else sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = on_cpu
    comfy.cli_args.args.use_pytorch_cross_attention = True
    return folder


@pytest.fixture(scope="session")
def tiny_wan(comfyui):
    """The module `tiny_wan.py` next to this file: tiny random Wan models of every variant."""
    return importlib.import_module(".tiny_wan", __package__)


@pytest.fixture(scope="session")
def tiny_families(comfyui):
    """The module `tiny_families.py` next to this file: tiny random models of the other video families."""
    return importlib.import_module(".tiny_families", __package__)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real ComfyUI with its own empty base directory, as a user starts it; one for all tests of a run."""
    from comfyui_psa.workshop.tools.server import ComfyServer

    comfyui = comfyui_folder()
    if not (comfyui / "main.py").is_file():
        pytest.skip(f"no ComfyUI in {comfyui}; `python dev.py setup` brings one")
    folder = tmp_path_factory.mktemp("comfyui")
    with ComfyServer(comfyui, home=folder / "home", log=folder / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    """A client of the server."""
    from comfyui_psa.workshop.tools.client import Client

    return Client(server.url)


@pytest.fixture(scope="session")
def definitions(client):
    """The node definitions that the frontend sees."""
    return client.get("/object_info")


@pytest.fixture(scope="session")
def pipes():
    """The module `tiny_pipelines.py` next to this file: tiny diffusers pipelines with random weights."""
    return importlib.import_module(".tiny_pipelines", __package__)


@pytest.fixture(scope="session")
def loops(comfyui):
    """The module `correction_loop.py` next to this file: whole runs with a correction, written as a loop."""
    return importlib.import_module(".correction_loop", __package__)


@pytest.fixture
def in_short_runs(monkeypatch):
    """Runs of few steps already do what long ones do: losses are renewed and levels kept from 6 sparse steps on."""
    from comfyui_psa.choices import correction

    monkeypatch.setattr(correction, "FEW_STEPS", 6)
    monkeypatch.setattr(correction, "RENEWALS", ((8, 0.2, 6),))
    monkeypatch.setattr(correction, "COARSE_RENEWALS", ((8, 0.2, 6),))
    for name in ("GAMMA_OF_FEW_STEPS", "GAMMA_WITHOUT_RENEWAL", "GAMMA_WITH_RENEWAL"):
        monkeypatch.setattr(correction, name, 0.95)


@pytest.fixture
def losses(monkeypatch):
    """References to the tensors of every loss that is ever held."""
    from comfyui_psa.sampling.correction import LossStore

    found = []
    genuine = LossStore.put

    def put(self, place, loss):
        found.extend(weakref.ref(tensor) for tensor in loss.tensors())
        return genuine(self, place, loss)

    monkeypatch.setattr(LossStore, "put", put)
    return found
