"""The mathematics of Pyramid Sparse Attention (arXiv 2512.04025): torch and triton only, no ComfyUI.

`pyramid_sparse_attention` is the one public entry. Every idea has its own file with the plain torch reference. The
Triton kernel is in the file of the same name in `gpu/`.
"""

from .attention import AttentionResult, pyramid_sparse_attention
from .config import ConfigError, PyramidConfig
from .order import TokenLayout, TokenOrder, make_order

__all__ = [
    "AttentionResult",
    "ConfigError",
    "PyramidConfig",
    "TokenLayout",
    "TokenOrder",
    "make_order",
    "pyramid_sparse_attention",
]
