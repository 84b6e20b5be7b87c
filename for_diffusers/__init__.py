"""PSA for diffusers pipelines, without ComfyUI: `apply_psa(pipe)` and `remove_psa(pipe)`, `enable_ulysses(pipe)`."""

from .apply import AppliedPSA, apply_psa, remove_psa
from .ulysses import enable_ulysses

__all__ = ["AppliedPSA", "apply_psa", "enable_ulysses", "remove_psa"]
