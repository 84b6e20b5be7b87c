"""The error of kernels that compute wrong results, which `gpu/self_check.py` raises."""

from __future__ import annotations


class KernelError(RuntimeError):
    """The kernels compute wrong results on this machine; the message is the reason why calls stay dense."""

    def __init__(self, machine: str, differs: str) -> None:
        """machine: the device, its driver and compiler; differs: what was wrong, as a part of a sentence."""
        super().__init__(reason(machine, differs))


def reason(machine: str, differs: str) -> str:
    """Why nothing is sparse on a machine on which a call was wrong."""
    return (
        f"the kernels compute wrong results on {machine}: {differs}; update the GPU's driver and Triton or delete the "
        f"files comfyui_psa_check.json in Triton's cache, PSA then checks them again"
    )
