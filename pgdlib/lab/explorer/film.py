"""Films of the hand and the pen: the states that a model imagined beside those of the simulator, drawn with OpenGL.

A film is an array of frames, uint8 [K, height, width, 3]; a size is (width, height), px.
"""

import copy
import importlib
import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import mujoco
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from mujoco.rendering.classic import gl_context
from PIL import Image, ImageDraw, ImageFont

from pgdlib.lab import store
from pgdlib.lab.figures.style import DATA, GUIDED, MODEL
from pgdlib.simulators import pen as adroit

BACKDROP, BLANK = 246, 215  # grey values: behind the hand, and of a frame that shows nothing
EDGE, HEAD, FOOT = 10, 46, 150  # px of a composed frame: around the two pictures, above and below them
LOWEST, HIGHEST = 1e-3, 10.0  # the least span of the error's axis, so that films can be compared
HELP = """MuJoCo cannot draw here (MUJOCO_GL is {}): {}.
On Linux leave MUJOCO_GL unset and install libEGL and libGL (Debian, Ubuntu: `apt install libegl1 libgl1`), or set it to osmesa
and install libOSMesa (`apt install libosmesa6`). Then restart the kernel."""
FORKED = (
    "This process was forked from one that has drawn, which OpenGL does not survive. Start it by 'spawn' instead of 'fork'."
)

_worker = ThreadPoolExecutor(1, "film")  # what OpenGL draws with belongs to the thread that made it
_kept = threading.local()  # goes with that thread, so renderers are also freed in it
_has_drawn, _failure = False, None  # once known, why nothing can be drawn


def _before_fork():
    """Free the renderers: a child has not the thread that they belong to, and would free them without it."""

    def free():
        vars(_kept).pop("stages", None)

    if _has_drawn:
        _worker.submit(free).result()


def _in_child():
    global _worker, _failure
    _worker = ThreadPoolExecutor(1, "film")
    if _has_drawn:
        _failure = FORKED


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)


class CannotRender(RuntimeError):
    """OpenGL is missing or does not work; the message says how to get it."""


class _Stage:
    """The hand, the pen and the target before a camera that takes pictures of `size`."""

    def __init__(self, size):
        model = copy.copy(adroit._gym_env().model)  # the simulator keeps its own
        model.vis.global_.offwidth, model.vis.global_.offheight = size
        model.vis.quality.shadowsize = 0  # a shadow takes longer than all the rest
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
        self._model, self._data, self._camera = model, mujoco.MjData(model), mujoco.MjvCamera()
        self._camera.azimuth, self._camera.elevation, self._camera.distance = -130, -30, 0.36
        self._camera.lookat[:] = 0.0, -0.215, 0.23
        self._renderer = _renderer(model, size)

    def picture(self, qpos, target_axis):
        self._data.qpos[:] = qpos
        mujoco.mju_quatZ2Vec(self._model.body("target").quat, target_axis)
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)
        self._renderer.update_scene(self._data, self._camera)
        return self._renderer.render()


def _renderer(model, size):
    """MuJoCo's renderer. On Linux it draws with EGL, which needs no display, unless MUJOCO_GL names another way.

    MUJOCO_GL itself is left alone: MuJoCo reads it as it is imported, which it mostly is by now; and where EGL is missing,
    that import would fail with it.
    """
    global _failure
    if _failure is None:  # a second try can abort the process, inside MuJoCo
        try:
            if platform.system() == "Linux" and not os.environ.get("MUJOCO_GL"):
                gl_context.GLContext = importlib.import_module("mujoco.egl").GLContext
            return mujoco.Renderer(model, size[1], size[0])
        except Exception as e:  # of whatever kind: they come from MuJoCo, PyOpenGL, GLFW or the system
            _failure = HELP.format(os.environ.get("MUJOCO_GL", "unset"), f"{type(e).__name__}: {e}".rstrip("."))
    raise CannotRender(_failure)


def _picture(qpos, target_axis, size):
    """One frame; for the worker only."""
    stages = vars(_kept).setdefault("stages", {})
    if size not in stages:
        stages[size] = _Stage(size)
    return stages[size].picture(qpos, target_axis)


def frames(qpos, target_axis, size=(320, 300), report=lambda done: None):
    """A film of the hand and the pen at qpos [K, 30], with a ghost of the pen where it should be, along target_axis [3].

    Any thread may call this. `report(done)` is called after each frame; what it raises ends the work. A row that is not finite
    gives a blank frame. Raises CannotRender.
    """
    global _has_drawn
    _has_drawn = True
    film = np.full((len(qpos), size[1], size[0], 3), BLANK, dtype=np.uint8)
    for k, row in enumerate(qpos):
        if np.isfinite([*row, *target_axis]).all():
            film[k] = _worker.submit(_picture, row, target_axis, tuple(size)).result()
        report(k + 1)
    return film


