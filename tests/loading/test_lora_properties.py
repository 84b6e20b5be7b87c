"""LoRA files from a grammar of names, forms and sizes: what the loader reports is what happens to the weights.

The grammar knows what each of its entries must come to; what it is compared with are the weights that ComfyUI samples
with. Values are checked where the form's formula is a line.
"""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from comfyui_psa.choices.errors import InputError
from comfyui_psa.loading.lora import apply_lora

# Native name, diffusers' name.
MODULES = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.0.ffn.2": "blocks.0.ffn.net.2",
    "time_projection.1": "condition_embedder.time_proj",
    "patch_embedding": "patch_embedding",
}
WRAPPERS = {
    ".": ["", "diffusion_model.", "transformer.", "base_model.model.", "transformer.base_model.model.", "pipe.dit.",
          "unet.", "model.", "model.diffusion_model.", "_orig_mod.", "transformer._orig_mod.", "module.", "my_wan."],
    "_": ["lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_", "lora_unet__orig_mod_", "lora_dit_", ""],
}  # fmt: skip
PAIRS = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.my-adapter.weight", "lora_B.my-adapter.weight"),
    ("lora_A", "lora_B"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
]
RANK = 4
STRENGTHS = [-1.0, 0.5, 1.0, 20.0]


@pytest.fixture(scope="module")
def wan(tiny_wan):
    return tiny_wan.load("t2v", num_layers=1, dim=128, ffn_dim=128, num_heads=1)


def weights(model):
    return {key.removeprefix("diffusion_model."): value for key, value in model.model.state_dict().items()}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def low_rank(rows, columns, pair):
    down, up = PAIRS[pair]
    tensors = {down: random(RANK, columns), up: random(rows, RANK)}
    return tensors, tensors[up] @ tensors[down]


