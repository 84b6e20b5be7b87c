#!/usr/bin/env python3
"""`python dev.py quality`: compares PSA settings with dense sampling, on the same scenes and the same noise.

    python dev.py quality --quick          takes minutes on a CPU; last line: our default minus the best published
    python dev.py quality --workflow FILE  any ComfyUI workflow with a PSA Patch node, on a real server
    python dev.py quality --model FOLDER   the same for a model trained by workshop/training/train_demo.py
    python dev.py gallery                  looping pictures of PSA and its rivals; with --publish the ones in docs/
    python3 workshop/quality/run.py --out DIR   all of it, on a GPU; torch, triton, numpy, matplotlib, safetensors

The model is sampled directly, without ComfyUI, through the pack's own attention override.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))["load_pack"]()
    from comfyui_psa.workshop.quality.command import main

    sys.exit(main(__doc__))
