"""The player beside an explorer, without a front end: which trajectory it shows, what it draws and when."""

import io
import threading
import time

import numpy as np
import pytest
from conftest import kept, texts, wait_for
from matplotlib.figure import Figure
from PIL import Image
from small_study import SWEEPS, explorer, finish, is_live, nothing_fails_unseen, sample, sketched, swept, the_lab

from pgdlib import dynamics
from pgdlib.lab.explorer import hand, panel, player, stops
from pgdlib.simulators.pen import PEN

__all__ = ["explorer", "is_live", "nothing_fails_unseen", "sketched", "swept"]  # fixtures
pytestmark = [
    pytest.mark.usefixtures("sketched"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]
TIMES = 7  # of a film: the steps from the second of eight on


class Projector:
    """Stands for `hand.SideBySide`, and notes what is drawn: pixels are (number of the film, 30 times the frame, 7)."""

    def __init__(self):
        self.titles, self.given, self.drawn = [], [], []

    def __call__(self, replay, errors, title, size):
        self.titles.append(title.removeprefix("stand-in pen-human: "))
        self.given.append((replay, errors, size))
        return Film(self, len(self.titles))


class Film:
    def __init__(self, projector, number):
        self.projector, self.number = projector, number

    def __getitem__(self, k):
        if k >= TIMES:
            raise IndexError
        self.projector.drawn.append((self.projector.titles[self.number - 1], k))
        return np.full((8, 8, 3), (self.number, 30 * k, 7), np.uint8)


@pytest.fixture
def projector(monkeypatch):
    made = Projector()
    monkeypatch.setattr(hand, "SideBySide", made)
    return made


def on_screen(hands, projector):
    """(title of the film, frame); None where there is none."""
    if not hands._image.value:
        return None
    number, k, seven = np.asarray(Image.open(io.BytesIO(hands._image.value)))[0, 0].tolist()
    assert seven == 7
    return projector.titles[number - 1], k // 30


def median(explorer):
    """The trajectory in the middle of those that have an error."""
    error = explorer.view.here.measures["normalised"].tolist()
    finite = sorted(e for e in error if e == e)
    assert 1 < len(finite) < len(error)
    return error.index(finite[len(finite) // 2])


def test_for_a_reader_nothing_is_drawn_until_it_is_asked_for(explorer, projector, runs):
    hands, before = player.Player(explorer), kept(runs)
    explorer._slider.value = 1
    time.sleep(0.02)
    assert projector.titles == [] and on_screen(hands, projector) is None
    for _ in range(2):  # the second time it is kept
        hands.draw()
        assert on_screen(hands, projector) == (f"λ = 0.5, no. {median(explorer)}", 0)
    assert len(projector.drawn) == 1 and kept(runs) == before


def test_the_film_is_that_of_the_chosen_trajectory_and_time(explorer, projector):
    hands, lab = player.Player(explorer), the_lab()
    explorer.pick(4)
    hands.draw()
    hands._frame.value = 5
    assert on_screen(hands, projector) == ("λ = 1, no. 4", 5) and hands._frame.max == hands._play.max == TIMES - 1
    hands._guided.value = False
    assert on_screen(hands, projector) == ("λ = 0, no. 4", 5)
    for (replay, errors, _), lam in zip(projector.given, (1.0, 0.0), strict=True):
        steps = lab.normaliser.denormalise(explorer.stops.sweep.points[lam].x[4]).numpy()
        expected = dynamics.replay(PEN, steps[:, :45], steps[:, 45:69], lab.variance)
        np.testing.assert_array_equal(replay.simulated, expected.simulated)
        np.testing.assert_array_equal(errors, expected.error)
    hands._guided.value = True
    assert on_screen(hands, projector) == ("λ = 1, no. 4", 5) and len(projector.drawn) == 3


def test_save_writes_both_films_below_each_other(explorer, projector, tmp_path):
    hands = player.Player(explorer)
    explorer.pick(2)
    hands.save(tmp_path / "hands.gif")
    assert projector.titles == ["λ = 0, no. 2", "λ = 1, no. 2"] and [size for *_, size in projector.given] == [(250, 210)] * 2
    with Image.open(tmp_path / "hands.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (TIMES, (8, 16), 100)
    assert projector.drawn == [(title, k) for title in projector.titles for k in range(TIMES)]
    assert on_screen(hands, projector) is None


def test_the_number_follows_the_explorer_and_leads_it(explorer, projector):
    hands = player.Player(explorer)
    assert hands.number == hands._number.value == median(explorer) and hands._number.options == tuple(range(6))
    explorer.pick(5)
    assert hands.number == hands._number.value == 5
    hands._number.value = 1
    assert explorer.picked == explorer.view.picked == 1 and b", 1, 0.9, 2.0)" in explorer._cloud.value.tobytes()
    explorer._slider.value = 3
    assert hands._number.value == 1 and hands._guided.options == (("λ = 0", False), ("λ = 2.5", True))
    explorer._rule.value = "smoothed"
    assert hands._number.value == median(explorer) and explorer.picked is None
    assert projector.titles == []


def test_fewer_fresh_trajectories_than_what_is_picked(explorer, projector, monkeypatch):
    monkeypatch.setattr(stops, "FRESH", 3)
    hands = player.Player(explorer)
    sample(explorer, 0.7)
    assert explorer.stop == (0.7, 1) and hands._guided.options == (("λ = 0, other noise", False), ("λ = 0.7 (fresh)", True))
    explorer._slider.value = 0
    explorer.pick(5)
    explorer._slider.value = 2
    assert explorer.stop == (0.7, 1) and explorer.picked == 5 and hands._number.options == (0, 1, 2)
    assert hands.number == hands._number.value < 3
    hands.draw()
    assert projector.titles == [f"λ = 0.7, no. {hands.number}"]
    explorer._slider.value = 1
    assert hands._number.value == 5


@pytest.mark.usefixtures("runs")
def test_without_a_sweep_it_waits_for_one(projector):
    explorer = panel.Explorer(the_lab(), SWEEPS)
    hands = player.Player(explorer)
    hands.draw()
    hands._guided.value = False
    hands._frame.value = 1
    assert on_screen(hands, projector) is None
    explorer._compute.click()
    finish(explorer)
    assert hands._number.value == hands.number
    hands.draw()
    assert on_screen(hands, projector) == (f"λ = 0, no. {hands.number}", 1)
    explorer._rule.value = "proximal"
    hands._guided.value = True
    assert len(projector.titles) == 1


@pytest.mark.usefixtures("is_live")
def test_the_hand_follows_once_the_slider_rests(explorer, projector):
    hands = player.Player(explorer)
    hands._frame.value = 4
    first = projector.drawn.copy()
    for place in (0, 1, 3):
        explorer._slider.value = place
    assert projector.drawn == first
    wait_for(lambda: len(projector.drawn) == len(first) + TIMES)
    title = f"λ = 2.5, no. {hands.number}"
    assert projector.drawn[len(first) :] == [(title, k) for k in (4, 5, 6, 0, 1, 2, 3)]
    assert on_screen(hands, projector) == (title, 4)
    hands._frame.value = 6
    assert on_screen(hands, projector) == (title, 6) and len(projector.drawn) == len(first) + TIMES
    hands._guided.value = False  # at once, and the rest of it ahead
    assert on_screen(hands, projector) == (f"λ = 0, no. {hands.number}", 6)
    wait_for(lambda: len(projector.drawn) == len(first) + 2 * TIMES)


@pytest.mark.usefixtures("is_live")
def test_a_new_player_takes_the_place_of_the_old(explorer, projector, monkeypatch):
    """As the cell that makes it may be run again."""
    monkeypatch.setattr(player, "PATIENCE", 0.05)
    old, new = player.Player(explorer), player.Player(explorer)
    wait_for(lambda: on_screen(new, projector) and on_screen(old, projector))  # both begin where the explorer stands
    explorer._slider.value = 0
    title = f"λ = 0, no. {new.number}"
    wait_for(lambda: on_screen(new, projector) == (title, 0))
    wait_for(lambda: (title, TIMES - 1) in projector.drawn)
    assert on_screen(old, projector)[0] != title and projector.titles.count(title) == 1


@pytest.mark.usefixtures("is_live")
def test_the_last_choice_is_what_is_shown(explorer, projector, monkeypatch):
    """However fast one chooses, while other frames and pictures are drawn ahead."""
    monkeypatch.setattr(player, "PATIENCE", 0.001)
    hands, rng = player.Player(explorer), np.random.default_rng(0)
    before = set(threading.enumerate())
    for i in range(90):
        if i % 3 == 0:
            explorer.pick(int(rng.integers(6)))
        elif i % 3 == 1:
            explorer._slider.value = int(rng.integers(4))
        else:
            hands._guided.value = not hands._guided.value
        time.sleep(0.002 * (i % 2))
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("hand"):
            thread.join(10)
    lam = explorer.stop[0] if hands._guided.value else 0.0
    assert on_screen(hands, projector) == (f"λ = {lam:.3g}, no. {hands.number}", 0) and len(projector.titles) > 5


# Where nothing can be drawn, and where it can


def test_where_mujoco_cannot_render_it_says_so_and_all_else_works(explorer, runs, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise hand.CannotRender("install <libEGL>")

    monkeypatch.setattr(hand, "frames", fail)
    hands, before = player.Player(explorer), kept(runs)
    hands.draw()
    for change in (lambda: hands._number.set_trait("value", 2), lambda: hands._guided.set_trait("value", False)):
        change()
        assert not hands._image.value and hands._note.value == "<pre>install &lt;libEGL&gt;</pre>"
    explorer._slider.value = 3
    assert explorer.picked == 2 and hands._guided.options[1][0] == "λ = 2.5" and "install" in hands._note.value
    fig = hands.figure()
    assert isinstance(fig, Figure) and texts(fig) == ["install <libEGL>"]
    hands.save(tmp_path / "hands.gif")
    assert not (tmp_path / "hands.gif").exists() and kept(runs) == before


@pytest.mark.slow
def test_a_real_film(explorer):
    try:
        hand.frames(PEN, np.zeros((1, 30)), np.eye(45)[38], (40, 30))
    except hand.CannotRender as reason:
        pytest.skip(f"NOTHING IS DRAWN IN THIS TEST: {reason}")
    hands, size = player.Player(explorer), (2 * 320 + 3 * hand.EDGE, hand.HEAD + 270 + hand.FOOT)
    hands.draw()
    first = Image.open(io.BytesIO(hands._image.value))
    hands._frame.value = TIMES - 1
    last = Image.open(io.BytesIO(hands._image.value))
    assert hands._note.value == "" and first.size == last.size == size and (np.asarray(first) != np.asarray(last)).any()
    fig = hands.figure(moments=3)
    names = {"λ = 0\nimagined", "λ = 0\nsimulated", "λ = 1\nimagined", "λ = 1\nsimulated"}
    assert names | {"0.00 s", "0.06 s"} <= set(texts(fig))
    picture = np.asarray(fig.axes[0].get_images()[0].get_array())
    tiles = picture.reshape(4, 200, 3, 240, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(tiles[0, 0], tiles[1, 0])  # the simulator begins where the model does
    assert (tiles[0, 2] != tiles[1, 2]).any()  # and ends elsewhere