def side_by_side(replay, errors, title, size=(320, 270), report=lambda done: None):
    """A film of a `dynamics.Replay`: imagined, simulated, and below them `errors` [K + 1] with a cursor at the time.

    `size` is that of one picture; `report` is called for every one of the 2 (K + 1), as in `frames`.
    """
    left = frames(replay.imagined, replay.target_axis, size, report)
    right = frames(replay.simulated, replay.target_axis, size, lambda done: report(len(left) + done))
    starts = np.isfinite(replay.simulated[0]).all()
    sides = (
        (EDGE, left, replay.imagined, "not a number"),
        (2 * EDGE + size[0], right, replay.simulated, f"the simulator {'gives up' if starts else 'cannot start here'}"),
    )
    background, points, (top, bottom) = _background(errors, title, size)
    font = ImageFont.load_default(13)
    film = np.empty((len(left), *background.shape), dtype=np.uint8)
    for k, (x, y) in enumerate(points):
        frame = Image.fromarray(background)
        draw = ImageDraw.Draw(frame)
        for at, pictures, qpos, message in sides:
            frame.paste(Image.fromarray(pictures[k]), (at, HEAD))
            if not np.isfinite(qpos[k]).all():
                draw.text((at + size[0] / 2, HEAD + size[1] / 2), message, "black", font, "mm")
        draw.line((x, top, x, bottom), "black")
        if np.isfinite(y):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), tuple(int(255 * c) for c in MODEL), "black")
        draw.text((frame.width - EDGE, 9), f"{k * adroit.CONTROL_DT:.2f} s", "black", font, "ra")
        film[k] = frame
    return film


def _background(errors, title, size):
    """What is the same in all frames [H, W, 3]; in px, the points of the curve [K + 1, 2], and top and bottom of its axis."""
    width, height = 2 * size[0] + 3 * EDGE, HEAD + size[1] + FOOT
    fig = Figure((width / 100, height / 100), dpi=100, layout="none", facecolor="white")
    canvas = FigureCanvasAgg(fig)
    for x, y, text, style in (
        (EDGE, 7, title, dict(fontsize=10, fontweight="bold")),
        (EDGE, HEAD - 18, "imagined by the diffusion model", {}),
        (2 * EDGE + size[0], HEAD - 18, "simulated: same start, same actions", {}),
        (EDGE, HEAD + size[1] + 6, "squared error / variance of the data", {}),
        (width - EDGE, HEAD + size[1] + 6, "green: where the pen should be", dict(ha="right")),
    ):
        fig.text(x / width, 1 - y / height, text, **dict(fontsize=9, va="top", color="black") | style)
    ax = fig.add_axes((56 / width, 40 / height, 1 - (56 + 2 * EDGE) / width, (FOOT - 70) / height), facecolor="white")
    t, shown = np.arange(len(errors)) * adroit.CONTROL_DT, np.where(np.greater(errors, 0), errors, np.nan)
    limits = np.nanmin([LOWEST, *shown]), np.nanmax([HIGHEST, *shown])
    ax.plot(t, shown, color=MODEL, linewidth=2)
    ax.set(yscale="log", ylim=limits, xlim=(0, t[-1]))
    ax.set_xlabel("time (s)", fontsize=9, color="black", labelpad=2)
    ax.yaxis.set(major_locator=LogLocator(numticks=6), major_formatter="{x:g}", minor_locator=NullLocator())
    ax.tick_params(labelsize=8, colors="black", length=3, width=0.8, pad=3)
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    x, y = ax.transData.transform(np.stack([t, np.nan_to_num(shown, nan=1)], 1)).T
    points = np.stack([x, np.where(np.isnan(shown), np.nan, height - y)], 1)  # pictures count rows from the top
    return np.array(canvas.buffer_rgba())[..., :3], points, (height - ax.bbox.y1, height - ax.bbox.y0)


def stack(films):
    """Films of one width below each other; the shorter ones wait at their last frame."""
    k = np.arange(max(map(len, films)))
    return np.concatenate([film[np.minimum(k, len(film) - 1)] for film in films], 1)


def save_gif(film, path, fps=10):
    """Write a film to `path` as an endless GIF, whole or not at all; the path. All frames share their colours."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    palette = Image.fromarray(np.concatenate(film[:: max(1, len(film) // 8)])).quantize(255)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in film]
    with store.replacing(path) as partial:
        images[0].save(partial, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return path


def strip(films, times, title):
    """Films, name -> [K, H, W, 3], a row each, as a figure for where nothing moves; `times` [K] are those of the frames, s."""
    height, width = next(iter(films.values())).shape[1:3]
    figsize = 2 * len(times), 2 * len(films) * height / width + 0.6
    fig, axes = plt.subplots(len(films), len(times), squeeze=False, figsize=figsize)
    for row, (name, film) in zip(axes, films.items()):
        row[0].set_ylabel(name)
        for ax, frame in zip(row, film):
            ax.imshow(frame)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, time in zip(axes[0], times):
        ax.set_title(f"{time:.2f} s", fontsize="small")
    fig.suptitle(title, fontsize="medium")
    return fig
