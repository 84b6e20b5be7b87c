"""The processes that train one network together, one per device. torch's DistributedDataParallel averages gradients,
and the leader's clock applies to all. A team of one does not need torch.distributed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

RANK, SIZE, MEETING = "PSA_TRAINING_RANK", "PSA_TRAINING_SIZE", "PSA_TRAINING_MEETING"
"""Environment variables of a process: its number, the number of processes, and a new file used to connect them."""


@dataclass(frozen=True)
class Team:
    """One of `size` processes; number 0 leads: it keeps time, writes the files and prints."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, value: float) -> float:
        """Return the leader's value in every process."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(box, 0)
        return float(box)

    def wrap(self, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """The model, with a backward pass that averages the gradients over the team."""
        if self.size == 1:
            return model
        # Blocks are compiled one by one and gradients are sent between them, so blocks need not be split any further.
        torch._dynamo.config.optimize_ddp = False
        places = [device.index] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=places, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=64
        )

    def divide(
        self, parameters: list[torch.nn.Parameter], kind: type[torch.optim.Optimizer], **options: object
    ) -> torch.optim.Optimizer:
        """An optimiser in which every process updates its share of the parameters and sends them to the others."""
        if self.size == 1:
            return kind(parameters, **options)
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, optimizer_class=kind, **options)

    def gather(self, text: str) -> list[str]:
        """Return the text of every process, the leader's first."""
        if self.size == 1:
            return [text]
        found = [""] * self.size
        torch.distributed.all_gather_object(found, text)
        return found

    def part(self) -> None:
        """Wait for all processes and close the connection."""
        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


ALONE = Team()


def join_team(device: torch.device) -> Team:
    """Join the team given by the environment variables; a team of one if there are none."""
    size = int(os.environ.get(SIZE, "1"))
    if size == 1:
        return ALONE
    rank = int(os.environ[RANK])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    meeting = Path(os.environ[MEETING]).absolute().as_uri()
    torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=size)
    return Team(rank, size)


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of a model's weights."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def member(rank: int, size: int, meeting: Path) -> dict[str, str]:
    """The environment variables for a process that is about to start."""
    return {RANK: str(rank), SIZE: str(size), MEETING: str(meeting)}
