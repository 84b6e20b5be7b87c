"""ComfyUI-PSA: Pyramid Sparse Attention for video diffusion models. The face of the pack; nothing is computed here."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to learn the nodes of this pack."""
    from .nodes import PSAExtension

    return PSAExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
