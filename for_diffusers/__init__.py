"""PSA for diffusers pipelines, without ComfyUI: `apply_psa(pipe)` and `remove_psa(pipe)`, `enable_ulysses(pipe)`; and
`LocalAttention` for other engines of several GPUs."""

from .apply import AppliedPSA, apply_psa, remove_psa
from .local import LocalAttention
from .ulysses import enable_ulysses

__all__ = ["AppliedPSA", "LocalAttention", "apply_psa", "enable_ulysses", "remove_psa"]
