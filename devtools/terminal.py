"""What dev.py says: one sentence per failure, one line per phase.

On a terminal a phase is one line that is rewritten; elsewhere (CI, a pipe) it is plain lines, a few seconds apart.
Standard library only.
"""

from __future__ import annotations

import os
import shutil
import sys
import time


class Failure(Exception):
    """Ends dev.py with one clear sentence and an exit code; never with a traceback."""

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def is_interactive() -> bool:
    """True when the output is a terminal that a person looks at."""
    return sys.stdout.isatty() and not os.environ.get("CI")


class Phase:
    """Context manager: shows `title`, the seconds it has taken and what it is doing now.

    Usage: `with Phase("Installing packages") as phase: phase.update("torch")`.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._detail = ""
        self._interactive = is_interactive()
        self._interval = 0.1 if self._interactive else 10.0

    def __enter__(self) -> Phase:
        self._began = self._shown = time.monotonic()
        if self._interactive:
            self._show()
        else:
            print(self.title, flush=True)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
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

    def update(self, detail: str | None = None) -> None:
        """Show `detail` (None keeps the last one); cheap enough to be called at every turn of a loop."""
        if detail is not None:
            self._detail = detail
        if time.monotonic() - self._shown >= self._interval:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._interactive:
            self._rewrite(f"{self.title} ({self.seconds:.0f} s) {self._detail}")
        else:
            print(f"  {self.seconds:.0f} s {self._detail}", flush=True)

    @staticmethod
    def _rewrite(line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print("\r" + line[:width].ljust(width), end="", flush=True)
