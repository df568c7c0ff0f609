"""Pictures of the hand and the pen, or of a runner: states that a model imagined beside the simulator's, drawn with OpenGL.

A film is an array of frames, uint8 [K, height, width, 3]; a size is (width, height), px.
"""

import copy
import importlib
import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from pgdlib.lab import artifacts
from pgdlib.lab.figures.style import DATA, GUIDED, MODEL
from pgdlib.simulators import import_mujoco
from pgdlib.simulators.pen import GROUPS, PEN

mujoco = import_mujoco()
GREEN = {PEN.name: "green: where the pen should be"}
BACKDROP, BLANK = 246, 215  # grey values: behind the hand, and of a frame that shows nothing
EDGE, HEAD, FOOT = 10, 46, 150  # px of a composed frame: around the two pictures, above and below them
LOWEST, HIGHEST = 1e-3, 10.0  # the least span of the error's axis, so that films can be compared
HELP = """MuJoCo cannot draw here (MUJOCO_GL is {}): {}.
On Linux leave MUJOCO_GL unset and install libEGL and libGL (Debian, Ubuntu: `apt install libegl1 libgl1`), or set it to osmesa
and install libOSMesa (`apt install libosmesa6`). Then restart the kernel."""
FORKED = "This process was forked from one that has drawn, which OpenGL does not survive: start it by 'spawn', not by 'fork'"

_worker = ThreadPoolExecutor(1, "hand")  # what OpenGL draws with belongs to the thread that made it
_kept = threading.local()  # goes with that thread, so renderers are also freed in it
_process, _failure = None, None  # which one has drawn; once known, why nothing can be drawn


class CannotRender(RuntimeError):
    """OpenGL is missing or does not work; the message says how to get it."""


def _before_fork():
    """Free the renderers: a child has not the thread that they belong to, and would free them without it."""
    if _process == os.getpid():
        _worker.submit(lambda: vars(_kept).clear()).result()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


class _Stage:
    """What a `Simulator` simulates, before a camera that takes pictures of `size`: here a runner, from the side."""

    def __init__(self, simulator, size):
        self._model = copy.copy(simulator.batch(1, 1).model)  # the simulator keeps its own
        self._model.vis.global_.offwidth, self._model.vis.global_.offheight = size
        self._camera, self._data = mujoco.MjvCamera(), mujoco.MjData(self._model)
        self._model.vis.quality.shadowsize = 0  # a shadow takes longer than all the rest
        self._dress(self._model)
        self._renderer = _renderer(self._model, size)

    def _dress(self, model):
        self._camera.azimuth, self._camera.elevation, self._camera.distance = 90, -8, 3.6

    def _aim(self, obs):
        self._camera.lookat[:] = self._data.xpos[1][0], 0.0, 0.75  # along with the root's body

    def picture(self, qpos, obs):
        self._data.qpos[:] = qpos
        mujoco.mj_kinematics(self._model, self._data)
        self._aim(obs)
        mujoco.mj_camlight(self._model, self._data)
        self._renderer.update_scene(self._data, self._camera)
        return self._renderer.render()


class _Hand(_Stage):
    """The hand, the pen and the target."""

    def _dress(self, model):
        model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = 0.3, 0.4
        model.geom_group[np.isin(model.geom_bodyid, [0, model.body("table").id])] = 5  # a group that is not drawn
        model.mat("MatViz").rgba, model.mat("MatViz").specular = (0.87, 0.74, 0.62, 1.0), 0.2
        pen, ghost = (model.geom_bodyid == model.body(name).id for name in ("Object", "target"))
        model.geom_rgba[pen], model.geom_rgba[ghost] = (*DATA, 1.0), (*GUIDED, 0.35)
        model.geom("pen").rgba, model.geom("t_top").rgba = (0.95, 0.95, 0.95, 1.0), (*GUIDED, 0.65)
        model.body("target").pos = model.site("eps_ball").pos  # where the pen should be, not beside the hand
        sky = model.tex("texgeom")  # nothing else that is drawn has this texture
        model.tex_type[sky.id] = mujoco.mjtTexture.mjTEXTURE_SKYBOX
        model.tex_data[model.tex_adr[sky.id] :][: sky.width[0] * sky.height[0] * sky.nchannel[0]] = BACKDROP
        self._camera.azimuth, self._camera.elevation, self._camera.distance = -130, -30, 0.36
        self._camera.lookat[:] = 0.0, -0.215, 0.23

    def _aim(self, obs):
        mujoco.mju_quatZ2Vec(self._model.body("target").quat, obs[GROUPS["target axis"]])
        mujoco.mj_kinematics(self._model, self._data)


