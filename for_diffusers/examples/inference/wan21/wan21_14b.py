"""Wan2.1-T2V-14B in diffusers, dense or with PSA.

python for_diffusers/examples/inference/wan21/wan21_14b.py --prompt "your prompt here" --use_psa

On four GPUs, one video together:

torchrun --nproc-per-node 4 for_diffusers/examples/inference/wan21/wan21_14b.py --prompt "your prompt here" \\
    --use_psa --ulysses 4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import wan21


def main(words: list[str] | None = None) -> None:
    """Run with the arguments of a command line."""
    wan21.main("wan2.1_14b", words)


if __name__ == "__main__":
    main()
