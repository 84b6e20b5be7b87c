"""What the scripts of Wan2.1 share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_parser, run, together

MODELS = {"wan2.1_1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan2.1_14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}
FLOW_SHIFT = 5.0


def main(model: str, words: list[str] | None = None) -> None:
    """Run a model with the arguments of a command line."""
    parser = make_parser("Wan2.1 text to video", model=model, steps=50, guidance=5.0, size=(1280, 720, 69))
    arguments = parser.parse_args(words)
    with together(arguments):
        import torch
        from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

        source = MODELS.get(arguments.model, arguments.model)
        vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32)
        pipe = WanPipeline.from_pretrained(source, vae=vae, torch_dtype=torch.bfloat16)
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=FLOW_SHIFT)
        run(pipe.to(arguments.device), arguments, fps=16)