def _renderer(model, size):
    """MuJoCo's renderer. On Linux it draws with EGL, which needs no display, unless MUJOCO_GL names another way.

    MUJOCO_GL itself is left alone: MuJoCo reads it as it is imported, which it mostly is by now; and where that way to draw is
    missing, its import can fail with it.
    """
    global _failure
    if _failure is None:  # a second try can abort the process, inside MuJoCo
        try:
            way = os.environ.get("MUJOCO_GL", "").lower().strip() or "egl"
            if platform.system() == "Linux" and way in ("egl", "osmesa"):
                context = importlib.import_module(f"mujoco.{way}").GLContext
                importlib.import_module("mujoco.rendering.classic.gl_context").GLContext = context
            return mujoco.Renderer(model, size[1], size[0])
        except Exception as e:  # of whatever kind: they come from MuJoCo, PyOpenGL, GLFW or the system
            _failure = HELP.format(os.environ.get("MUJOCO_GL", "unset"), f"{type(e).__name__}: {e}".rstrip("."))
    raise CannotRender(_failure)


def _picture(simulator, qpos, obs, size):
    """One frame; for the worker only."""
    stages, key = vars(_kept).setdefault("stages", {}), (simulator.name, size)
    if key not in stages:
        stages[key] = (_Hand if simulator.name == PEN.name else _Stage)(simulator, size)
    return stages[key].picture(qpos, obs)


