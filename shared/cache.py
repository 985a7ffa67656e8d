"""Where what is dear to compute is kept between runs: beside this package, else in ~/.cache/tapeline."""

from __future__ import annotations

import os
from pathlib import Path


def cache_base() -> Path:
    """The folder, which need not exist yet. Nothing in it is missed when it is removed."""
    here = Path(__file__).parent
    base = here / "__pycache__"
    if os.access(base if base.is_dir() else here, os.W_OK):
        return base
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tapeline"
