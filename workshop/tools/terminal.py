"""dev.py's output: one sentence per failure, one line per phase.

On a terminal, a phase is one line that keeps being rewritten; elsewhere (CI, a pipe) it is plain lines, seconds apart.
Standard library only.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time


class Failure(Exception):
    """Ends dev.py with one clear sentence and an exit code, never with a traceback."""

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def is_interactive() -> bool:
    """True if the output goes to a terminal that someone is watching."""
    return sys.stdout.isatty() and not os.environ.get("CI")


class Phase:
    """Context manager: shows `title`, the seconds so far and the current activity until the block ends.

    Usage: `with Phase("Installing packages") as phase: phase.update("torch")`.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._detail = ""
        self._interactive = is_interactive()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Phase:
        self._began = time.monotonic()
        if not self._interactive:
            print(self.title, flush=True)
        self._ticker.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._ticker.join()
        ending = "failed" if error else "done"
        if self._interactive:
            self._rewrite(f"{self.title}: {ending} ({self.seconds:.0f} s)")
            print(flush=True)
        else:
            print(f"  {ending} ({self.seconds:.0f} s)", flush=True)

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self._began

    def update(self, detail: str) -> None:
        """Set the current activity; cheap, since it is shown only at the next tick."""
        self._detail = detail

    def _tick(self) -> None:
        while not self._ended.wait(0.2 if self._interactive else 10):
            if self._interactive:
                self._rewrite(f"{self.title} ({self.seconds:.0f} s) {self._detail}")
            else:
                print(f"  {self.seconds:.0f} s {self._detail}".rstrip(), flush=True)

    @staticmethod
    def _rewrite(line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print("\r" + line[:width].ljust(width), end="", flush=True)
