"""An example script started by torchrun, on a tiny random pipeline: example_with_stand_ins.py SCRIPT BROKEN WORDS...

Stood in for: weights and text encoder, which cannot be had here, and ffmpeg, instead of which the frames are saved.
BROKEN: the rank whose text encoder fails, or none.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem.replace(".", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(script, broken, *words):
    import diffusers
    import diffusers.utils

    load(TESTS / "ranks.py").stand_in_for_gpus()
    torch.manual_seed(0)
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=128, num_layers=1, ffn_dim=64, text_dim=4096
        ).eval(),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )

    def encode_prompt(**_):
        if broken == os.environ.get("RANK", "0"):
            raise MemoryError("no room for the prompt")
        return torch.ones(1, 13, 4096), torch.zeros(1, 13, 4096)

    pipe.encode_prompt = encode_prompt
    with (
        mock.patch.object(diffusers.WanPipeline, "from_pretrained", return_value=pipe),
        mock.patch.object(diffusers.AutoencoderKLWan, "from_pretrained", return_value=pipe.vae),
        mock.patch("diffusers.utils.export_to_video", lambda frames, path, fps: np.save(path, np.asarray(frames))),
    ):
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
