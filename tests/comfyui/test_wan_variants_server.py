"""Every Wan variant on a real server, wired as users wire it: core's own node makes its conditioning, PSA is sparse.

Random and tiny weights; the demo's conditioning replaces a text encoder of 10 GB, its VAE encodes what the nodes
are given. Where the tokens lie is checked by tests/patching/test_wan_variants.py.
"""

import json

import pytest
from safetensors.torch import save_file

from comfyui_psa.workshop.tools.workflow import default_value, inputs_of

# Core's HuMo without audio fails, with or without PSA, where the tokens do not divide by 5.
SIZE = {"width": 160, "height": 160, "length": 9}
GRID = [3, 10, 10]
IMAGE, VIDEO, STILLS = ["image", 0], ["video", 0], ["stills", 0]

# kind of `tiny_wan`, node and its inputs, sparse calls of a step. Rows of the table of models in
# docs/compatibility.md.
CASES = {
    "T2V": ("t2v", None, {}, 2),
    "5B": ("5b", None, {}, 2),
    "I2V 2.1": ("i2v", "WanImageToVideo", {"start_image": IMAGE}, 2),
    "I2V 2.2": ("i2v 2.2", "WanImageToVideo", {"start_image": IMAGE}, 2),
    "first-last frame": ("flf", "WanFirstLastFrameToVideo", {"start_image": IMAGE, "end_image": IMAGE}, 2),
    "Fun, with reference": ("fun", "Wan22FunControlToVideo", {"ref_image": IMAGE, "control_video": VIDEO}, 2),
    "VACE": ("vace", "WanVaceToVideo", {"control_video": VIDEO}, 3),
    "Camera 2.1": (
        "camera", "WanCameraImageToVideo", {"start_image": IMAGE, "camera_conditions": ["camera", 0]}, 2,
    ),
    "Camera 2.2": (
        "camera 2.2", "WanCameraImageToVideo", {"start_image": IMAGE, "camera_conditions": ["camera", 0]}, 2,
    ),
    "Animate": ("animate", "WanAnimateToVideo", {"reference_image": IMAGE, "pose_video": VIDEO}, 5),
    "S2V": ("s2v", "WanSoundImageToVideo", {"ref_image": IMAGE}, 2),
    "HuMo": ("humo", "WanHuMoImageToVideo", {"ref_image": IMAGE}, 2),
    "Phantom": ("t2v", "WanPhantomSubjectToVideo", {"images": STILLS}, 2),
    "Bernini": ("t2v", "BerniniConditioning", {"source_video": VIDEO}, 2),
    "SCAIL": ("scail", "WanSCAILToVideo", {"reference_image": IMAGE, "pose_video": VIDEO}, 2),
    "SCAIL-2": ("scail2", "WanSCAILToVideo", {"reference_image": IMAGE, "pose_video": VIDEO}, 2),
    "WanDancer": ("wandancer", "WanDancerVideo", {"start_image": IMAGE}, 2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_sparse_on_a_real_server(server, client, definitions, tiny_wan, name):
    kind, variant, inputs, calls = CASES[name]

    def node(class_type, **wired):
        specs = inputs_of(definitions[class_type])
        values = {spec.name: default_value(spec) for spec in specs if spec.is_widget}
        size = {key: SIZE[key] for key in SIZE if key in values}
        return {"class_type": class_type, "inputs": values | size | wired}

    folder = server.home / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    save_file(tiny_wan.state_dict(kind), folder / f"{name}.safetensors")
    prompt = {
        "model": node("UNETLoader", unet_name=f"{name}.safetensors"),
        "scene": node("PSADemoScene"),
        "patch": node("PSAPatch", model=["model", 0], sparsity=0.5, start_percent=0.3, min_tokens=0),
    }
    positive, negative, latent = ["scene", 0], ["scene", 0], ["latent", 0]
    if variant is None:
        twice = {key: 2 * SIZE[key] for key in ("width", "height")}  # 5B's latent is half as fine
        prompt["latent"] = node("EmptyHunyuanLatentVideo", **twice if kind == "5b" else {})
    else:
        common = {"positive": ["scene", 0], "negative": ["scene", 0], "vae": ["vae", 0]}
        prompt |= {
            "vae": node("VAELoader", vae_name="psa_demo_wan_vae.safetensors"),
            "image": node("EmptyImage", color=0x904020),
            "stills": node("EmptyImage", color=0x904020, batch_size=2),
            "video": node("EmptyImage", color=0x204090, batch_size=9),
            "camera": node("WanCameraEmbedding"),
            "variant": node(variant, **common, **inputs),
        }
        names = definitions[variant]["output_name"]
        positive, negative = (["variant", place] for place in (0, 1))
        latent = ["variant", names.index("latent")]
    sampling = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    prompt |= {
        "sampler": node(
            "KSampler", model=["patch", 0], positive=positive, negative=negative, latent_image=latent, **sampling
        ),
        "report": node("PSAReport", model=["patch", 0], samples=["sampler", 0]),
        "save": node("SaveLatent", samples=["report", 0], filename_prefix="test/variants"),
    }
    told = json.loads(client.run(prompt).outputs["report"]["text"][0])
    assert told["grid"] == GRID
    assert [step["sparse_calls"] for step in told["steps"]] == [0, calls]
    assert told["mean_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert told["fallbacks"] == []
