"""Wan2.1-T2V-1.3B in diffusers, dense or with PSA.

python for_diffusers/examples/inference/wan21/wan21_1.3b.py --prompt "your prompt here" --use_psa --no_warmup
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_parser, run

MODELS = {"wan2.1_1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan2.1_14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}
FLOW_SHIFT = 5.0


def main(words: list[str] | None = None) -> None:
    """Run with the arguments of a command line."""
    parser = make_parser("Wan2.1 text to video", model="wan2.1_1.3b", steps=50, guidance=5.0, size=(1280, 720, 69))
    arguments = parser.parse_args(words)
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    source = MODELS.get(arguments.model, arguments.model)
    vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(source, vae=vae, torch_dtype=torch.bfloat16)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=FLOW_SHIFT)
    run(pipe.to(arguments.device), arguments, fps=16)


if __name__ == "__main__":
    main()
