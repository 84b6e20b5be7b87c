"""Pictures and image metrics for the nodes: Pillow, numpy and torch; knows nothing about ComfyUI or models."""
