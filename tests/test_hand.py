"""Pictures of the hand and the pen, and the films made of them. What cannot be drawn here is skipped, and says so."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import conftest
import mujoco
import numpy as np
import pytest
from conftest import TITLE, at, texts
from PIL import Image

import pgdlib
from pgdlib import dynamics
from pgdlib.lab import artifacts
from pgdlib.lab.explorer import hand
from pgdlib.simulators import locomotion
from pgdlib.simulators import pen as adroit

SIZE = 120, 110
UP = np.array([0.0, 0.0, 1.0])
REST = np.zeros(30)


@pytest.fixture(scope="session")
def opengl():
    """Nothing, where MuJoCo can draw."""
    try:
        hand.frames(adroit.PEN, REST[None], seen(UP), SIZE)
    except hand.CannotRender as reason:
        pytest.skip(f"NOTHING IS DRAWN IN THIS TEST: {reason}")


def seen(axis):
    """An observation with this target axis."""
    obs = np.zeros(45)
    obs[36:39] = axis
    return obs


def posed(**joints):
    """qpos [30] at rest but for the numbers given: hand3=0.5, pen0=1.0, ..."""
    qpos = REST.copy()
    for name, value in joints.items():
        qpos[int(name[-1]) + (24 if name.startswith("pen") else 0)] = value
    return qpos


def shown(*poses, axis=UP, size=SIZE):
    """One picture of each pose, as integers that can be subtracted."""
    return hand.frames(adroit.PEN, np.stack(poses), seen(axis), size).astype(int)


def changed_where(a, b):
    return np.abs(a - b).max(-1) > 20


def changed(a, b):
    """The share of pixels that differ visibly."""
    return changed_where(a, b).mean()


def green(picture):
    """Where the picture is green, as only the target is: (column, height) [n, 2], and how dark there [n]."""
    row, column = np.nonzero(picture[..., 1] - picture[..., [0, 2]].max(-1) > 20)
    return np.stack([column, -row], 1), -picture[row, column, 0]


# Pictures


@pytest.mark.usefixtures("opengl")
def test_a_picture_follows_the_joints_and_nothing_else():
    rest, same, bent, pen, gone = shown(REST, REST, posed(hand3=0.8), posed(pen1=0.03), posed(pen0=9.0))
    np.testing.assert_array_equal(rest, same)
    assert rest.shape == (110, 120, 3) and (rest == hand.BACKDROP).all(-1).mean() > 0.3
    for other in (bent, pen, gone):
        assert changed(rest, other) > 0.01
    blue = [(p[..., 2] - p[..., 0] > 130).sum() for p in (rest, pen, gone)]
    assert min(blue[:2]) > 20 and not blue[2]  # the pen's cap; the hand is not blue


@pytest.mark.usefixtures("opengl")
def test_the_target_points_where_its_axis_does():
    """Alone with the hand, upright or upside down: its long side is upright in the picture, its cap at the lower end."""
    for axis, cap in ((UP, -1), (-UP, 1)):
        place, dark = green(shown(posed(pen0=9.0), axis=axis, size=(320, 300))[0])
        variance, directions = np.linalg.eigh(np.cov(place.T))
        assert variance[1] > 5 * variance[0] and abs(directions[1, 1]) > 0.98
        where = place[dark > np.quantile(dark, 0.8)].mean(0) - place.mean(0)
        assert np.sign(where[1]) == cap
    sideways = [green(shown(posed(pen0=9.0), axis=axis, size=(320, 300))[0])[0] for axis in np.eye(3)[:2]]
    slopes = [np.linalg.eigh(np.cov(place.T))[1][:, 1] for place in sideways]
    assert all(abs(slope[0]) > 0.5 for slope in slopes) and abs(slopes[0] @ slopes[1]) < 0.9


@pytest.mark.usefixtures("opengl")
def test_the_target_covers_a_pen_that_is_where_it_should_be():
    """Adroit Pen starts with the pen in its goal's place. With the target along its axis it makes no difference to outlines."""
    axis = adroit.PenBatch(1).begin(*at(np.array([[1.0, 0, 0, 0]])))[0, 33:36]

    def outlines(*poses, axis):
        return (shown(*poses, axis=axis, size=(320, 300)) != hand.BACKDROP).any(-1)

    there, gone = outlines(REST, posed(pen0=9.0), axis=axis)
    (elsewhere,) = outlines(REST, axis=UP)
    assert (there != gone).mean() < 0.003 < 0.01 < (there != elsewhere).mean()


