#!/usr/bin/env python3
"""The development command line: sets up a real ComfyUI with this pack from scratch.

    python dev.py demo     sample a video dense and with PSA on the CPU, and compare them in output/psa_demo/
    python dev.py test     run the tests, one process per core; everything after `test` goes to pytest
    python dev.py serve    open ComfyUI with the pack, to try it by hand
    python dev.py bench    run the benchmarks
    python dev.py quality  compare settings with dense sampling; --quick takes minutes on a CPU
    python dev.py gallery  sample PSA and its rivals from one noise, as looping pictures in output/gallery/;
                           --model FOLDER takes another trained model, --publish also renews docs/gallery.md
    python dev.py check    check style, layers and types; `check layers` runs only one of the three
    python dev.py fuzz     send random and hostile inputs and files to a real server, --cases of them
    python dev.py soak     run many prompts on a real server and compare its memory before and after
    python dev.py setup    only set up the environment in .dev/
    python dev.py workflows    regenerate workflows/*.json and locales/en after changing a node's schema
    python dev.py docs     write the lists of messages in docs/troubleshooting.md, and the table of models in
                           docs/compatibility.md, again after changing them
    python dev.py registry --address URL --tag v1.2.3    write the address into a release to ComfyUI's registry
    python dev.py weights  download the 4-step LoRA for CogVideoX-5B into weights/; only needs huggingface-hub

Needs only Python 3.10 or newer; the first run installs the rest into .dev/ (a few minutes, about 8 GB).
To use another ComfyUI, pass --comfyui FOLDER to any command or set COMFYUI_PATH; its requirements are then installed
into .dev/venv.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from workshop.pack import load_pack
from workshop.tools.environment import ensure_environment
from workshop.tools.paths import BYTECODE, DEV, ROOT, VENV, VENV_PYTHON, VENV_SCRIPTS, chosen_comfyui
from workshop.tools.terminal import Failure


def main() -> int:
    """Run one command and return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running server gets stopped
    arguments, rest = _parser().parse_known_args()
    if rest and arguments.command not in ("test", "bench", "quality", "gallery"):
        _parser().error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        alone = arguments.command in ("weights", "docs", "registry")
        comfyui = None if alone else ensure_environment(arguments.comfyui or chosen_comfyui())
        return COMMANDS[arguments.command](arguments, comfyui, rest)
    except Failure as failure:
        print(f"\nError: {failure}", file=sys.stderr)
        return failure.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        log = DEV / "error.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        print(f"\nError: {type(error).__name__}: {error} (details in {log})", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument(
            "--comfyui",
            type=Path,
            help="folder of an existing ComfyUI; default: COMFYUI_PATH, otherwise the one in .dev/",
        )
        if name == "demo":
            command.add_argument("--steps", type=int, help="sampling steps")
            command.add_argument("--sparsity", type=float, help="PSA's target sparsity, 0 to 0.97")
        if name == "serve":
            command.add_argument("--port", type=int, default=0, help="0 picks a free port")
            command.add_argument("--no-browser", action="store_true", help="only print the address")
        if name == "check":
            command.add_argument("kinds", nargs="*", help="style, layers or types; default: all three")
        if name == "fuzz":
            command.add_argument("--cases", type=int, default=500, help="prompts to try, about 20 a second")
            command.add_argument("--seed", type=int, default=0, help="the same seed gives the same cases")
        if name == "soak":
            command.add_argument("--prompts", type=int, default=50, help="prompts after the warm-up")
        if name == "registry":
            command.add_argument("--address", required=True, help="of the repository, https://HOST/OWNER/NAME")
            command.add_argument("--tag", required=True, help="of the version, such as v0.2.0")
        if name == "weights":
            command.add_argument("--to", type=Path, default=ROOT / "weights", help="an existing folder to use instead")
    return parser


def _demo(arguments: argparse.Namespace, comfyui: Path, _: list[str]) -> int:
    _continue_in_environment()
    from workshop.tools.demo import run_demo

    run_demo(comfyui, steps=arguments.steps, sparsity=arguments.sparsity)
    return 0


def _serve(arguments: argparse.Namespace, comfyui: Path, _: list[str]) -> int:
    _continue_in_environment()
    from workshop.tools.serve import serve

    serve(comfyui, arguments.port, open_browser=not arguments.no_browser)
    return 0


def _workflows(_: argparse.Namespace, comfyui: Path, __: list[str]) -> int:
    _continue_in_environment()
    from workshop.tools.serve import rebuild_workflows

    rebuild_workflows(comfyui)
    return 0


