"""What ComfyUI's native CogVideoX needs to be right: positions, noise schedule, sampler, image conditioning.

Knows nothing of files and of PSA. diffusers is the reference; it takes seconds to import, so only functions import it.
"""
