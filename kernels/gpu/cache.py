"""Small facts about this machine's GPU as JSON in Triton's cache: the tuned tile, and whether the kernels were right.

Triton's cache manager decides where that is, also if a user has one of their own. Nothing here raises: without a cache,
a fact is found out again in every process.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from triton.runtime.cache import CacheManager, get_cache_manager

log = logging.getLogger("ComfyUI-PSA")


def source_of(*names: str) -> str:
    """A short name for what these files of this folder contain, by default for all code of kernels and their rules."""
    folder = Path(__file__).parent
    files = [folder / name for name in names] or sorted(folder.parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def read_fact(key: str, file: str) -> object | None:
    """What Triton's cache keeps in a file under a key; None if there is nothing that can be read."""
    try:
        path = _cache(key).get_file(file)
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except Exception as failure:  # no folder, no text, or whatever a cache manager of the user's own raises
        log.debug("PSA could not read %s: %s", file, failure)
        return None


def write_fact(key: str, file: str, fact: object) -> None:
    """Keep a fact in Triton's cache; another process never sees a partial file. A failure is only logged."""
    try:
        _cache(key).put(json.dumps(fact), file, binary=False)
    except Exception as failure:
        log.debug("PSA could not keep %s: %s", file, failure)


def _cache(key: str) -> CacheManager:
    return get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
