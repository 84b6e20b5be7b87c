"""PSA for diffusers pipelines, without ComfyUI: `apply_psa(pipe)` and `remove_psa(pipe)`."""

from .apply import AppliedPSA, apply_psa, remove_psa

__all__ = ["AppliedPSA", "apply_psa", "remove_psa"]
