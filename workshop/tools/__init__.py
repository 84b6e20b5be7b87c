"""What `dev.py` is made of: environment, ComfyUI server, API client, workflows, demo and report.

Not part of the node pack: nothing in `nodes/`, `patching/` or `kernels/` imports it. Modules that run before the
virtual environment exists (`terminal`, `paths`, `environment`, `comfyui_source`) use the standard library only.
"""
