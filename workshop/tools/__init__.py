"""The parts of `dev.py`: environment, ComfyUI server, API client, workflows, demo and report.

Not part of the node pack: nothing in `nodes/`, `patching/` or `kernels/` imports it. The modules that run before the
virtual environment exists (`terminal`, `paths`, `environment`, `comfyui_source`) use only the standard library.
"""
