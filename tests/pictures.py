"""Content of PNG files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.image import imread


def coloured_share(path: Path) -> float:
    """Share of the pixels of a PNG that are neither grey nor white: lines, marks and shades of figures."""
    pixels = imread(path)[..., :3]
    return float((pixels.max(-1) - pixels.min(-1) > 0.15).mean())
