#!/usr/bin/env python3
"""Train the demo model: `python workshop/training/train_demo.py [--minutes 9]`, or with `--size large` the large model
for quality measurements.

Writes the diffusion model, the autoencoder, a contact sheet and the run's figures into demo/weights (or --out). With
several GPUs, the last one trains the autoencoder and all others the diffusion model; on one, the two networks take
turns. Needs torch, numpy, safetensors and Pillow.
"""

from __future__ import annotations

import time

BEGUN = time.time()  # --minutes counts from here, imports included

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import runpy  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from datetime import datetime, timezone  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DIT_SHARE = 0.7
"""The diffusion model's share of the time if both networks share one device."""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; the hidden options are for the child processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", default="demo", choices=["demo", "large"], help="which model to train, see settings.py"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything but the contact sheet")
    parser.add_argument("--out", type=Path, help="folder for the results: demo/weights, or output/large for that size")
    parser.add_argument("--parts", type=Path, help="also pack the model into small files here, see parcel.py")
    parser.add_argument("--device", default=None, help="for example cuda:0 or cpu; all visible GPUs by default")
    parser.add_argument("--processes", type=int, help="how many processes train the diffusion model on the CPU")
    parser.add_argument("--only", choices=["dit", "vae"], default=None, help="train only one network")
    parser.add_argument("--resume", type=Path, default=None, help="diffusion model to continue training from")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU, to try the script")
    parser.add_argument("--basis", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, default=BEGUN, help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out or ROOT.joinpath(*(["demo", "weights"] if arguments.size == "demo" else
                                                     ["output", arguments.size]))  # fmt: skip
    return arguments


def train_one(arguments: argparse.Namespace) -> None:
    """In a child process: train one network on one device, alone or as part of a team."""
    import torch

    from comfyui_psa.workshop.training import dit, files, settings, vae
    from comfyui_psa.workshop.training.team import join_team

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    team = join_team(device)
    basis = files.load_basis(arguments.basis).to(device)
    chosen = settings.SIZES[arguments.size]
    chosen = settings.tiny(chosen) if arguments.tiny else chosen
    common = (basis, chosen, device, arguments.deadline, arguments.out)

    def log(line: str) -> None:
        if team.leads:
            print(f"[{time.time() - arguments.begun:5.0f} s] {line}", flush=True)

    if arguments.only == "dit":
        figures = dit.train_dit(*common, resume=arguments.resume, log=log, team=team)
    else:
        figures = vae.train_vae(*common, log=log)
    if team.leads:
        arguments.figures.write_text(json.dumps(figures))
    team.part()


def start(
    arguments: argparse.Namespace, network: str, devices: Sequence[str], deadline: float, work: Path
) -> list[subprocess.Popen]:
    """Start training one network, in one process per device."""
    from comfyui_psa.workshop.training.files import BASIS_FILE
    from comfyui_psa.workshop.training.team import member

    command = [sys.executable, str(Path(__file__).resolve()), "--only", network, "--size", arguments.size]
    command += [
        "--begun",
        str(BEGUN),
        "--deadline",
        str(deadline),
        "--out",
        str(arguments.out),
        "--basis",
        str(arguments.out / BASIS_FILE),
    ]
    command += ["--figures", str(work / f"{network}.json")] + (["--tiny"] if arguments.tiny else [])
    command += ["--resume", str(arguments.resume)] if arguments.resume else []
    usual = dict(os.environ)
    # Otherwise torch would start one compile process and one thread per core for each of our processes.
    cores = max(1, min(16, (os.cpu_count() or 1) // len(devices)))
    usual.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cores))
    usual.setdefault("OMP_NUM_THREADS", str(cores))
    return [
        subprocess.Popen(
            [*command, "--device", device], env=usual | member(rank, len(devices), work / f"{network}.meeting")
        )
        for rank, device in enumerate(devices)
    ]


def wait(teams: Sequence[Sequence[subprocess.Popen]], meanwhile: Callable[[], None]) -> bool:
    """Wait for all processes; True if all succeeded. If one of a team fails, the rest of that team are killed."""
    while any(process.poll() is None for team in teams for process in team):
        for team in teams:
            if any(process.poll() for process in team):
                for process in team:
                    process.kill()
        meanwhile()
        time.sleep(0.5)
    return not any(process.wait() for team in teams for process in team)


def main() -> int:
    """Train the requested networks, sample the contact sheet and return the exit code."""
    arguments = parse_arguments()
    runpy.run_path(str(ROOT / "workshop" / "pack.py"))["load_pack"]()
    if arguments.deadline is not None:
        train_one(arguments)
        return 0
    import torch

    from comfyui_psa.workshop.training import files, parcel, settings, sheet
    from comfyui_psa.workshop.training.latents import fit_basis
    from comfyui_psa.workshop.training.worlds import WORLDS

    chosen = settings.SIZES[arguments.size]
    chosen = settings.tiny(chosen) if arguments.tiny else chosen
    devices = [arguments.device] if arguments.device else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = devices or ["cpu"]
    networks = [arguments.only] if arguments.only else ["dit", "vae"]
    many, apart = devices, len(devices) > 1 and len(networks) > 1
    if arguments.processes:
        many = devices[:1] * arguments.processes
    elif apart:
        many = devices[:-1]
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = BEGUN + arguments.minutes * 60
    sent = 0.0

    def send() -> None:
        """Pack the finished files into a parcel if they are newer than the last one."""
        nonlocal sent
        written = [path.stat().st_mtime for path in parcel.contents(arguments.out)]
        if arguments.parts and written and max(written) > sent:
            sent = max(written)
            parcel.pack(arguments.out, arguments.parts)

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        known = arguments.resume.resolve().parents[1] / files.BASIS_FILE if arguments.resume else None
        basis = (
            files.load_basis(known)
            if known and known.exists()
            else fit_basis(devices[0], clips=chosen.basis_clips, world=WORLDS[chosen.world])
        )
        files.save_basis(basis, arguments.out / files.BASIS_FILE)
        print(f"latent basis after {time.time() - BEGUN:.0f} s; training on {', '.join(devices)}", flush=True)
        if apart:
            running = [start(arguments, "dit", many, end, work), start(arguments, "vae", devices[-1:], end, work)]
            well = wait(running, send)
        else:
            well, now = True, time.time()
            shares = [DIT_SHARE, 1.0] if len(networks) > 1 else [1.0]
            for network, share in zip(networks, shares, strict=True):
                places = many if network == "dit" else devices[:1]
                well &= wait([start(arguments, network, places, now + (end - now) * share, work)], send)
        if not well:
            print("training failed: see the messages above", file=sys.stderr)
            return 1
        metrics = arguments.out / files.METRICS_FILE
        figures = json.loads(metrics.read_text()) if metrics.exists() else {}
        for network in networks:
            label = f"{network}_resumed" if arguments.resume and network == "dit" else network
            figures[label] = json.loads((work / f"{network}.json").read_text())
    device = torch.device(devices[0])
    run = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "devices": len(devices),
        "torch": torch.__version__,
        "seconds_in_all": round(time.time() - BEGUN, 1),
        "bytes": {p.name: p.stat().st_size for p in sorted(arguments.out.rglob("*.safetensors"))},
    }
    figures["run_resumed" if arguments.resume else "run"] = run
    metrics.write_text(json.dumps(figures, indent=1) + "\n")
    send()
    if (arguments.out / files.dit_file(chosen.name)).exists() and (
        arguments.out / files.vae_file(chosen.name)
    ).exists():
        sheet.make_sheet(arguments.out, chosen, device)
        send()
    print(json.dumps({k: {n: v for n, v in f.items() if n != "loss_history"} for k, f in figures.items()}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
