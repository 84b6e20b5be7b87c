"""CogVideoX-5B and CogVideoX1.5-5B in diffusers, dense or with PSA.

python for_diffusers/examples/inference/cogvideo/cogvideo_5b.py --model cogvideo1.5_5b \\
    --prompt "your prompt here" --use_psa
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import make_parser, run, together

MODELS = {
    "cogvideo_5b": ("zai-org/CogVideoX-5b", (720, 480, 49), 8),
    "cogvideo1.5_5b": ("zai-org/CogVideoX1.5-5B", (1360, 768, 81), 16),
}
"""Name -> repository, width, height and frames, frames a second."""


def main(words: list[str] | None = None) -> None:
    """Run with the arguments of a command line."""
    parser = make_parser("CogVideoX text to video", model="cogvideo_5b", steps=50, guidance=6.0, size=(0, 0, 0))
    arguments = parser.parse_args(words)
    with together(arguments):
        import torch
        from diffusers import CogVideoXPipeline

        source, size, fps = MODELS.get(arguments.model, (arguments.model, *MODELS["cogvideo_5b"][1:]))
        for name, value in zip(("width", "height", "frames"), size, strict=True):
            setattr(arguments, name, getattr(arguments, name) or value)
        pipe = CogVideoXPipeline.from_pretrained(source, torch_dtype=torch.bfloat16).to(arguments.device)
        pipe.vae.enable_tiling()
        run(pipe, arguments, fps)


if __name__ == "__main__":
    main()
