"""Damaged and odd files for `python dev.py fuzz`: models, LoRAs, folders and presets, generated from a seed.

No library writes files like these, so they are assembled here byte by byte. Some are good, and the damaged ones are
made from good ones.
"""

from __future__ import annotations

import array
import json
import math
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .paths import DEMO_WEIGHTS

FOLDER = "psa_fuzz"
"""All files go into folders of this name inside ComfyUI's model folders."""

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> dtype as safetensors spells it, shape, bytes."""

PRESETS = {
    "empty": b"", "nul": bytes(64), "no json": b"{", "text": b"hello", "list": b"[]", "number": b"1e400",
    "deep": b"[" * 50_000, "huge": b" " * 2_000_000, "latin": b'{"about": "\xe9"}', "nan": b'{"shares": {"1": NaN}}',
    "negative": b'{"shares": {"1": -1}}', "above one": b'{"shares": {"1": 0.9, "8": 0.9}}',
    "factor": b'{"shares": {"3": 1}}', "types": b'{"shares": [], "mode": 7}',
    "unknown": b'{"shares": {"1": 0.5}, "__class__": "x"}',
    "good": b'{"shares": {"1": 0.1, "8": 0.2}, "mode": "topk"}', "twice": b'{"shares": {"1": 0.1}, "shares": {"1": 2}}',
    "mark": b'\xef\xbb\xbf{"shares": {"1": 0.1}}', "utf16": '{"shares": {"1": 0.1}}'.encode("utf-16"),
    "deep object": b'{"a":' * 50_000, "digits": b'{"shares": {"1": ' + b"9" * 5000 + b"}}",
    "exponent": b'{"shares": {"1": 1e-400}}', "infinite": b'{"shares": {"1": 0.1}, "sparsity": Infinity}',
    "surrogate": b'{"shares": {"1": 0.1}, "about": "\\ud800"}', "dense": b'{"shares": {"1": 0.1}, "dense_steps": -1}',
    "steps": b'{"shares": {"1": 0.1}, "dense_steps": 1e99}', "key": b'{"shares": {"\\u0000": 0.1}}',
    "similarity": b'{"shares": {"8": 0.2}, "similarity_cap": {"8": 2}}', "null": b'{"shares": null}',
    "block": b'{"shares": {"1": 0.1}, "block_q": 7}', "flag": b'{"shares": {"1": 0.1}, "tail": "yes"}',
}  # fmt: skip
"""Malicious preset files, and some good ones, by name."""
GOOD_PRESETS = ("good", "mark", "utf16", "exponent", "surrogate")

NAMES = [
    "a b",
    "ünïcödé 视频",
    "line\nbreak",
    "back\\slash",
    "'quote\"",
    "-dash",
    "tab\t",
    "%s{}",
    "x" * 200,
    ".hidden",
]
CONFIGS = [
    b"", b"{", b"[]", b"3", b"[" * 50_000, b'{"a":' * 50_000, b" " * 5_000_000, bytes(50), b'{"a": "\xe9"}',
    b'{"_class_name": 7}', b'{"_class_name": "WanTransformer3DModel"}', b'{"_class_name": "AutoencoderKLCogVideoX"}',
    b'{"_class_name": "CogVideoXTransformer3DModel", "sample_height": "60"}',
    b'{"_class_name": "CogVideoXTransformer3DModel", "sample_height": NaN}',
    b'{"_class_name": "CogVideoXTransformer3DModel", "sample_width": 1e400}',
    b'{"_class_name": "CogVideoXTransformer3DModel", "sample_frames": ' + b"9" * 4000 + b"}",
    b'{"_class_name": "CogVideoXTransformer3DModel", "use_rotary_positional_embeddings": []}',
    b'{"_class_name": "CogVideoXTransformer3DModel"}', b'\xef\xbb\xbf{"_class_name": "CogVideoXTransformer3DModel"}',
    '{"_class_name": "CogVideoXTransformer3DModel"}'.encode("utf-16"),
]  # fmt: skip
INDEXES = [
    b"", b"{}", b"[]", b'{"weight_map": []}', b'{"weight_map": {"a": 7}}', b'{"weight_map": {"a": ""}}', b"[" * 50_000,
    b'{"weight_map": {"a": "../../../secret.safetensors"}}', b'{"weight_map": {"a": "gone.safetensors"}}',
    b'{"weight_map": {"a": "\\u0000"}}', b'{"weight_map": {"a": "one\\ntwo.safetensors"}}',
]  # fmt: skip
OTHER_KINDS = [
    b"", b"\0", bytes(4096), b"GGUF\x03\0\0\0" + bytes(99), b"PK\x03\x04" + bytes(99), b"\x80\x02}q\0." + bytes(99),
    b"<!DOCTYPE html><html>", b"\xef\xbb\xbf<html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    b"Entry not found", b'{"error": "gated"}', b"\x1f\x8b\x08" + bytes(99), b"\x89PNG\r\n",
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 99_999_999) + b"{", struct.pack("<Q", 0) + b"{}", struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 60_000) + b"[" * 60_000, struct.pack("<Q", 250_000) + b'{"a":' * 50_000,
]  # fmt: skip
OTHER_MODELS = [
    ["patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.bias",
     "transformer_blocks.0.attn2.to_k.weight"],
    ["head.modulation", "blocks.0.self_attn.q.weight", "patch_embedding.weight"],
    ["double_blocks.0.img_attn.norm.key_norm.scale", "single_blocks.0.linear1.weight", "img_in.weight"],
    ["txt_in.individual_token_refiner.blocks.0.norm1.weight", "double_blocks.0.img_attn.qkv.weight"],
    ["input_blocks.0.0.weight", "output_blocks.0.0.weight", "middle_block.0.weight"],
    ["joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight"],
    ["first_stage_model.decoder.conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight"],
    ["encoder.conv_in.weight", "decoder.conv_in.weight"],
    ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
    ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
    ["cap_embedder.1.weight", "noise_refiner.0.a"],
    ["blocks.0.norm1.linear.weight"], ["blocks.0.norm1.linear.weight", "patch_embed.text_proj.weight"],
    ["", ".", ".weight"],
]  # fmt: skip


@contextmanager
def corpus(home: Path, seed: int) -> Iterator[None]:
    """Put the files into ComfyUI's base directory `home` for the duration of the `with` block."""
    rng, models, presets = random.Random(seed), home / "models", home / "user" / "psa_presets"
    folders = [models / category / FOLDER for category in ("diffusion_models", "diffusers", "loras")]
    presets.mkdir(parents=True, exist_ok=True)
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        checkpoint = packed(cogvideox(rng))
        write_files(rng, folders[0], {"good": checkpoint, **_variants(rng, cogvideox(rng))})
        write_folders(rng, folders[1], checkpoint)
        write_files(rng, folders[2], dict(loras(rng)))
        for name, content in PRESETS.items():
            (presets / f"{name}.json").write_bytes(content)
        with suppress(OSError):
            (presets / "circle.json").symlink_to(presets / "circle.json")
            (presets / "folder.json").mkdir()
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        for name in PRESETS:
            (presets / f"{name}.json").unlink(missing_ok=True)
        (presets / "circle.json").unlink(missing_ok=True)
        with suppress(OSError):
            (presets / "folder.json").rmdir()


