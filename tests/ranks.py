"""Processes that compute together by torch.distributed, on this CPU or a GPU each, and what they are asked to do.

A test asks for a function of a file by name, with arguments that are plain Python. Every process loads the file, calls
the function, and saves what it returns. Run as a script, this file is one of these processes.
"""

import ast
import importlib.util
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 60
"""After so long, a process that waits for one that will not come gives up."""


class Ranks:
    """Processes that stay, since importing diffusers takes seconds; new ones after a failure."""

    def __init__(self, folder):
        self.folder, self.processes, self.calls, self.group = folder, [], 0, None

    def run(self, count, path, function, **arguments):
        """What the function in the file at `path` returned in each of `count` processes, in the order of ranks.

        Raises:
            RuntimeError: with what each of them said, if it failed in any.
        """
        self.calls += 1
        while len(self.processes) < count:
            self._start()
        if self.group is None or self.group["count"] != count:
            self.group = {"count": count, "meeting": str(self.folder / f"meeting-{self.calls}")}
        outputs = [self.folder / f"{self.calls}-{rank}.pt" for rank in range(count)]
        asked = self.processes[:count]
        for process, output in zip(asked, outputs, strict=True):
            call = {"path": str(path), "function": function, "arguments": arguments, "output": str(output)}
            process.stdin.write(f"{call | {'group': self.group}!r}\n")
            process.stdin.flush()
        said = [ast.literal_eval(process.stdout.readline() or "'the process ended'") for process in asked]
        if any(said):
            self.stop()
            raise RuntimeError("\n".join(f"rank {rank}: {words}" for rank, words in enumerate(said)))
        return [torch.load(output, weights_only=False) for output in outputs]

    def _start(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, __file__, str(len(self.processes))]
        self.processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )

    def stop(self):
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        self.processes, self.group = [], None


def load(path):
    """The module in a file, whatever its folder."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(rank):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    load(ROOT / "workshop" / "pack.py").load_pack()
    group = None
    for line in sys.stdin:
        call, said = ast.literal_eval(line), None
        try:
            if call["group"] != group:
                group = call["group"]
                _join(rank, **group)
            result = getattr(load(call["path"]), call["function"])(**call["arguments"])
            torch.save(result, call["output"])
        except Exception:
            said = traceback.format_exc()
        answers.write(f"{said!r}\n")
        answers.flush()


def _join(rank, count, meeting):
    """Leave the group of before, and compute with those that are told the same meeting."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gpus = torch.cuda.device_count() >= count
    if gpus:
        torch.cuda.set_device(rank)
    else:
        stand_in_for_gpus()
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        init_method=Path(meeting).as_uri(),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=_SECONDS),
    )


def stand_in_for_gpus():
    """diffusers divides by the number of GPUs, puts the lengths of unequal parts on one, and gathers unequal parts,
    which gloo cannot."""
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.current_accelerator = lambda *_: torch.device("cpu")

    def all_gather(outputs, tensor, group=None):
        for rank, output in enumerate(outputs):
            if rank == torch.distributed.get_rank(group):
                output.copy_(tensor)
            torch.distributed.broadcast(output, group=group, group_src=rank)

    torch.distributed.all_gather = all_gather


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