@pytest.mark.usefixtures("opengl")
@pytest.mark.parametrize("name", locomotion.RUNNERS)
def test_a_runner_is_drawn_from_the_side_wherever_it_runs(name):
    simulator = locomotion.runner(name)
    begun = simulator.start(1, np.random.default_rng(0))[0][0]
    along, bent = 3 * np.eye(len(begun))[0], 0.6 * np.eye(len(begun))[-1]
    film = hand.frames(simulator, begun + np.array([0 * bent, bent, along, along + bent]), np.zeros(simulator.obs_dim), SIZE)
    here, there = (np.nonzero(changed_where(*pair)) for pair in film.astype(int).reshape(2, 2, *film.shape[1:]))
    assert 20 < len(here[1]) < 0.1 * film[0, ..., 0].size and abs(here[1].mean() - there[1].mean()) < 3


FORKING = """
import multiprocessing
import mujoco
import numpy as np
from pgdlib.lab.explorer import hand
from pgdlib.simulators.pen import PEN

def draw():
    try:
        return hand.frames(PEN, np.zeros((1, 30)), np.eye(45)[38], (40, 30)).std() > 1
    except hand.CannotRender as reason:
        return reason

def child():
    print("child", draw(), flush=True)

for after in (False, True):
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    print(process.exitcode, draw(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("opengl")
@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")
def test_a_process_may_fork_before_and_after_it_has_drawn_and_ends_without_a_word():
    """There is no display, and MuJoCo is imported before it is known that anything will be drawn."""
    out, errors = python(FORKING)
    assert out == f"child True\n0 True\nchild {hand.FORKED}\n0 True\n" and errors == []


@pytest.mark.slow
@pytest.mark.usefixtures("opengl")
def test_drawing_leaves_the_simulator_alone():
    model, saved = adroit._gym_env().model, []
    for size in (None, (60, 50), (60, 51)):
        if size:
            shown(posed(hand3=0.5), axis=np.array([1.0, 0, 0]), size=size)
        saved.append(np.empty(mujoco.mj_sizeModel(model), np.uint8))
        mujoco.mj_saveModel(model, None, saved[-1])
    assert all(np.array_equal(saved[0], other) for other in saved[1:])


@pytest.mark.usefixtures("opengl")
def test_what_is_not_finite_is_a_blank_frame():
    bad = [posed(hand3=np.nan), posed(pen0=np.inf)]
    first, *blank, last = shown(REST, *bad, REST)
    np.testing.assert_array_equal(first, last)
    assert (first != hand.BLANK).any() and all((frame == hand.BLANK).all() for frame in blank)
    assert (shown(REST, axis=np.array([0, np.nan, 1])) == hand.BLANK).all()
    assert hand.frames(adroit.PEN, np.zeros((0, 30)), seen(UP), SIZE).shape == (0, 110, 120, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("opengl")
def test_threads_draw_at_once_and_as_one_does(monkeypatch):
    """And all drawing is done by one thread: what OpenGL needs belongs to a thread, on some systems for good."""
    picture, drew = hand._picture, set()

    def spy(*args):
        drew.add(threading.get_ident())
        return picture(*args)

    monkeypatch.setattr(hand, "_picture", spy)
    poses = [np.stack([posed(hand3=0.1 * k + i, pen1=0.01 * k) for k in range(6)]) for i in range(3)]
    work = [(adroit.PEN, pose, seen(axis), size) for pose, axis, size in zip(poses, np.eye(3), (SIZE, SIZE, (80, 90)))]
    alone, together = [hand.frames(*w) for w in work], {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: hand.frames(*work[i])})) for i in range(3)]
    for thread in threads:
        thread.start()
    here = hand.frames(*work[0])
    for thread in threads:
        thread.join()
    for i in range(3):
        np.testing.assert_array_equal(together[i], alone[i])
    np.testing.assert_array_equal(here, alone[0])
    assert len(drew) == 1 and threading.get_ident() not in drew


def python(program, **environment):
    """(what it prints, its errors but for those of the graphics driver) of a new Python; it must end well."""
    unset = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID", "DISPLAY", "WAYLAND_DISPLAY")
    env = {k: v for k, v in os.environ.items() if k not in unset} | environment
    how = dict(cwd=Path(pgdlib.__file__).parent.parent, env=env, capture_output=True, text=True, timeout=120)
    done = subprocess.run([sys.executable, "-c", program], **how)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if not line.startswith(("libEGL", "MESA"))]


BROKEN = """
import sys, types
seaborn = types.SimpleNamespace(color_palette=lambda name: [(0, 0, 0)] * 10)  # all that is needed of it here
sys.modules["seaborn"] = seaborn  # importing it takes longer than all the rest
{}
import numpy as np
from pgdlib.simulators import locomotion
from pgdlib.simulators import pen as adroit
print(adroit.PenBatch(1).begin(*adroit.PEN.start(1, np.random.default_rng(0))).shape)
from pgdlib.lab.explorer import hand
for _ in range(2):
    try:
        hand.frames(adroit.PEN, np.zeros((2, 30)), np.eye(45)[38], (40, 30))
    except hand.CannotRender as reason:
        print(reason)
