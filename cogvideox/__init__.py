"""What ComfyUI's native CogVideoX needs to be correct: positions, noise schedule, sampler, image conditioning.

Knows nothing about files or PSA. diffusers is the reference; it takes seconds to import, so only functions import it.
"""
