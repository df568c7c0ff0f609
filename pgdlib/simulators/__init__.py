"""Simulators: what happens to a state under an action."""

import importlib
import os


def import_mujoco():
    """MuJoCo, also where $MUJOCO_GL names a way to draw that does not work here: simulating needs none."""
    try:
        return importlib.import_module("mujoco")
    except Exception:  # of whatever kind: they come from PyOpenGL, GLFW or the system
        if (way := os.environ.get("MUJOCO_GL")) is None:
            raise
    os.environ["MUJOCO_GL"] = "disable"  # MuJoCo reads it as it is imported
    try:
        return importlib.import_module("mujoco")
    finally:
        os.environ["MUJOCO_GL"] = way
