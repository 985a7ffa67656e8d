"""How hot paths are compiled: numba, without the GIL, cached on disk.

Numba's own cache looks only at the file of the function itself, so an edited dtype or callee would
meet old machine code. Here the cache folder is named after a digest of all sources that compiled
code comes from: another version, another folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

from shared.cache import cache_base

F = TypeVar("F", bound=Callable[..., Any])

SOURCES = (
    "shared.frames",
    "shared.sides",
    "services.ingest.normalize",
    "services.ingest.tardis_text",
    "services.ingest.tardis_pass",
    "services.ingest.tardis_recent",
    "services.aggregate.layout",
    "services.aggregate.arena",
    "services.aggregate.sessions",
    "services.aggregate.rows",
    "services.aggregate.features",
    "services.aggregate.bars",
    "services.aggregate.beside",
    "services.aggregate.front_month",
    "services.aggregate.kernel",
    "services.pressure.layout",
    "services.pressure.kernel",
)


def cache_folder() -> Path:
    """Where the machine code of these sources is kept: beside this package, else in ~/.cache."""
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for name in SOURCES:
        package, _, module = name.rpartition(".")
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            file = Path(spec.origin).parent / f"{module}.py"
            digest.update(file.read_bytes() if file.is_file() else b"")
    return cache_base() / f"kernels-{digest.hexdigest()}"


numba.config.CACHE_DIR = str(cache_folder())
_njit = partial(numba.njit, cache=True, nogil=True, error_model="numpy")


def jit(function: F) -> F:
    """Compile."""
    return cast("F", _njit(function))


def jit_inline(function: F) -> F:
    """Compile into its callers: for what runs once a trade or once a second (a call copies its arguments)."""
    return cast("F", _njit(inline="always")(function))
