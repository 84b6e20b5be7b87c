"""The processes that train one network together, one a device: gradients are averaged by torch's own
DistributedDataParallel, and all agree on the clock of the first. A team of one needs no torch.distributed.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

RANK, SIZE, MEETING = "PSA_TRAINING_RANK", "PSA_TRAINING_SIZE", "PSA_TRAINING_MEETING"
"""Environment of a process: its number, how many there are, and a file that does not exist yet, where they meet."""


@dataclass(frozen=True)
class Team:
    """This process among `size`; number 0 leads: it keeps the clock, writes the files and speaks."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, value: float) -> float:
        """The leader's value, in every process."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(box, 0)
        return float(box)

    def wrap(self, model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """The model, whose backward pass averages the gradients over the team."""
        if self.size == 1:
            return model
        # Blocks are compiled one by one, and between them gradients are sent already: no need to cut them up for that.
        torch._dynamo.config.optimize_ddp = False
        places = [device.index] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=places, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=64
        )

    def divide(
        self, parameters: list[torch.nn.Parameter], kind: type[torch.optim.Optimizer], **options: object
    ) -> torch.optim.Optimizer:
        """An optimiser of which every process takes a share of the parameters, and sends them to the others."""
        if self.size == 1:
            return kind(parameters, **options)
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, optimizer_class=kind, **options)

    def gather(self, text: str) -> list[str]:
        """What every process says, the leader first."""
        if self.size == 1:
            return [text]
        found = [""] * self.size
        torch.distributed.all_gather_object(found, text)
        return found

    def part(self) -> None:
        """Wait for all and end the connection."""
        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


ALONE = Team()


def join_team(device: torch.device) -> Team:
    """The team that the environment tells of; one alone where it tells of none."""
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
    """Environment of a process to be started."""
    return {RANK: str(rank), SIZE: str(size), MEETING: str(meeting)}
