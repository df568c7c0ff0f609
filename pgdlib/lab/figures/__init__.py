"""Figures: arrays in, `Figure` out. `from pgdlib.lab import figures`, then `figures.guidance.figure_1(...)`."""

from pgdlib.lab.figures import data, guidance, style, sweep, table1

__all__ = ["data", "guidance", "style", "sweep", "table1"]