def frames(simulator, qpos, obs, size=(320, 300)):
    """A film of what a `Simulator` simulates, at qpos [K, qpos_dim]; of the pen, with a ghost where the goal of obs has it.

    Any thread may call this. A row that is not finite gives a blank frame. Raises CannotRender.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise CannotRender(FORKED)
    film = np.full((len(qpos), size[1], size[0], 3), BLANK, dtype=np.uint8)
    for k, row in enumerate(qpos):
        if np.isfinite([*row, *obs]).all():
            film[k] = _worker.submit(_picture, simulator, row, obs, tuple(size)).result()
    return film


class SideBySide:
    """A film of a `dynamics.Replay`, made frame by frame: imagined, simulated, and below them `errors` [K + 1] over time.

    `size` is that of one picture. One thread at a time may ask for a frame.
    """

    def __init__(self, replay, errors, title, size=(320, 270)):
        self._replay, self._errors = replay, np.where(np.greater(errors, 0), errors, np.nan)
        self._size, (width, height) = size, (2 * size[0] + 3 * EDGE, HEAD + size[1] + FOOT)
        fig = Figure((width / 100, height / 100), dpi=100, layout="none", facecolor="white")
        self._canvas = FigureCanvasAgg(fig)

        def write(x, y, text="", **style):  # px from the top left
            return fig.text(x / width, 1 - y / height, text, **dict(fontsize=9, va="top", color="black") | style)

        write(EDGE, 7, title, fontsize=10, fontweight="bold")
        write(EDGE, HEAD + size[1] + 6, "squared error / variance of the data")
        write(width - EDGE, HEAD + size[1] + 6, GREEN.get(replay.simulator.name, ""), ha="right")
        self._clock, self._sides = write(width - EDGE, 9, ha="right"), []
        lost = "the simulator gives up" if np.isfinite(replay.simulated[0]).all() else "the simulator cannot start here"
        for x, qpos, name, without in (
            (EDGE, replay.imagined, "imagined by the diffusion model", "not a number"),
            (2 * EDGE + size[0], replay.simulated, "simulated: same start, same actions", lost),
        ):
            write(x, HEAD - 18, name)
            image = fig.figimage(np.empty((size[1], size[0], 3), np.uint8), x, FOOT)
            note = write(x + size[0] / 2, HEAD + size[1] / 2, without, ha="center", va="center", fontsize=10)
            self._sides.append((image, qpos, note))
        place = (56 / width, 40 / height, 1 - (56 + 2 * EDGE) / width, (FOOT - 70) / height)
        self._cursor, self._mark = self._curve(fig.add_axes(place, facecolor="white"))

    def _curve(self, ax):
        """The error over time on `ax`; a cursor and a mark that are to be moved along it."""
        t = np.arange(len(self._errors)) * self._replay.simulator.dt
        limits = np.nanmin([LOWEST, *self._errors]), np.nanmax([HIGHEST, *self._errors])
        ax.plot(t, self._errors, color=MODEL, linewidth=2)
        ax.set(yscale="log", ylim=limits, xlim=(0, t[-1]))
        ax.set_xlabel("time (s)", fontsize=9, color="black", labelpad=2)
        ax.yaxis.set(major_locator=LogLocator(numticks=6), major_formatter="{x:g}", minor_locator=NullLocator())
        ax.tick_params(labelsize=8, colors="black", length=3, width=0.8, pad=3)
        ax.grid(axis="y", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        mark = dict(color=MODEL, markersize=6, markeredgecolor="black", clip_on=False, zorder=6)
        return ax.axvline(0, color="black", linewidth=1.2, zorder=5), ax.plot(0, np.nan, "o", **mark)[0]

    def __len__(self):
        return len(self._errors)

    def __getitem__(self, k):
        if not 0 <= k < len(self):
            raise IndexError(f"frame {k} is not there; there are {len(self)}")
        for image, qpos, note in self._sides:
            image.set_data(frames(self._replay.simulator, qpos[k : k + 1], self._replay.start, self._size)[0])
            note.set_visible(not np.isfinite(qpos[k]).all())
        time = k * self._replay.simulator.dt
        self._clock.set_text(f"{time:.2f} s")
        self._cursor.set_xdata([time, time])
        self._mark.set_data([time], [self._errors[k]])
        self._canvas.draw()
        return np.array(self._canvas.buffer_rgba())[..., :3]


def save_gif(films, path, fps=10):
    """Write films of one length and width, one below the other, to `path` as an endless GIF, whole or not at all; the path."""
    path, film = Path(path), np.concatenate([np.stack(list(film)) for film in films], 1)
    palette = Image.fromarray(np.concatenate(film[:: max(1, len(film) // 8)])).quantize(255)  # what stays keeps its colours
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in film]
    with artifacts.replacing(path) as partial:
        images[0].save(partial, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return path


def strip(films, times, title):
    """Films, name -> [K, H, W, 3], a row each, as a figure for where nothing moves; `times` [K] are those of the frames, s."""
    rows = [np.concatenate(list(film), 1) for film in films.values()]
    (height, width), across = rows[0].shape[:2], 2 * len(times)
    fig = Figure((across, across * len(rows) * height / width + 0.6))
    ax = fig.subplots()
    ax.imshow(np.concatenate(rows))
    ax.set_xticks((np.arange(len(times)) + 0.5) * width / len(times), [f"{time:.2f} s" for time in times])
    ax.set_yticks((np.arange(len(rows)) + 0.5) * height, films, rotation=90, va="center")
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    fig.suptitle(title, fontsize="medium")
    return fig