"""
NO_EGL = """
from OpenGL.platform import ctypesloader
load = ctypesloader.loadLibrary
def without(kind, name, *args, **kwargs):
    if name == "EGL":
        raise OSError("no such library")
    return load(kind, name, *args, **kwargs)
ctypesloader.loadLibrary = without
"""
NO_OSMESA = NO_EGL.replace("EGL", "OSMesa")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")
@pytest.mark.parametrize(
    "breaking, environment, reason",
    [
        (NO_EGL, {}, "(MUJOCO_GL is unset): "),
        (NO_OSMESA, {"MUJOCO_GL": "osmesa"}, "(MUJOCO_GL is osmesa): "),
        ("", {"MUJOCO_GL": "glfw"}, "(MUJOCO_GL is glfw): FatalError"),
    ],
    ids=["no EGL", "no OSMesa", "no display"],
)
def test_without_opengl_it_simulates_and_says_how_to_get_it(breaking, environment, reason):
    out, errors = python(BROKEN.format(breaking), **environment)
    assert out.startswith("(1, 45)\n") and out.count("apt install libegl1 libgl1") == 2 and reason in out
    assert not [line for line in errors if "Exception ignored" in line or "Traceback" in line]


# Side by side; these need no OpenGL


@pytest.fixture
def grey(monkeypatch):
    """Pictures that are grey, lighter from frame to frame; blank where they are not finite."""

    def frames(simulator, qpos, obs, size):
        shades = np.where(np.isfinite(qpos).all(1), 100 + qpos[:, 0], hand.BLANK).astype(np.uint8)
        return np.broadcast_to(shades[:, None, None, None], (len(qpos), size[1], size[0], 3))

    monkeypatch.setattr(hand, "frames", frames)


def replay(K=20, broken=()):
    """A `Replay` of K steps, the first joint at k; NaN in `broken` of what is simulated."""
    imagined = np.zeros((K + 1, 30))
    imagined[:, 0] = np.arange(K + 1)
    simulated = imagined.copy()
    simulated[list(broken)] = np.nan
    return dynamics.Replay(imagined, simulated, np.zeros(K + 1), np.eye(45)[38], adroit.PEN)


def side_by_side(errors, size=(150, 80), **how):
    return hand.SideBySide(replay(**how), errors, "λ = 0", size)


def black(frame):
    """The columns that are black along the axis of the error, but for a mark."""
    low = hand.HEAD + 80 + 30  # the axis begins above and ends below
    return np.flatnonzero((frame[low : low + 70] < 60).all(2).mean(0) > 0.7)


@pytest.mark.usefixtures("grey")
def test_side_by_side_shows_both_the_error_and_the_time():
    film = side_by_side(np.r_[0, np.geomspace(1e-2, 5, 20)])
    for k in (-1, 21):
        with pytest.raises(IndexError, match=f"frame {k} is not there; there are 21"):
            film[k]
    made = np.stack(list(film))
    assert made.shape == (21, hand.HEAD + 80 + hand.FOOT, 330, 3) and made.dtype == np.uint8
    for k in (0, 7, 20):
        for x in (hand.EDGE, 2 * hand.EDGE + 150):
            assert (made[k, hand.HEAD : hand.HEAD + 80, x : x + 150] == 100 + k).all()
    at = np.array([black(frame).max() for frame in made])  # the axis on the left is black as well
    assert (np.diff(at) > 0).all() and abs(np.diff(at) - np.diff(at).mean()).max() <= 1
    orange = np.abs(made[:, hand.HEAD + 80 :].astype(int) - np.array(hand.MODEL) * 255).max(-1) < 10
    marks = [np.nonzero(frame & ~orange[0]) for frame in orange]  # only the mark is not in the frame of the start
    rows, columns = (np.array([m[i].mean() for m in marks[1:]]) for i in (0, 1))
    assert np.abs(columns - at[1:]).max() < 4 and (np.diff(rows) < 0).all()  # it rises with the error
    np.testing.assert_allclose(np.diff(rows), np.diff(rows).mean(), atol=1.5)  # on a logarithmic axis


@pytest.mark.usefixtures("grey")
@pytest.mark.filterwarnings("error")
def test_side_by_side_says_where_there_is_no_simulation():
    K, right = 20, np.s_[hand.HEAD : hand.HEAD + 80, 180:320]
    made = list(side_by_side(np.r_[0, np.full(9, 0.1), np.full(11, np.nan)], broken=range(10, K + 1)))
    assert [(frame[right] < 50).any() for frame in made] == [False] * 10 + [True] * 11
    nowhere = list(side_by_side(np.full(K + 1, np.nan), broken=range(K + 1)))
    assert all((frame[right] < 50).any() for frame in nowhere)
    assert (nowhere[0][right] < 50).sum() != (made[10][right] < 50).sum()  # not the same words
    assert len({black(frame).max() for frame in nowhere}) == K + 1  # time goes on


@pytest.mark.slow
@pytest.mark.usefixtures("opengl")
def test_side_by_side_of_a_real_replay(quiet):
    obs, actions = (x[0, :8].copy() for x in quiet)
    actions[1:] = 1.0  # not what moved the pen
    played = dynamics.replay(adroit.PEN, obs, actions, np.ones(45))
    film = hand.SideBySide(played, played.error, "guide", SIZE)
    first, *_, last = (frame[hand.HEAD : hand.HEAD + SIZE[1]].astype(int) for frame in film)
    left, right = (first[:, x : x + SIZE[0]] for x in (hand.EDGE, 2 * hand.EDGE + SIZE[0]))
    np.testing.assert_array_equal(left, right)  # one start
    np.testing.assert_array_equal(left, shown(played.imagined[0], axis=played.start[36:39])[0])
    assert len(film) == 7 and (first != last).any()


# Files and figures


@pytest.fixture
def moving():
    """Ten frames: a smooth picture that stays, and a square that moves over it."""
    y, x = np.mgrid[:60, :80]
    frames = np.tile(np.stack([x * 3, y * 4, 200 - x], -1).astype(np.uint8), (10, 1, 1, 1))
    for k in range(10):
        frames[k, 50:58, 4 * k : 4 * k + 8] = 10 * k, 0, 0
    return frames


def test_a_gif_holds_the_films(moving, tmp_path):
    path = hand.save_gif([moving, moving[::-1]], tmp_path / "new" / "film.gif", fps=20)
    both = np.concatenate([moving, moving[::-1]], 1)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (10, (80, 120), 0)
        read = []
        for k in range(10):
            gif.seek(k)
            assert gif.info["duration"] == 50
            read.append(np.asarray(gif.convert("RGB")).astype(int))
    assert np.abs(np.stack(read) - both).mean() < 6
    for frame in read[1:]:
        np.testing.assert_array_equal(frame[:50], read[0][:50])  # what stays keeps its colours
    assert conftest.kept(tmp_path) == ["new/film.gif"]


def test_a_gif_that_cannot_be_written_leaves_nothing(moving, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    kept = hand.save_gif([moving[:1]], tmp_path / "old.gif").read_bytes()
    monkeypatch.setattr(artifacts.os, "fsync", fail)
    for name in ("new.gif", "old.gif"):
        with pytest.raises(OSError, match="disk full"):
            hand.save_gif([moving], tmp_path / name)
    assert conftest.kept(tmp_path) == ["old.gif"] and Path(tmp_path / "old.gif").read_bytes() == kept


def test_strip_shows_the_frames_with_their_times(moving):
    picked = moving[[0, 4, 9]]
    fig = conftest.drawn(hand, "strip", {"imagined": picked, "simulated": 255 - picked}, [0, 0.04, 0.09])
    assert {TITLE, "imagined", "simulated", "0.00 s", "0.04 s", "0.09 s"} <= set(texts(fig))
    (ax,) = fig.axes
    picture = ax.get_images()[0].get_array()
    for j, name in enumerate(("imagined", "simulated")):
        for i, time in enumerate(("0.00 s", "0.04 s", "0.09 s")):
            expected = picked[i] if name == "imagined" else 255 - picked[i]
            np.testing.assert_array_equal(picture[60 * j : 60 * (j + 1), 80 * i : 80 * (i + 1)], expected)
            assert 80 * i < ax.get_xticks()[i] < 80 * (i + 1) and ax.get_xticklabels()[i].get_text() == time
        assert 60 * j < ax.get_yticks()[j] < 60 * (j + 1) and ax.get_yticklabels()[j].get_text() == name