def loha(rows, columns, _):
    parts = {"w1_a": random(rows, RANK), "w1_b": random(RANK, columns), "w2_a": random(rows, RANK, seed=1)}
    parts["w2_b"] = random(RANK, columns, seed=1)
    delta = (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
    return {f"hada_{name}": value for name, value in parts.items()}, delta


def lokr(rows, columns, _):
    first, second = random(4, 2), random(rows // 4, columns // 2)
    return {"lokr_w1": first, "lokr_w2": second}, torch.kron(first, second)


def difference(rows, columns, _):
    return {"diff": random(rows, columns)}, random(rows, columns)


def glora(rows, columns, _):
    parts = {"a1": (columns, RANK), "a2": (RANK, columns), "b1": (rows, RANK), "b2": (RANK, columns)}
    return {f"{name}.weight": random(*size) * 0.1 for name, size in parts.items()}, None


def oft(rows, columns, _):
    return {"oft_blocks": random(rows // 8, 8, 8)}, None


def boft(rows, columns, _):
    return {"oft_blocks": random(2, rows // 8, 8, 8), "alpha": torch.tensor(0.0)}, None


def dora(rows, columns, pair):
    tensors, _ = low_rank(rows, columns, pair)
    return tensors | {"dora_scale": random(rows, 1) + 2}, None


def peft_dora(rows, columns, pair):
    tensors, _ = low_rank(rows, columns, pair)
    return tensors | {"lora_magnitude_vector": random(rows).abs() + 2}, None


MULTIPLIED = {"lora": low_rank, "loha": loha, "lokr": lokr, "glora": glora, "oft": oft, "boft": boft}
MULTIPLIED |= {"dora": dora, "peft dora": peft_dora}
PLAIN = {"diff": difference, "whole": lambda *size: ({"set_weight": random(*size[:2])}, None)}
PLAIN |= {"norm": lambda *size: ({"w_norm": random(*size[:2])}, random(*size[:2]))}

entries = st.dictionaries(
    st.sampled_from(sorted(MODULES)),
    st.tuples(
        st.sampled_from(sorted(MULTIPLIED | PLAIN)),
        # Other sizes are rare, or nearly every file would be refused; the last one has as many elements as the right.
        st.sampled_from(["right"] * 12 + ["rows", "as many"]),
        st.sampled_from(["", "", "bias", "other bias", "unknown part", "half", "never patched"]),
    ),
    min_size=1,
)
files = st.fixed_dictionaries(
    {
        "entries": entries,
        "separator": st.sampled_from("._"),
        "wrapper": st.integers(0, 99),
        "native": st.booleans(),
        "pair": st.integers(0, len(PAIRS) - 1),
        "strays": st.lists(
            st.sampled_from(["text_encoder.layers.0.lora_A.weight", "lost.diff", "junk"]),
            unique=True,
        ),
        "strength": st.sampled_from(STRENGTHS),
    }
)


def write(model, file, path):
    """Write the file; returns what must come of it: weight -> its change (None: some change), keys left, refused."""
    before = weights(model)
    wrappers = WRAPPERS[file["separator"]]
    wrapper = wrappers[file["wrapper"] % len(wrappers)]
    tensors, changes, left, refused = {}, {}, 0, False
    for native, (form, size, extra) in file["entries"].items():
        name = native if file["native"] else MODULES[native]
        name = wrapper + name.replace(".", file["separator"])
        weight = before[f"{native}.weight"]
        rows, columns = weight.shape[0], weight[0].numel()
        given = {"right": (rows, columns), "rows": (rows + 8, columns), "as many": (rows * 2, columns // 2)}[size]
        make = (MULTIPLIED | PLAIN)[form]
        parts, delta = make(*given, file["pair"])
        if form in PLAIN and weight.ndim > 2 and size == "right":
            parts = {part: value.reshape(weight.shape) for part, value in parts.items()}
        if form == "dora":
            parts["dora_scale"] = parts["dora_scale"].reshape(-1, *[1] * (weight.ndim - 1))
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        # OFT's and BOFT's blocks know rows only; GLoRA's of a matrix are not those of a convolution.
        fits = size == "right" or (form in ("oft", "boft") and given[0] == rows)
        fits = fits and not (form == "glora" and weight.ndim > 2)
        if fits:
            change = delta if delta is None else delta.reshape(weight.shape)
            changes[f"{native}.weight"] = change
        elif form in PLAIN:
            left += len(parts)
        else:
            refused = True
        if extra == "bias":
            tensors[f"{name}.diff_b"] = random(rows)
            changes[f"{native}.bias"] = random(rows)
        elif extra == "other bias":
            tensors[f"{name}.diff_b"] = random(rows + 1)
            left += 1
        elif extra == "unknown part":
            tensors[f"{name}.somebody_s_invention"] = random(3)
            left += 1
        elif extra == "never patched":
            key = wrapper + "blocks.0.modulation".replace(".", file["separator"]) + ".diff"
            left += key not in tensors
            tensors[key] = random(*before["blocks.0.modulation"].shape)
        elif extra == "half" and form not in ("lora", "dora", "peft dora"):
            tensors[f"{name}.lora_up.weight"] = random(rows, RANK)
            refused = True
    tensors |= {stray: random(3) for stray in file["strays"]}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return changes, left + len(file["strays"]), refused or not changes


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(file=files)
def test_what_is_reported_is_what_happens(wan, model_folders, file):
    import comfy.model_management

    path = model_folders / "loras" / "grammar.safetensors"
    changes, left, refused = write(wan, file, path)
    before = {name: value.clone() for name, value in weights(wan).items()}
    strength = file["strength"]
    if refused:
        with pytest.raises(InputError, match="PSA LoRA Loader, input lora_name: "):
            apply_lora(wan, path.name, strength)
        return
    patched, summary = apply_lora(wan, path.name, strength)
    comfy.model_management.load_models_gpu([patched])
    after = {name: value.clone() for name, value in weights(patched).items()}
    patched.detach()

    assert summary.startswith(f"LoRA {path.name}: {len(changes)} weights of the model patched, strength {strength:g}")
    assert "\n" not in summary
    assert sum(map(int, re.findall(r"; (\d+) of \d+ keys", summary))) == left, summary
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(changes)
    for name, change in changes.items():
        if change is not None:
            torch.testing.assert_close(after[name], before[name] + strength * change, rtol=1e-3, atol=1e-3)