def packed(tensors: Tensors, metadata: object = None) -> bytes:
    """The bytes of a safetensors file."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def floats(rng: random.Random, *shape: int, value: float | None = None) -> tuple[str, tuple[int, ...], bytes]:
    """A float32 tensor of random numbers near 0, or filled with `value`."""
    count = math.prod(shape)
    numbers = (rng.uniform(-0.1, 0.1) for _ in range(count)) if value is None else (value for _ in range(count))
    return "F32", shape, array.array("f", numbers).tobytes()


def cogvideox(rng: random.Random) -> Tensors:
    """A CogVideoX transformer with one head and one block, under diffusers' names."""
    block = "transformer_blocks.0."
    weights = {
        "patch_embed.text_proj": (64, 32), "time_embedding.linear_1": (64, 64), "time_embedding.linear_2": (64, 64),
        block + "norm1.linear": (384, 64), block + "norm2.linear": (384, 64), block + "norm1.norm": (64,),
        block + "norm2.norm": (64,), block + "attn1.norm_q": (64,), block + "attn1.norm_k": (64,),
        block + "attn1.to_q": (64, 64), block + "attn1.to_k": (64, 64), block + "attn1.to_v": (64, 64),
        block + "attn1.to_out.0": (64, 64), block + "ff.net.0.proj": (256, 64), block + "ff.net.2": (64, 256),
        "norm_final": (64,), "norm_out.linear": (128, 64), "norm_out.norm": (64,), "proj_out": (64, 64),
        "patch_embed.proj": (64, 16, 2, 2),
    }  # fmt: skip
    tensors = {f"{name}.weight": floats(rng, *shape) for name, shape in weights.items()}
    return tensors | {f"{name}.bias": floats(rng, shape[0]) for name, shape in weights.items()}


