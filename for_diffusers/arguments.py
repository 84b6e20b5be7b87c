"""What `apply_psa` and `LocalAttention` are given, checked: a wrong argument ends in a sentence that says what was
given, what is allowed, and what to do."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from ..choices.presets import Preset, load_presets
from ..choices.settings import check_reuse
from ..kernels.config import ConfigError, PyramidConfig
from ..kernels.falling import check_falling
from ..kernels.refusal import refusal

_SETTINGS = tuple(field.name for field in dataclasses.fields(PyramidConfig) if field.name != "sparsity")


def wrong(asked_by: str, argument: str, given: object, allowed: str, do: str) -> ValueError:
    """The error for an argument of the function `asked_by`."""
    return ValueError(f"{asked_by}, {refusal(argument, given, allowed)}; {do}")


def is_number(given: object, kind: type = Real) -> bool:
    """Whether it is a number of this kind; True and False are none."""
    return isinstance(given, kind) and not isinstance(given, bool)


@dataclasses.dataclass(frozen=True)
class ArgumentChecks:
    """Checks the arguments of one function; everything here raises ValueError.

    Attributes:
        asked_by: the name of the function, for the errors.
    """

    asked_by: str

    def choice(self, argument: str, given: object, choices: Iterable[str]) -> None:
        """`given` must be one of the choices."""
        choices = list(choices)
        if not isinstance(given, str) or given not in choices:
            raise self._error(argument, given, ", ".join(choices), f"pass one of them as {argument}")

    def number(self, argument: str, given: object, least: float, most: float | None, *, whole: bool = False) -> None:
        """`given` must be a number, or a whole one, within these limits."""
        fits = is_number(given, Integral if whole else Real) and least <= given  # type: ignore[operator]
        if not fits or (most is not None and given > most):  # type: ignore[operator]
            limits = f"{least} or more" if most is None else f"{least} to {most}"
            allowed = f"{'a whole number, ' if whole else ''}{limits}"
            raise self._error(argument, given, allowed, f"pass such a number as {argument}")

    def numbers(self, argument: str, given: object, least: int, below: int | None, count: int | None = None) -> None:
        """`given` must be a tuple or another collection of whole numbers from `least`, all below `below` if it is not
        None, so many of them if `count` is not None."""
        # No iterator: checking it would use it up.
        fits = isinstance(given, Collection) and not isinstance(given, str | bytes | Mapping)
        found = list(given) if fits else []  # type: ignore[call-overload]
        whole = [int(n) for n in found if is_number(n, Integral)]
        fits &= len(whole) == len(found) and all(least <= n and (below is None or n < below) for n in whole)
        if not fits or count not in (None, len(found)):
            limits = f"of at least {least}" if below is None else f"from {least} to {below - 1}"
            many = "" if count is None else f"{count} "
            raise self._error(
                argument, given, f"{many}whole numbers {limits}", f"pass a tuple of such numbers as {argument}"
            )

    def preset(self, given: object, *others: str) -> None:
        """`given` must be the name of a preset, or one of the others."""
        self.choice("preset", given, (*others, *load_presets()))

    def config(
        self, preset: Preset, sparsity: float, changes: Mapping[str, Any], falling: float = 0.0, reuse_steps: int = 1
    ) -> PyramidConfig:
        """The configuration of a preset with changes in it; each must be a setting, and all must be possible
        together."""
        for name in changes:
            if name not in _SETTINGS:
                near = difflib.get_close_matches(name, _SETTINGS, n=1)
                do = f"rename it to {near[0]} if that is meant, or leave it out" if near else "leave it out"
                raise self._error(name, changes[name], f"only the settings {', '.join(_SETTINGS)}", do)
        try:
            config = preset.config(sparsity, **changes)
            check_falling(falling, config)
            check_reuse(reuse_steps, config)
        except ConfigError as error:
            raise self._error(error.field, error.given, error.allowed, error.do) from error
        return config

    def _error(self, argument: str, given: object, allowed: str, do: str) -> ValueError:
        return wrong(self.asked_by, argument, given, allowed, do)
