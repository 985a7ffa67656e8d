"""The colours of a plot, the same in a PNG and in HTML."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours; `up` (bought) and `down` (sold) differ for the colour-blind, and in lightness too."""

    back: str
    text: str
    faint: str
    grid: str
    up: str
    down: str
    unknown: str
    line: str
    middle: str


THEMES = {
    "light": Theme("#ffffff", "#1c2127", "#66707b", "#e7eaee", "#0a66c2", "#e8871e", "#a3abb5", "#2f3b48", "#f4f5f7"),
    "dark": Theme("#10151b", "#dde3ea", "#8b97a4", "#232b35", "#56a5f5", "#f0a53e", "#66717e", "#e2e8ee", "#1b222b"),
}