def _docs(*_: object) -> int:
    from workshop.tools import models_table, troubleshooting

    try:
        for page in (troubleshooting, models_table):
            print(f"Written: {page.write_page(ROOT)}")
    except LookupError as error:
        raise Failure(str(error)) from error
    return 0


def _registry(arguments: argparse.Namespace, *_: object) -> int:
    from workshop.tools.registry import complete

    try:
        for path in complete(ROOT, arguments.address, arguments.tag):
            print(f"Written: {path}")
    except LookupError as error:
        raise Failure(str(error)) from error
    return 0


SPREAD = ["--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile", "--no-loadscope-reorder"]
"""Runs test files in several processes; tests/conftest.py decides how many, and in which order."""


def _test(_: argparse.Namespace, comfyui: Path, rest: list[str]) -> int:
    # Not `python -m pytest`, which would put the repository root on sys.path. The user's arguments come last, so that
    # their -n or --dist wins.
    spread = [] if any("no:xdist" in word for word in rest) else SPREAD
    return _run(
        [VENV_SCRIPTS / "pytest", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", *spread, *rest],
        {"COMFYUI_PATH": str(comfyui)},
    )


def _bench(_: argparse.Namespace, comfyui: Path, rest: list[str]) -> int:
    script = ROOT / "workshop" / "benchmarks" / "run.py"
    if not script.exists():
        raise Failure("workshop/benchmarks/run.py does not exist yet.")
    return _run([VENV_PYTHON, script, *rest], {"COMFYUI_PATH": str(comfyui)})


def _quality(_: argparse.Namespace, comfyui: Path, rest: list[str]) -> int:
    return _run([VENV_PYTHON, ROOT / "workshop" / "quality" / "run.py", *rest], {"COMFYUI_PATH": str(comfyui)})


def _gallery(_: argparse.Namespace, comfyui: Path, rest: list[str]) -> int:
    return _quality(_, comfyui, ["--gallery", *rest])


def _check(arguments: argparse.Namespace, _: Path, __: list[str]) -> int:
    from workshop.tools.check import KINDS, run_checks

    unknown = [kind for kind in arguments.kinds if kind not in KINDS]
    if unknown:
        raise Failure(f"There is no check named {unknown[0]}; choose from {', '.join(KINDS)}.")
    return 0 if run_checks(arguments.kinds or list(KINDS)) else 1


def _fuzz(arguments: argparse.Namespace, comfyui: Path, _: list[str]) -> int:
    _continue_in_environment()
    from workshop.tools.fuzz import run_fuzz

    return 1 if run_fuzz(comfyui, arguments.cases, arguments.seed) else 0


def _soak(arguments: argparse.Namespace, comfyui: Path, _: list[str]) -> int:
    _continue_in_environment()
    from workshop.tools.soak import run_soak

    return 0 if run_soak(comfyui, arguments.prompts) else 1


def _weights(arguments: argparse.Namespace, *_: object) -> int:
    if importlib.util.find_spec("huggingface_hub") is None:
        if not VENV_PYTHON.exists():
            raise Failure("huggingface-hub is missing; run `pip install huggingface-hub` and try again.")
        _continue_in_environment()
    from loading.download import DownloadError, download_lora

    folder = arguments.to.expanduser().resolve()
    if not folder.is_dir():
        raise Failure(f"There is no folder {folder}.")
    try:
        print(f"The LoRA is at {download_lora(folder)}")
    except DownloadError as error:
        raise Failure(str(error)) from error
    return 0


def _setup(*_: object) -> int:
    print(f"The environment is ready: {VENV}")
    return 0


COMMANDS = {
    "demo": _demo,
    "test": _test,
    "serve": _serve,
    "bench": _bench,
    "quality": _quality,
    "gallery": _gallery,
    "check": _check,
    "fuzz": _fuzz,
    "soak": _soak,
    "setup": _setup,
    "workflows": _workflows,
    "docs": _docs,
    "registry": _registry,
    "weights": _weights,
}


def _continue_in_environment() -> None:
    """Import the pack if this is the environment's Python; otherwise run this command line again with that Python, and
    exit."""
    if Path(sys.prefix).resolve() != VENV.resolve():
        sys.exit(_run([VENV_PYTHON, Path(__file__).resolve(), *sys.argv[1:]]))
    load_pack()


def _run(command: list, environment: dict[str, str] | None = None) -> int:
    sys.stdout.flush()
    # Compiled code is kept, also where machines have Python write none: torch and ComfyUI are imported twice as fast.
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(BYTECODE)}
    words, environment = [str(word) for word in command], {**os.environ, **kept, **(environment or {})}
    if os.name != "nt":
        os.execve(
            words[0], words, environment
        )  # replaces this process: no parent in between that could outlive it or miss a signal
    return subprocess.run(words, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