def loras(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """LoRA files for the demo's Wan model: names used by many tools, every kind of weight, right and wrong sizes."""
    with (DEMO_WEIGHTS / "diffusion_models" / "psa_demo_wan_dit.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    sizes = {name.removesuffix(".weight"): tuple(entry["shape"]) for name, entry in header.items() if "shape" in entry}
    layers = {name: size for name, size in sizes.items() if len(size) == 2 and ".blocks." in f".{name}"}
    prefixes = [
        "diffusion_model.",
        "",
        "transformer.",
        "pipe.dit.",
        "transformer_2.",
        "base_model.model.",
        "unet.",
        "model.",
    ]
    for form, make in _FORMS.items():
        for turn in range(3):
            tensors: Tensors = {}
            flat, prefix = rng.random() < 0.3, rng.choice(prefixes)
            for name, (rows, columns) in rng.sample(sorted(layers.items()), min(3, len(layers))):
                key = "lora_unet_" + name.replace(".", "_") if flat else prefix + name
                wrong = rng.choice([1, 3, 2 * columns]) if turn == 2 else columns
                tensors |= {key + end: tensor for end, tensor in make(rng, rows, wrong).items()}
            yield f"{form} {turn}", packed(tensors, rng.choice(_METADATA))
            if turn == 0:
                yield from ((f"{form} {change}", data) for change, data in _variants(rng, tensors).items())


def _down_up(rng: random.Random, rows: int, columns: int, down: str = ".lora_A.weight", up: str = ".lora_B.weight"):
    return {down: floats(rng, 4, columns), up: floats(rng, rows, 4)}


_FORMS: dict[str, Callable[[random.Random, int, int], Tensors]] = {
    "peft": _down_up,
    "kohya": lambda rng, n, m: {
        **_down_up(rng, n, m, ".lora_down.weight", ".lora_up.weight"), ".alpha": floats(rng, value=4.0),
    },
    "old": lambda rng, n, m: _down_up(rng, n, m, ".lora.down.weight", ".lora.up.weight"),
    "named": lambda rng, n, m: _down_up(rng, n, m, ".lora_A.default.weight", ".lora_B.default.weight"),
    "half": lambda rng, n, m: {".lora_A.weight": floats(rng, 4, m)},
    "alphas": lambda rng, n, m: {**_down_up(rng, n, m), ".alpha": floats(rng, 2)},
    "alpha nan": lambda rng, n, m: {**_down_up(rng, n, m), ".alpha": floats(rng, value=math.nan)},
    "nan": lambda rng, n, m: {".lora_A.weight": floats(rng, 4, m, value=math.nan), ".lora_B.weight": floats(rng, n, 4)},
    "ranks": lambda rng, n, m: {".lora_A.weight": floats(rng, 4, m), ".lora_B.weight": floats(rng, n, 5)},
    "flat": lambda rng, n, m: {".lora_A.weight": floats(rng, 4 * m), ".lora_B.weight": floats(rng, n, 4)},
    "rank 0": lambda rng, n, m: {".lora_A.weight": floats(rng, 0, m), ".lora_B.weight": floats(rng, n, 0)},
    "scalar": lambda rng, n, m: {".lora_A.weight": floats(rng), ".lora_B.weight": floats(rng)},
    "dora": lambda rng, n, m: {**_down_up(rng, n, m), ".dora_scale": floats(rng, n, 1)},
    "magnitude": lambda rng, n, m: {**_down_up(rng, n, m), ".lora_magnitude_vector": floats(rng, n)},
    "bias": lambda rng, n, m: {**_down_up(rng, n, m), ".lora_B.bias": floats(rng, n)},
    "diff": lambda rng, n, m: {".diff": floats(rng, n, m), ".diff_b": floats(rng, n)},
    "set": lambda rng, n, m: {".set_weight": floats(rng, n, m)},
    "reshape": lambda rng, n, m: {**_down_up(rng, n, m), ".reshape_weight": ("I64", (2,), struct.pack("<2q", n, m))},
    "loha": lambda rng, n, m: {
        f".hada_w{i}_{side}": floats(rng, *((n, 4) if side == "a" else (4, m))) for i in (1, 2) for side in "ab"
    },
    "lokr": lambda rng, n, m: {".lokr_w1": floats(rng, 2, 2), ".lokr_w2": floats(rng, n // 2, max(1, m // 2))},
    "oft": lambda rng, n, m: {".oft_blocks": floats(rng, 4, n // 4, n // 4), ".alpha": floats(rng, value=1.0)},
    "boft": lambda rng, n, m: {".oft_blocks": floats(rng, 2, 4, n // 4, n // 4)},
    "glora": lambda rng, n, m: {
        ".a1.weight": floats(rng, 4, m), ".a2.weight": floats(rng, m, 4),
        ".b1.weight": floats(rng, 4, m), ".b2.weight": floats(rng, n, 4),
    },
    "odd": lambda rng, n, m: {".lora_C.weight": floats(rng, 4, m), "..weight": floats(rng, 1), "": floats(rng, 1)},
}  # fmt: skip
_METADATA = [
    None, None, None, {}, {"lora_adapter_metadata": "{"}, {"lora_adapter_metadata": "[]"},
    {"lora_adapter_metadata": "[" * 9999},
    {"lora_adapter_metadata": '{"transformer.lora_alpha": "x"}'},
    {"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'},
    {"lora_adapter_metadata": '{"lora_alpha": 8, "alpha_pattern": {"(a+)+$": 4, "*": 1}}'},
    {"lora_adapter_metadata": '{"lora_alpha": 8, "alpha_pattern": [1]}'},
    {"lora_adapter_metadata": '{"lora_alpha": NaN}'},
    {"lora_adapter_metadata": '{"lora_alpha": 1e400, "use_rslora": "x"}'}, {"ss_network_args": "{"}, {"config": "{"},
    {"lora_adapter_metadata": '{"lora_alpha": 8, "r": {}, "rank_pattern": {"q": "x"}}'}, 7, [], "text", {"a": 1},
]  # fmt: skip


def _variants(rng: random.Random, tensors: Tensors) -> dict[str, bytes]:
    """Damaged versions of a good file, by the kind of damage."""
    good = packed(tensors)
    data_start = 8 + struct.unpack("<Q", good[:8])[0]
    header, names = good[8:data_start], list(tensors)
    found: dict[str, bytes] = {f"cut {i}": good[: rng.randrange(1, len(good))] for i in range(3)}
    for i in range(3):
        flipped = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            flipped[rng.randrange(data_start)] ^= 1 << rng.randrange(8)
        found[f"flipped {i}"] = bytes(flipped)
    found["longer"] = good + bytes(9)
    found["twice"] = struct.pack("<Q", 2 * len(header) - 1) + header[:-1] + b"," + header[1:] + good[data_start:]
    found["spaces"] = struct.pack("<Q", len(header) + 99) + header + b" " * 99 + good[data_start:]
    found["mark"] = struct.pack("<Q", len(header) + 3) + b"\xef\xbb\xbf" + header + good[data_start:]
    for kind, size in (
        ("F16", 2),
        ("BF16", 2),
        ("F8_E4M3", 1),
        ("I64", 8),
        ("U8", 1),
        ("BOOL", 1),
        ("F4", 1),
        ("X", 1),
    ):
        changed = {name: (kind, shape, bytes(size * math.prod(shape))) for name, (_, shape, _) in tensors.items()}
        found[f"type {kind}"] = packed(changed)
    victim = rng.choice(names)
    kind, shape, data = tensors[victim]
    found["one missing"] = packed({name: tensor for name, tensor in tensors.items() if name != victim})
    found["one odd"] = packed(tensors | {victim: floats(rng, *shape[:-1], 3)})
    found["one flat"] = packed(tensors | {victim: (kind, (math.prod(shape),), data)})
    found["one empty"] = packed(tensors | {victim: (kind, (0, *shape), b"")})
    found["one deep"] = packed(tensors | {victim: (kind, (1,) * 40 + shape, data)})
    found["one nan"] = packed(tensors | {victim: floats(rng, *shape, value=rng.choice([math.nan, math.inf]))})
    found["one integer"] = packed(tensors | {victim: ("I32", shape, data)})
    found["more"] = packed(tensors | {"extra.weight": floats(rng, 2), "": floats(rng, 1), "\n\ud800": floats(rng, 1)})
    found["prefixed"] = packed({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()})
    found["metadata"] = packed(tensors, rng.choice(_METADATA))
    return found


def write_files(rng: random.Random, folder: Path, files: dict[str, bytes]) -> None:
    """Write the given files, files of other kinds and models, and links and folders with a file's name."""
    some = next(iter(files.values()))
    for number, content in enumerate(OTHER_KINDS):
        files[f"kind {number}"] = content
    for number, names in enumerate(OTHER_MODELS):
        files[f"model {number}"] = packed(
            {name: floats(rng, *rng.choice([(4,), (4, 4), (4, 4, 2, 2)])) for name in names}
        )
    files |= {name: rng.choice([some, b"", some[:100]]) for name in NAMES}
    for name, content in files.items():
        with suppress(OSError):  # this file system may not allow the name
            (folder / f"{name}.safetensors").write_bytes(content)
    (folder / "folder.safetensors").mkdir(exist_ok=True)
    with suppress(OSError):
        for name, target in {"circle": "circle.safetensors", "nowhere": "gone", "good": "kind 3.safetensors"}.items():
            (folder / f"link {name}.safetensors").symlink_to(target.replace("circle", "link circle"))
        (folder / "adapter_model.safetensors").write_bytes(some)
        (folder / "adapter_config.json").write_bytes(rng.choice(CONFIGS))


def write_folders(rng: random.Random, folder: Path, checkpoint: bytes) -> None:
    """Write folders in diffusers' layout, some good, some with a faulty config, index, weights or scheduler."""
    for number in range(60):
        place = folder / (NAMES[number] if number < len(NAMES) - 1 else f"folder {number}")
        with suppress(OSError):
            inside = place / "transformer" if rng.random() < 0.8 else place
            inside.mkdir(parents=True)
            if rng.random() < 0.9:
                (inside / "config.json").write_bytes(CONFIGS[number % len(CONFIGS)])
            content = rng.choice([checkpoint, checkpoint, checkpoint[:-9], *OTHER_KINDS[:4]])
            name = rng.choice(["", "-00001-of-00001", "-00001-of-00002", ".fp16", "-00002-of-00002"])
            if rng.random() < 0.8:
                (inside / f"diffusion_pytorch_model{name}.safetensors").write_bytes(content)
            if rng.random() < 0.5:
                (inside / "diffusion_pytorch_model.safetensors.index.json").write_bytes(rng.choice(INDEXES))
            if rng.random() < 0.5:
                (place / "scheduler").mkdir()
                (place / "scheduler" / "scheduler_config.json").write_bytes(rng.choice([*CONFIGS, *_SCHEDULERS]))
            if rng.random() < 0.2:
                (place / "model_index.json").write_bytes(rng.choice(CONFIGS))
            if rng.random() < 0.1:  # not to a parent folder: ComfyUI's own loader would walk that for ever
                (inside / "circle").symlink_to(inside / "circle", target_is_directory=True)


_SCHEDULERS = [
    b'{"snr_shift_scale": 3.0}', b'{"num_train_timesteps": 1e9}', b'{"num_train_timesteps": 2}', b'{"beta_end": 0.999}',
    b'{"prediction_type": "epsilon"}', b'{"trained_betas": [1]}', b'{"beta_schedule": "x"}', b'{"beta_start": NaN}',
    b'{"prediction_type": {}}', b'{"rescale_betas_zero_snr": false, "snr_shift_scale": 0.01}',
]  # fmt: skip
