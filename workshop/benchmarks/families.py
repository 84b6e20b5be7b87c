"""A stack of two blocks of every family, of real size, dense and with PSA at 0.85: milliseconds of a model call.

ComfyUI's own model classes and sampling with random weights, in bfloat16, at a size that the model is released for. A
call has its embedding and its last layer too, a few percent of it. No correction, whose first step is dense. The rows
are written as they are measured. Needs COMFYUI_PATH set to a ComfyUI folder, ComfyUI's packages, and a GPU with 40 GB;
without one: `--device cpu --heads 2 --latent 3 28 32`.

    COMFYUI_PATH=... python workshop/benchmarks/families.py --csv families.csv
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import runpy
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy_steps import import_comfyui, step_seconds

ROOT = Path(__file__).resolve().parents[2]
TEXT_TOKENS = 256
BLOCKS = 2


@dataclasses.dataclass(frozen=True)
class Model:
    """A released model.

    Attributes:
        config: its class in comfy.supported_models. sizes: arguments of its network, for a number of heads.
        heads: how many it has; size: of a head. latent: [C, T, H, W] of a video of released size.
        text: width of the prompt's tokens, for a number of heads. sound: latent that is sampled with the video.
    """

    config: str
    sizes: Callable[[int], dict[str, Any]]
    heads: int
    size: int
    latent: tuple[int, int, int, int]
    text: Callable[[int], int] = lambda heads: 4096
    sound: tuple[int, ...] = ()


def _wan(heads: int) -> dict[str, Any]:
    sizes = {"dim": 128 * heads, "ffn_dim": 128 * heads * 27 // 10, "num_heads": heads, "num_layers": BLOCKS}
    return {"image_model": "wan2.1", "model_type": "t2v", **sizes}


def _cogvideox(heads: int) -> dict[str, Any]:
    sizes = {"num_attention_heads": heads, "num_layers": BLOCKS, "use_rotary_positional_embeddings": True}
    return {"image_model": "cogvideox", **sizes}


def _hunyuan(heads: int) -> dict[str, Any]:
    return {
        "image_model": "hunyuan_video",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 128 * heads,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "depth": BLOCKS // 2,
        "depth_single_blocks": BLOCKS // 2,
        "axes_dim": [16, 56, 56],
        "theta": 256,
        "qkv_bias": True,
        "guidance_embed": True,
        "byt5": False,
        "meanflow": False,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
    }


def _hunyuan_15(heads: int) -> dict[str, Any]:
    return _hunyuan(heads) | {
        "in_channels": 65,
        "out_channels": 32,
        "patch_size": [1, 1, 1],
        "vec_in_dim": None,
        "context_in_dim": 3584,
        "depth": BLOCKS,
        "depth_single_blocks": 0,
        "guidance_embed": False,
        "byt5": True,
        "use_cond_type_embedding": True,
        "vision_in_dim": 1152,
        "meanflow_sum": True,
    }


def _ltx(size: int) -> Callable[[int], dict[str, Any]]:
    return lambda heads: {
        "image_model": "ltxv",
        "num_layers": BLOCKS,
        "num_attention_heads": heads,
        "attention_head_dim": size,
        "cross_attention_dim": size * heads,
    }


def _ltx_2(heads: int) -> dict[str, Any]:
    return _ltx(128)(heads) | {
        "image_model": "ltxav",
        "caption_channels": 128 * max(1, heads - 2),
        "audio_num_attention_heads": heads,
        "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 64 * heads,
        "connector_num_attention_heads": max(1, heads - 2),
        "connector_attention_head_dim": 128,
        "connector_num_layers": 2,
    }


def _kandinsky(axes: tuple[int, int, int], time_dim: int) -> Callable[[int], dict[str, Any]]:
    return lambda heads: {
        "image_model": "kandinsky5",
        "model_dim": sum(axes) * heads,
        "ff_dim": 4 * sum(axes) * heads,
        "axes_dims": axes,
        "time_dim": time_dim,
        "num_text_blocks": 1,
        "num_visual_blocks": BLOCKS,
    }


def _cosmos(heads: int) -> dict[str, Any]:
    return {
        "image_model": "cosmos_predict2",
        "max_img_h": 240,
        "max_img_w": 240,
        "max_frames": 128,
        "in_channels": 16,
        "out_channels": 16,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "model_channels": 128 * heads,
        "num_blocks": BLOCKS,
        "num_heads": heads,
        "crossattn_emb_channels": 1024,
        "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True,
        "use_adaln_lora": True,
        "adaln_lora_dim": 256,
        "rope_enable_fps_modulation": False,
    }


def _mochi(heads: int) -> dict[str, Any]:
    return {
        "image_model": "mochi_preview",
        "depth": BLOCKS,
        "patch_size": 2,
        "num_heads": heads,
        "hidden_size_x": 128 * heads,
        "hidden_size_y": 64 * heads,
        "mlp_ratio_x": 96 / heads,  # the class accepts one inner width only
        "mlp_ratio_y": 4.0,
        "learn_sigma": False,
        "in_channels": 12,
        "qk_norm": True,
        "qkv_bias": False,
        "out_bias": True,
        "use_t5": True,
        "t5_feat_dim": 4096,
        "timestep_scale": 1000.0,
    }


def _minimax(heads: int) -> dict[str, Any]:
    return {
        "image_model": "minimax_h3",
        "hidden_size": 96 * heads,
        "num_layers": BLOCKS,
        "token_refiner_num_layers": 1,
        "num_attention_heads": heads,
        "ffn_hidden_size": 256 * heads,
        "time_embed_hidden_size": 96 * heads,
        "time_embed_dim": 48 * heads,
    }


MODELS = {
    "Wan 2.1 14B, 1280x720x81": Model("WAN21_T2V", _wan, 40, 128, (16, 21, 90, 160)),
    "CogVideoX-5B, 720x480x49": Model("CogVideoX_T2V", _cogvideox, 48, 64, (16, 13, 60, 90)),
    "HunyuanVideo 1.0, 1280x720x129": Model("HunyuanVideo", _hunyuan, 24, 128, (16, 33, 90, 160)),
    "HunyuanVideo 1.5, 1280x720x121": Model(
        "HunyuanVideo15", _hunyuan_15, 16, 128, (32, 31, 45, 80), text=lambda heads: 3584
    ),
    "LTX-Video 0.9 2B, 1216x704x257": Model("LTXV", _ltx(64), 32, 64, (128, 33, 22, 38)),
    "LTX-Video 0.9 13B, 1216x704x257": Model("LTXV", _ltx(128), 32, 128, (128, 33, 22, 38)),
    "LTX-2, 1920x1088x121": Model(
        "LTXAV", _ltx_2, 32, 128, (128, 16, 34, 60), text=lambda heads: 256 * max(1, heads - 2)
    ),
    "Kandinsky 5 Lite, 768x512x121": Model(
        "Kandinsky5", _kandinsky((16, 24, 24), 512), 28, 64, (16, 31, 64, 96), text=lambda heads: 3584
    ),
    "Kandinsky 5 Pro, 1280x768x121": Model(
        "Kandinsky5", _kandinsky((32, 48, 48), 1024), 32, 128, (16, 31, 96, 160), text=lambda heads: 3584
    ),
    "Cosmos Predict 2 2B, 1280x704x93": Model(
        "CosmosT2IPredict2", _cosmos, 16, 128, (16, 24, 88, 160), text=lambda heads: 1024
    ),
    "Mochi 1, 848x480x163": Model("GenmoMochi", _mochi, 24, 128, (12, 28, 60, 106)),
    "MiniMax H3, 1344x768x124": Model(
        "MiniMaxH3", _minimax, 56, 128, (24, 37, 48, 84), text=lambda heads: 5120, sound=(32, 2, 207)
    ),
}


@dataclasses.dataclass
class Row:
    """A row of the results. tokens: of the video. blocks: of the stack."""

    family: str
    model: str
    heads: int
    head_size: int
    tokens: int
    blocks: int
    sparsity: float
    dense_ms: float
    sparse_ms: float
    ratio: float
    gpu: str
    date: str
    torch: str
    triton: str


def main() -> int:
    """Measure every model and write its row."""
    began = time.perf_counter()
    arguments = _arguments()
    import_comfyui(arguments.device)
    runpy.run_path(str(ROOT / "workshop" / "pack.py"))["load_pack"]()
    from comfyui_psa.workshop.table import write_records

    write_records(arguments.csv, Row, [])
    failed = 0
    for name in arguments.models:
        if time.perf_counter() - began > arguments.seconds:
            print(f"no time is left for {name}", flush=True)
            continue
        try:
            row = _measure(name, arguments)
            write_records(arguments.csv, Row, [row], append=True)
            print(
                f"{name:32} {row.tokens:7} tokens: {row.dense_ms:9.2f} ms dense, {row.sparse_ms:9.2f} ms at "
                f"{row.sparsity:.2f}, {row.ratio:.2f}x ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
        except Exception:  # the others are measured all the same
            failed += 1
            print(f"{name} was not measured:", flush=True)
            traceback.print_exc(file=sys.stdout)
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return int(failed > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names that begin like this; default: all")
    parser.add_argument("--csv", type=Path, default=Path("families.csv"))
    parser.add_argument("--sparsity", type=float, default=0.85)
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--seconds", type=float, default=150.0, help="no measurement begins after that")
    parser.add_argument("--heads", type=int, help="instead of the released number")
    parser.add_argument("--latent", type=int, nargs=3, help="frames, rows, columns instead of the released size")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    wanted = tuple(arguments.models)
    arguments.models = [name for name in MODELS if name.startswith(wanted or "")]
    if not arguments.models:
        parser.error(f"no model begins like {' or '.join(wanted)}; there are {', '.join(MODELS)}")
    return arguments


def _measure(name: str, arguments: argparse.Namespace) -> Row:
    """Time one model. A separate function, so that its weights are freed afterwards."""
    from comfyui_psa.patching.family import families
    from comfyui_psa.patching.patch import KEY, patch_model

    kind = MODELS[name]
    heads = arguments.heads or kind.heads
    model = _random_model(kind, heads, arguments.device)
    sparse = patch_model(
        model, sparsity=arguments.sparsity, preset="auto", start_percent=0.0, end_percent=1.0, min_tokens=0,
        correction="off",
    )  # fmt: skip
    found = []
    for patched in (model, sparse):
        _sample(patched, kind, heads, arguments, steps=1)  # compiles, and finds the fastest tile
        found.append(1e3 * statistics.median(_sample(patched, kind, heads, arguments, arguments.steps)))
    report = sparse.get_attachment(KEY).report
    if report["fallbacks"] or report["mean_sparsity"] is None:
        raise RuntimeError(f"{name}: {report['fallbacks'] or report['notes']}")
    image_model = model.model.model_config.unet_config["image_model"]
    frames, height, width = report["grid"]
    return Row(
        next(family.name for family in families() if image_model in family.image_models),
        name,
        heads,
        kind.size,
        frames * height * width,
        BLOCKS,
        report["mean_sparsity"],
        *found,
        found[0] / found[1],
        torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU",
        datetime.date.today().isoformat(),
        torch.__version__,
        _version("triton"),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _random_model(kind: Model, heads: int, device: str) -> Any:
    """A ComfyUI MODEL with random weights on `device`: bfloat16 on a GPU, float32 on a CPU."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    comfy.model_management.unload_all_models()
    config = getattr(comfy.supported_models, kind.config)(kind.sizes(heads))
    config.set_inference_dtype(torch.bfloat16 if device == "cuda" else torch.float32, None)
    where = torch.device(device)
    model = config.get_model({}, "", device=where)
    model.diffusion_model.to(where)
    generator = torch.Generator(where).manual_seed(0)
    for name, value in model.diffusion_model.state_dict().items():
        if name.endswith("inv_freq"):
            value.copy_(1e4 ** -torch.linspace(0, 1, len(value)))
        elif value.ndim == 1:
            value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            value.normal_(std=0.02, generator=generator)
    return comfy.model_patcher.CoreModelPatcher(model, where, comfy.model_management.unet_offload_device())


