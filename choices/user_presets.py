"""The user's own presets: JSON files in ComfyUI's `user/psa_presets`, one preset per file, listed as `user/NAME`.

A file may come from anywhere: it is read with a size limit and checked field by field, and whatever is wrong with it
becomes a sentence. A file that cannot be read stays in the list; choosing it says why.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..kernels.config import IMPORTANCES, MODES, ORDERS, PRECISIONS, REDUCTIONS, ConfigError
from ..kernels.refusal import refusal, shown
from .correction import AUTO
from .errors import InputError
from .presets import OWN_SHAPE, PUBLISHED_SUFFIX, Preset, load_presets

PREFIX = "user/"
PAPER = "paper: "
"""Begins the published presets' names in the menu; NAME (published) means the same."""
MOST_BYTES = 65536
MOST_FILES = 200
MOST_DENSE_STEPS = 1000
_NAME = re.compile(r"[\w(][\w ().,+-]{0,63}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows reserves."""
_FLAGS = ("tail", "as_written")
_CHOICES = {
    "mode": MODES,
    "order": ORDERS,
    "importance": IMPORTANCES,
    "reduction": REDUCTIONS,
    "precision": PRECISIONS,
}
_WHOLE = ("block_q", "block_kv", "dense_steps")
_LEVELS = ("shares", "similarity_cap")
_NUMBERS = ("sparsity", "sample_share")
_NOT_SETTINGS = ("about", "made", "sparsity", "as_written", "dense_steps")
FIELDS = ("about", "made", *_CHOICES, *_FLAGS, *_WHOLE, *_LEVELS, *_NUMBERS)


class PresetError(ValueError):
    """A preset file that cannot be used; the message is one sentence."""


def folder() -> Path | None:
    """The user's folder, which may not exist; None outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return None
    return Path(folder_paths.get_user_directory()) / "psa_presets"


def preset_menu(where: Path | None = None) -> list[str]:
    """The presets that the nodes offer: made for a case of its own, the user's, the paper's. The user's include files
    that turn out to be wrong."""
    offered = [name for name, preset in load_presets().items() if preset.in_menu]
    papers = [PAPER + name.removesuffix(PUBLISHED_SUFFIX) for name in offered if name.endswith(PUBLISHED_SUFFIX)]
    ours = [name for name in offered if not name.endswith(PUBLISHED_SUFFIX)]
    return [*ours, *(PREFIX + path.stem for path in _files(where or folder())), *papers]


def preset_names(where: Path | None = None) -> list[str]:
    """All names that are understood: those of the menu, then those that older workflows and prompts have."""
    menu = preset_menu(where)
    return [*menu, *(name for name in load_presets() if name not in menu)]


def find_preset(name: str, where: Path | None = None, node: str = "PSA Patch") -> Preset:
    """The preset of that name, the pack's, the paper's or the user's; `node` is the one that an error names.

    Raises:
        InputError: no such preset, or its file is wrong; says what is wrong.
    """
    if not name.startswith(PREFIX):
        presets = load_presets()
        stored = name.removeprefix(PAPER) + PUBLISHED_SUFFIX if name.startswith(PAPER) else name
        if stored not in presets:
            raise _unknown(name, where, node)
        return presets[stored]
    for path in _files(where or folder()):
        if PREFIX + path.stem == name:
            try:
                return read_preset(path)
            except PresetError as error:
                allowed = f"a preset file that can be read; {path.name}: {error}"
                do = "mend the file or choose another preset"
                raise InputError("preset", name, allowed, node, do=do) from error
    raise _unknown(name, where, node)


def _unknown(name: str, where: Path | None, node: str) -> InputError:
    return InputError.of_choice("preset", name, [AUTO, *preset_names(where)], node)


def fingerprint(name: str, where: Path | None = None) -> str:
    """Changes when the preset of that name means something else, so that a node that uses it runs again.

    Only effective fields count: writing the file again with a new sparsity or sentence does not change it.
    """
    if not name.startswith(PREFIX):
        return name
    try:
        preset = find_preset(name, where)
    except InputError as error:
        return str(error)
    return repr((preset.settings, preset.as_written, preset.dense_steps))


def usable_presets(where: Path | None = None) -> dict[str, Preset]:
    """All valid presets by name: what the page needs to draw them."""
    presets = load_presets()
    for path in _files(where or folder()):
        try:
            presets[PREFIX + path.stem] = read_preset(path)
        except PresetError:
            continue
    return presets


def read_preset(path: Path) -> Preset:
    """The preset in a file.

    Raises:
        PresetError: it cannot be read, is not a preset, or its combination is impossible.
    """
    try:
        if not path.is_file():  # opening a pipe would wait forever
            raise PresetError("it cannot be read: it is not a file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise PresetError(f"it cannot be read: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise PresetError(f"it is larger than {MOST_BYTES // 1024} kB; a preset is a few hundred bytes")
    try:
        entry = json.loads(data)  # UTF-8 or UTF-16, with or without a byte-order mark, as editors write it
    except json.JSONDecodeError as error:
        raise PresetError(f"it is not JSON: see line {error.lineno}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise PresetError("it is not JSON in UTF-8, or it is nested without end; save it as UTF-8") from error
    return parse_preset(path.stem, entry)


def parse_preset(stem: str, entry: object) -> Preset:
    """A preset from the content of a file, every field checked.

    Raises:
        PresetError: names the field, what was given and what is allowed.
    """
    if not isinstance(entry, dict):
        raise PresetError('it must hold a JSON object, for example {"shares": {"1": 0.10, "8": 0.20}}')
    for field, value in entry.items():
        if field not in FIELDS:
            raise PresetError(f"{shown(field)} is no field of a preset; allowed: {', '.join(FIELDS)}")
        allowed = _wrong(field, value)
        if allowed:
            raise PresetError(refusal(field, value, allowed))
    if "shares" not in entry:
        raise PresetError('shares is missing, for example {"1": 0.10, "2": 0.05, "8": 0.20}')
    settings = {**OWN_SHAPE, **{k: v for k, v in entry.items() if k not in _NOT_SETTINGS}}
    for field in _LEVELS:
        settings[field] = {int(factor): float(share) for factor, share in settings.get(field, {}).items()}
    sparsity = entry.get("sparsity")
    as_written = entry.get("as_written", False)
    dense_steps = entry.get("dense_steps")
    if dense_steps is not None and not 0 <= dense_steps <= MOST_DENSE_STEPS:
        raise PresetError(refusal("dense_steps", dense_steps, f"0 to {MOST_DENSE_STEPS}"))
    preset = Preset(PREFIX + stem, str(entry.get("about", "")), settings, sparsity, as_written, dense_steps)
    try:
        preset.unscaled()
        if sparsity is not None:
            preset.config(sparsity)
    except ConfigError as error:
        raise PresetError(str(error)) from error
    return preset


def check_name(save_as: str, node: str) -> str:
    """The name to save a preset under, without prefix and `.json`; "" for none.

    Raises:
        InputError: a name that cannot be a file's.
    """
    name = save_as.strip().removeprefix(PREFIX).removesuffix(".json")
    if name and (not _NAME.fullmatch(name) or _DEVICE.fullmatch(name)):
        allowed = (
            "letters, digits, spaces and ().,+-_, up to 64; others, and nul, con and the like, cannot name a preset"
        )
        raise InputError("save_as", save_as, allowed, node, do="choose another name, or leave it empty")
    return name


def write_preset(
    name: str,
    preset: Preset,
    *,
    about: str = "",
    made: str = "",
    where: Path | None = None,
    node: str = "PSA Pyramid",
) -> Path:
    """Write a preset as a user file; a file of the same name is replaced.

    Args:
        name: the file's, not empty; about: a sentence; made: where the numbers come from; node: for errors.

    Raises:
        InputError: a name that cannot be a file's, no folder, or the folder cannot be written.
    """
    given, name, where = name, check_name(name, node), where or folder()
    if where is None or not name:
        raise InputError("save_as", given, "a name, inside ComfyUI", node, do="leave save_as empty")
    entry: dict[str, Any] = {"about": about or preset.about, "made": made}
    entry |= {field: preset.settings[field] for field in FIELDS if field in preset.settings}
    entry |= {"sparsity": preset.sparsity, "as_written": preset.as_written or None, "dense_steps": preset.dense_steps}
    entry = {field: value for field, value in entry.items() if value not in (None, "", {})}
    for field in _LEVELS:
        if field in entry:
            entry[field] = {str(factor): value for factor, value in entry[field].items()}
    path = where / f"{name}.json"
    try:
        where.mkdir(parents=True, exist_ok=True)
        # Written to another file and then moved, so that a full disk leaves the old file.
        part = where / f"{name}.json.part"
        if part.is_symlink():
            raise PresetError(f"{part} is a link, which is not followed; delete it and save again")
        part.unlink(missing_ok=True)
        with part.open("x", encoding="utf-8") as file:
            file.write(json.dumps(entry, indent=2, ensure_ascii=False) + "\n")
        part.replace(path)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "the system cannot write this name"
        allowed = f"a name under which ComfyUI can write to its folder user/{where.name} ({reason})"
        do = "choose another name, make the folder writable, or leave save_as empty"
        raise InputError("save_as", given, allowed, node, do=do) from error
    return path


def _files(where: Path | None) -> list[Path]:
    """The user's preset files, by name. Files whose name cannot be a preset's are left out."""
    if where is None:
        return []
    try:
        names = sorted(entry.name for entry in os.scandir(where) if entry.name.endswith(".json"))
    except OSError:
        return []
    return [where / name for name in names if _NAME.fullmatch(name[: -len(".json")])][:MOST_FILES]


def _wrong(field: str, value: Any) -> str | None:
    """What is allowed for a field, if the value is something else."""
    if field in _CHOICES:
        return None if isinstance(value, str) and value in _CHOICES[field] else ", ".join(_CHOICES[field])
    if field in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if field in _WHOLE:
        return None if type(value) is int else "a whole number"
    if field in _NUMBERS:
        return None if _is_share(value) and value < 1 else "a number from 0 to below 1"
    if field in _LEVELS:
        fits = isinstance(value, dict) and all(re.fullmatch(r"[1-9]\d{0,2}", key) for key in value)
        if field == "shares":
            fits = fits and all(_is_share(share) for share in value.values())
        else:
            fits = fits and all(_is_number(cap) and -1 <= cap <= 1 for cap in value.values())
        return None if fits else 'pooling factors and numbers, {"1": 0.10, "8": 0.20}'
    return None if isinstance(value, str) and len(value) <= 1000 else "a text of up to 1000 letters"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1
