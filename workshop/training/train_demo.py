#!/usr/bin/env python3
"""Train the demonstration model: `python workshop/training/train_demo.py [--minutes 9]`.

Writes the diffusion model, the autoencoder, a contact sheet and the figures of the run into demo/weights (or --out).
With two GPUs the networks train side by side, with one they take turns. Needs torch, safetensors and Pillow.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIT_SHARE = 0.7
"""Share of the time that the diffusion model gets where both networks share one device."""


def parse_arguments() -> argparse.Namespace:
    """The command line; the hidden options are for the child processes."""
    parser = argparse.ArgumentParser(description="Train the small demonstration model of ComfyUI-PSA.")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything but the contact sheet")
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "weights", help="folder for the results")
    parser.add_argument("--device", default=None, help="for example cuda:0 or cpu; all visible GPUs by default")
    parser.add_argument("--only", choices=["dit", "vae"], default=None, help="train one network only")
    parser.add_argument("--resume", type=Path, default=None, help="diffusion model to go on training from")
    parser.add_argument("--tiny", action="store_true", help="settings small enough for a CPU, to try the script")
    parser.add_argument("--basis", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def train_one(arguments: argparse.Namespace) -> None:
    """Train one network on one device (child process)."""
    import torch

    from comfyui_psa.workshop.training import dit, files, settings, vae

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    basis = files.load_basis(arguments.basis).to(device)
    chosen = settings.TINY if arguments.tiny else settings.Settings()
    common = (basis, chosen, device, arguments.deadline, arguments.out)
    if arguments.only == "dit":
        figures = dit.train_dit(*common, resume=arguments.resume, log=lambda line: print(line, flush=True))
    else:
        figures = vae.train_vae(*common, log=lambda line: print(line, flush=True))
    arguments.figures.write_text(json.dumps(figures))


def start(arguments: argparse.Namespace, network: str, device: str, deadline: float, work: Path) -> subprocess.Popen:
    """Start the training of one network in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--only", network, "--device", device]
    command += [
        "--deadline",
        str(deadline),
        "--out",
        str(arguments.out),
        "--basis",
        str(arguments.out / "latent_basis.safetensors"),
    ]
    command += ["--figures", str(work / f"{network}.json")] + (["--tiny"] if arguments.tiny else [])
    command += ["--resume", str(arguments.resume)] if arguments.resume else []
    return subprocess.Popen(command)


def main() -> int:
    """Train what was asked for and sample the contact sheet; the exit code."""
    arguments = parse_arguments()
    runpy.run_path(str(ROOT / "workshop" / "pack.py"))["load_pack"]()
    if arguments.deadline is not None:
        train_one(arguments)
        return 0
    begun = time.time()
    import torch

    from comfyui_psa.workshop.training import files, settings, sheet
    from comfyui_psa.workshop.training.latents import fit_basis

    gpus = torch.cuda.device_count()
    devices = [arguments.device] if arguments.device else [f"cuda:{i}" for i in range(min(gpus, 2))] or ["cpu"]
    chosen = settings.TINY if arguments.tiny else settings.Settings()
    arguments.out.mkdir(parents=True, exist_ok=True)
    networks = [arguments.only] if arguments.only else ["dit", "vae"]
    end = begun + arguments.minutes * 60
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        known = arguments.resume.resolve().parents[1] / files.BASIS_FILE if arguments.resume else None
        basis = files.load_basis(known) if known and known.exists() else fit_basis(devices[0], clips=chosen.basis_clips)
        files.save_basis(basis, arguments.out / files.BASIS_FILE)
        print(f"latent basis after {time.time() - begun:.0f} s; training on {', '.join(devices)}", flush=True)
        failed = False
        if len(devices) > 1 and len(networks) > 1:
            running = [start(arguments, n, d, end, work) for n, d in zip(networks, devices, strict=True)]
            failed = any([process.wait() for process in running])
        else:
            now = time.time()
            shares = [DIT_SHARE, 1.0] if len(networks) > 1 else [1.0]
            for network, share in zip(networks, shares, strict=True):
                failed |= bool(start(arguments, network, devices[0], now + (end - now) * share, work).wait())
        if failed:
            print("training failed: see the messages above", file=sys.stderr)
            return 1
        metrics = arguments.out / files.METRICS_FILE
        figures = json.loads(metrics.read_text()) if metrics.exists() else {}
        for network in networks:
            label = f"{network}_resumed" if arguments.resume and network == "dit" else network
            figures[label] = json.loads((work / f"{network}.json").read_text())
    device = torch.device(devices[0])
    if (arguments.out / files.DIT_FILE).exists() and (arguments.out / files.VAE_FILE).exists():
        sheet.make_sheet(arguments.out, chosen, device)
    run = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "devices": len(devices),
        "torch": torch.__version__,
        "seconds_in_all": round(time.time() - begun, 1),
        "bytes": {p.name: p.stat().st_size for p in sorted(arguments.out.rglob("*.safetensors"))},
    }
    figures["run_resumed" if arguments.resume else "run"] = run
    metrics.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({k: {n: v for n, v in f.items() if n != "loss_history"} for k, f in figures.items()}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