def _sample(model: Any, kind: Model, heads: int, arguments: argparse.Namespace, steps: int) -> list[float]:
    """Sample and return the seconds of every step."""
    import comfy.nested_tensor
    import comfy.sample

    generator = torch.Generator().manual_seed(1)
    channels, *released = kind.latent
    latents = [torch.randn((1, channels, *(arguments.latent or released)), generator=generator)]
    if kind.sound:
        latents.append(torch.randn((1, *kind.sound), generator=generator))
    noise = comfy.nested_tensor.NestedTensor(latents) if kind.sound else latents[0]
    empty = [torch.zeros_like(latent) for latent in latents]
    text = torch.randn((1, TEXT_TOKENS, kind.text(heads)), generator=generator)
    extra: dict[str, Any] = {"pooled_output": torch.randn((1, 768), generator=generator)}
    if kind.config in ("GenmoMochi", "LTXV", "LTXAV"):
        extra["attention_mask"] = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
    conds = [[text, extra]]

    def sample(timed: Any, callback: Callable[..., None]) -> None:
        comfy.sample.sample(
            timed, noise, steps, 1.0, "euler", "simple", conds, conds,
            comfy.nested_tensor.NestedTensor(empty) if kind.sound else empty[0], seed=1, disable_pbar=True,
            callback=callback,
        )  # fmt: skip

    return step_seconds(model, sample, lambda: _now(arguments.device))


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
