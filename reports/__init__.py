"""Pictures and picture figures for the nodes: Pillow, numpy and torch; knows nothing of ComfyUI or of models."""
