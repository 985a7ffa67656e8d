"""The compile cache is named after everything that compiled code comes from."""

from __future__ import annotations

import re
from pathlib import Path

from shared.compiled import SOURCES, cache_folder

ROOT = Path(__file__).resolve().parents[2]


def test_every_compiled_module_and_dtype_is_in_the_digest() -> None:
    named = {source.replace(".", "/") + ".py" for source in SOURCES}
    for file in [*ROOT.glob("shared/*.py"), *ROOT.glob("services/*/*.py")]:
        text, path = file.read_text(), str(file.relative_to(ROOT))
        if re.search(r"^@jit(_inline)?$", text, re.M):
            assert path in named, f"{path} has compiled functions: add it to shared/compiled.py"
            for module in re.findall(r"^from ((?:shared|services)\.\S+) import", text, re.M):
                used = module.replace(".", "/") + ".py"
                constants = re.search(rf"^from {re.escape(module)} import \(?[^)\n]*\b[A-Z]{{2,}}", text, re.M)
                assert not constants or used in named, f"{path} takes constants from {used}"


def test_the_folder_is_stable() -> None:
    assert cache_folder() == cache_folder()
    assert cache_folder().name.startswith("kernels-")
