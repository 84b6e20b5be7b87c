"""The LoRA nodes: load one, download one. Schemas only; the work is in `loading`."""

from __future__ import annotations

from typing import ClassVar

from comfy_api.latest import io

from ..loading.download import FILE, REPOSITORY, DownloadError
from ..loading.fingerprint import lora_fingerprint
from ..loading.lora import STRENGTH, apply_lora
from ..loading.lora_folders import check_download, download_into_loras, list_loras
from .base import PSANode


class PSALoraLoader(PSANode):
    """Load a LoRA for CogVideoX or Wan, whatever tool wrote it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSALoraLoader",
            display_name="PSA LoRA Loader",
            accept_all_inputs=True,
            category="model/loaders",
            description=(
                "Loads a LoRA onto a CogVideoX or Wan model: names from diffusers/PEFT, kohya, lightx2v and ComfyUI, "
                "scale from its alpha tensors or its metadata. A LoRA that matches nothing in the model is an error. "
                "You can chain several."
            ),
            search_aliases=[
                "lora",
                "wan lora",
                "diffusers lora",
                "peft",
                "cogvideox lora",
                "lightx2v",
                "4 steps",
                "加载 LoRA",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX or Wan model."),
                io.Combo.Input(
                    "lora_name",
                    options=list_loras(),
                    tooltip="A .safetensors file in models/loras, or in the folder weights/ of this node pack.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-STRENGTH,
                    max=STRENGTH,
                    step=0.01,
                    tooltip="1.0 is what it was trained for and what the 4-step LoRA needs; 0 turns it off.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(display_name="summary", tooltip="A sentence on how many weights were patched."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = "", **_):
        return lora_fingerprint(lora_name)

    @classmethod
    def run(cls, model, lora_name: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(*apply_lora(model, lora_name, strength))


class PSALoraDownload(PSANode):
    """Download a LoRA from the Hugging Face hub into ComfyUI's loras folder."""

    rules = (check_download,)
    told: ClassVar = {DownloadError: "file"}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PSALoraDownload",
            display_name="PSA LoRA Download",
            accept_all_inputs=True,
            category="model/loaders",
            description=(
                "Downloads a LoRA from the Hugging Face hub into models/loras when this node runs, by default the "
                "4-step LoRA for CogVideoX-5B. An interrupted download goes on where it stopped. Press R afterwards, "
                "and the LoRA menus list it."
            ),
            search_aliases=["huggingface", "BLADE", "4-step lora", "download lora", "下载 LoRA"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.String.Input("repository", default=REPOSITORY, tooltip="Owner and name on huggingface.co."),
                io.String.Input(
                    "file",
                    default=FILE,
                    tooltip="Path of a .safetensors file in the repository; it gets the same path in models/loras.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The name in the LoRA menus.")],
        )

    @classmethod
    def run(cls, repository: str, file: str) -> io.NodeOutput:
        name = download_into_loras(repository, file)
        return io.NodeOutput(name, ui={"text": [name]})
