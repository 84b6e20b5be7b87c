"""How a loaded ComfyUI model is changed to use PSA. Imports kernels, is imported by nodes; knows no node schema."""
