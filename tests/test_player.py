"""The player beside an explorer, without a frontend: which film it shows, when one is rendered, and what is kept of it."""

import io
import threading
import time

import numpy as np
import pytest
from conftest import kept, texts
from matplotlib.figure import Figure
from PIL import Image
from test_explorer import a_panel, nothing_fails_unseen, panel, sketched
from test_shelf import the_lab

from pgdlib import data, dynamics
from pgdlib.lab.explorer import film, player, shelf, widgets

__all__ = ["nothing_fails_unseen", "panel", "sketched"]  # fixtures
pytestmark = [
    pytest.mark.usefixtures("sketched"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]
TIMES = 7  # of a film: the steps from the second of eight on
FILMS = "films/standin-human-ci-explicit-"


class Projector:
    """Stands for `film.side_by_side`: a film of its own for every call, which waits after frame `at` unless `open`."""

    def __init__(self):
        self.titles, self.given, self.open, self.at = [], [], True, 3
        self.waits, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, replay, errors, title, size, report):
        self.titles.append(title.removeprefix("stand-in pen-human: "))
        self.given.append((replay, errors))
        number = len(self.titles)
        for k in range(2 * TIMES):
            report(k + 1)
            if k == self.at:
                self.waits.release()
                assert self.open or self.gate.acquire(timeout=10)
        return np.stack([np.full((8, 8, 3), (number, 30 * k, 7), np.uint8) for k in range(TIMES)])

    def close(self):
        """From now on films wait."""
        self.open = False

    def let_go(self):
        """One that waits, and those that come."""
        self.open = True
        self.gate.release()

    def waiting(self):
        """Once one waits."""
        return self.waits.acquire(timeout=10)


@pytest.fixture
def projector(monkeypatch):
    made = Projector()
    monkeypatch.setattr(film, "side_by_side", made)
    return made


def on_screen(hands):
    """(which of the films, which of its frames); None where there is none."""
    if not hands._image.value:
        return None
    number, shade, seven = np.asarray(Image.open(io.BytesIO(hands._image.value)))[0, 0].tolist()
    assert seven == 7
    return number, shade // 30


def load(hands):
    hands.load()
    assert hands._job.wait(30)
    return on_screen(hands)


def median(panel):
    """The trajectory in the middle of those that have an error."""
    error = panel.view.here.measures["normalised"].tolist()
    finite = sorted(e for e in error if e == e)
    assert 1 < len(finite) < len(error)
    return error.index(finite[len(finite) // 2])


# Which film


def test_nothing_is_rendered_for_a_reader_until_it_is_asked_for(panel, projector, runs):
    hands, before = player.Player(panel), kept(runs)
    panel._slider.value = 1
    time.sleep(0.02)
    assert projector.titles == [] and on_screen(hands) is None and not hands._job.busy
    assert load(hands) == (1, 0) and projector.titles == [f"λ = 0.5, no. {median(panel)}"]
    assert set(kept(runs)) - set(before) == {f"{FILMS}0.5-{median(panel)}.gif"}
    assert load(hands) == (1, 0) and len(projector.titles) == 1  # it is kept


def test_the_film_is_that_of_the_chosen_trajectory(panel, projector):
    hands, lab = player.Player(panel), the_lab()
    panel.pick(4)
    load(hands)
    hands._guided.value = False
    assert hands._job.wait(30) and projector.titles == ["λ = 1, no. 4", "λ = 0, no. 4"]
    for (replay, errors), lam in zip(projector.given, (1.0, 0.0)):
        steps = lab.normaliser.denormalise(panel.view.points[lam].x[4]).numpy()
        expected = dynamics.replay(steps[:, data.OBS], steps[:, data.ACTIONS])
        np.testing.assert_array_equal(replay.simulated, expected.simulated)
        np.testing.assert_array_equal(errors, expected.normalised(lab.variance))
    assert on_screen(hands) == (2, 0)
    hands._guided.value = True
    assert on_screen(hands) == (1, 0) and len(projector.titles) == 2


def test_the_frames_are_those_of_the_slider(panel, projector, runs):
    hands = player.Player(panel)
    hands._frame.value = 1
    assert load(hands) == (1, 1) and hands._frame.max == hands._play.max == TIMES - 1
    hands._frame.value = 5
    assert on_screen(hands) == (1, 5)
    with Image.open(next(runs.glob("films/*.gif"))) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (TIMES, (8, 8), 100)


def test_save_writes_both_films_into_one_file_alone(panel, projector, monkeypatch):
    hands, saved = player.Player(panel), []
    monkeypatch.setattr(film, "save_gif", lambda *given: saved.append(given))
    panel.pick(2)
    hands.save("hands.gif")
    ((both, path, fps),) = saved
    assert projector.titles == ["λ = 0, no. 2", "λ = 1, no. 2"] and (path, fps) == ("hands.gif", 10)
    assert (both[:, :8, :, 0] == 1).all() and (both[:, 8:, :, 0] == 2).all() and both.shape == (TIMES, 16, 8, 3)
    assert on_screen(hands) is None


def test_the_number_follows_the_panel_and_leads_it(panel, projector):
    hands = player.Player(panel)
    assert hands.number == hands._number.value == median(panel) and hands._number.options == tuple(range(6))
    panel.pick(5)
    assert hands.number == hands._number.value == 5
    hands._number.value = 1
    assert panel.picked == panel.view.picked == 1 and b", 1, 0.9, 2.0)" in panel._cloud.value.tobytes()
    panel._slider.value = 3
    assert hands._number.value == 1 and hands._guided.options == (("λ = 0", False), ("λ = 2.5", True))
    panel._rule.value = "smoothed"
    assert hands._number.value == median(panel) and panel.picked is None
    assert projector.titles == []


def test_fewer_fresh_trajectories_than_what_is_picked(panel, projector, runs, monkeypatch):
    monkeypatch.setattr(shelf, "FRESH", 3)
    hands = player.Player(panel)
    panel._number.value = 0.7
    panel._now.click()
    assert panel._job.wait(30) and panel.stop == (0.7, 1) and hands._guided.options[1] == ("λ = 0.7 (fresh)", True)
    panel._slider.value = 0
    panel.pick(5)
    panel._slider.value = 2
    assert panel.stop == (0.7, 1) and panel.picked == 5 and hands._number.options == (0, 1, 2)
    assert hands.number == hands._number.value < 3
    load(hands)
    assert projector.titles == [f"λ = 0.7, no. {hands.number}"] and f"{FILMS}0.7-fresh-1-{hands.number}.gif" in kept(runs)
    panel._slider.value = 1
    assert hands._number.value == 5


def test_without_a_sweep_it_waits_for_one(projector, runs):
    panel = a_panel()
    hands = player.Player(panel)
    hands.load()
    hands._guided.value = False
    hands._frame.value = 1
    assert not hands._job.busy and on_screen(hands) is None
    panel._compute.click()
    assert panel._job.wait(30) and hands._number.value == hands.number
    load(hands)
    assert projector.titles == [f"λ = 0, no. {hands.number}"]
    panel._rule.value = "proximal"
    hands._guided.value = True
    assert not hands._job.busy and len(projector.titles) == 1


# When it is rendered


def test_another_choice_takes_the_place_of_what_is_rendered(panel, projector, runs):
    hands, before = player.Player(panel), kept(runs)
    projector.close()
    panel.pick(1)
    hands.load()
    assert projector.waiting()
    for number in (2, 3):
        panel.pick(number)
        hands.load()
    projector.let_go()
    assert hands._job.wait(30) and projector.titles == ["λ = 1, no. 1", "λ = 1, no. 3"]
    assert on_screen(hands) == (2, 0) and set(kept(runs)) - set(before) == {f"{FILMS}1-3.gif"}


def test_what_is_being_rendered_is_not_begun_again(panel, projector):
    hands = player.Player(panel)
    projector.close()
    hands.load()
    assert projector.waiting()
    panel._estimator.value = "appendix_b"
    hands.load()
    projector.let_go()
    assert hands._job.wait(30) and len(projector.titles) == 1 and on_screen(hands) == (1, 0)


def test_one_can_change_ones_mind(panel, projector):
    hands = player.Player(panel)
    projector.close()
    for number in (1, 2, 1):
        panel.pick(number)
        hands.load()
    assert projector.waiting()
    projector.let_go()
    assert hands._job.wait(30) and projector.titles[-1] == "λ = 1, no. 1" and on_screen(hands) == (len(projector.titles), 0)


def test_a_cancelled_film_leaves_nothing_and_is_not_begun_again(panel, projector, runs):
    hands, before = player.Player(panel), kept(runs)
    projector.close()
    hands.load()
    assert projector.waiting()
    hands._job.cancel.click()
    projector.let_go()
    assert hands._job.wait(30) and hands._job.line.value == "cancelled"
    assert len(projector.titles) == 1 and kept(runs) == before and on_screen(hands) is None
    assert load(hands) == (2, 0)


def test_a_user_who_cancels_the_second_film_is_heard(panel, projector):
    """Though the player itself gave up the first, but too late."""
    hands = player.Player(panel)
    projector.close()
    projector.at = 2 * TIMES - 1
    panel.pick(1)
    hands.load()
    assert projector.waiting()
    panel.pick(2)
    hands.load()
    projector.at = 3
    projector.gate.release()
    assert projector.waiting()
    hands._job.cancel.click()
    projector.let_go()
    assert hands._job.wait(30) and len(projector.titles) == 2 and hands._job.line.value == "cancelled"


def test_a_film_that_fails_is_told_and_the_next_is_rendered(panel, projector, monkeypatch):
    hands = player.Player(panel)
    with monkeypatch.context() as patch:
        patch.setattr(film, "save_gif", lambda *_: {}["full"])
        assert load(hands) is None and hands._job.line.value == "KeyError: &#x27;full&#x27;"
    assert load(hands) == (2, 0) and hands._job.line.value == ""


def test_the_oldest_film_is_forgotten(panel, projector, monkeypatch):
    monkeypatch.setattr(player, "KEPT", 2)
    hands = player.Player(panel)
    for number in (1, 2, 3, 2, 1):
        panel.pick(number)
        load(hands)
    assert [title[-1] for title in projector.titles] == ["1", "2", "3", "1"]


def test_as_long_as_the_slider_moves_nothing_is_rendered(panel, projector, monkeypatch):
    monkeypatch.setattr(widgets, "live", lambda: True)
    monkeypatch.setattr(player, "PATIENCE", 0.3)
    hands = player.Player(panel)
    for place in (0, 1, 3):
        panel._slider.value = place
    assert projector.titles == [] and hands._timer.daemon
    assert projector.waiting() and hands._job.wait(30)
    assert projector.titles == [f"λ = 2.5, no. {hands.number}"] and on_screen(hands) == (1, 0)


def test_a_new_player_takes_the_place_of_the_old(panel, projector, monkeypatch):
    """As the cell that makes it may be run again; other listeners stay."""
    heard = []
    panel.listeners.append(lambda: heard.append(panel.stop))
    old, new = player.Player(panel), player.Player(panel)
    monkeypatch.setattr(widgets, "live", lambda: True)
    monkeypatch.setattr(player, "PATIENCE", 0.01)
    panel._slider.value = 0
    assert projector.waiting() and new._job.wait(30)
    assert not old._timer.is_alive()
    assert len(projector.titles) == 1 and on_screen(old) is None and on_screen(new) == (1, 0) and heard == [(0.0, 0)]


def test_the_last_choice_is_what_is_shown(panel, projector, monkeypatch):
    """However fast one chooses, with timers, jobs and pictures drawn ahead all at once."""
    monkeypatch.setattr(widgets, "live", lambda: True)
    monkeypatch.setattr(player, "PATIENCE", 0.001)
    hands, rng = player.Player(panel), np.random.default_rng(0)
    for i in range(90):
        if i % 3 == 0:
            panel.pick(int(rng.integers(6)))
        elif i % 3 == 1:
            panel._slider.value = int(rng.integers(4))
        else:
            hands._guided.value = not hands._guided.value
        time.sleep(0.002 * (i % 2))
    hands._timer.join(10)
    assert hands._job.wait(30)
    shown, lam = on_screen(hands)[0], panel.stop[0] if hands._guided.value else 0.0
    assert projector.titles[shown - 1] == f"λ = {lam:.3g}, no. {hands.number}"
    assert len(projector.titles) > 5


# Where nothing can be drawn


def test_where_mujoco_cannot_render_it_says_so_and_all_else_works(panel, runs, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise film.CannotRender("install <libEGL>")

    monkeypatch.setattr(film, "side_by_side", fail)
    monkeypatch.setattr(film, "frames", fail)
    hands, before = player.Player(panel), kept(runs)
    assert load(hands) is None and hands._note.value == "<pre>install &lt;libEGL&gt;</pre>" and hands._job.line.value == ""
    for change in (lambda: hands._number.set_trait("value", 2), lambda: hands._guided.set_trait("value", False)):
        change()
        assert hands._job.wait(30) and load(hands) is None
    panel._slider.value = 3
    assert panel.picked == 2 and hands._guided.options[1][0] == "λ = 2.5" and "install" in hands._note.value
    fig = hands.figure()
    assert isinstance(fig, Figure) and texts(fig) == ["install <libEGL>"]
    hands.save(tmp_path / "hands.gif")
    assert not (tmp_path / "hands.gif").exists() and kept(runs) == before


@pytest.mark.slow
def test_a_real_film(panel, runs):
    try:
        film.frames(np.zeros((1, 30)), np.array([0, 0, 1.0]), (40, 30))
    except film.CannotRender as reason:
        pytest.skip(f"NOTHING IS DRAWN IN THIS TEST: {reason}")
    hands, size = player.Player(panel), (2 * 320 + 3 * film.EDGE, film.HEAD + 270 + film.FOOT)
    hands.load()
    assert hands._job.wait(120) and hands._note.value == hands._job.line.value == ""
    first = Image.open(io.BytesIO(hands._image.value))
    hands._frame.value = TIMES - 1
    last = Image.open(io.BytesIO(hands._image.value))
    assert first.size == last.size == size and (np.asarray(first) != np.asarray(last)).any()
    (path,) = runs.glob("films/*.gif")
    with Image.open(path) as gif:
        assert (gif.size, gif.n_frames) == (size, TIMES)
    fig = hands.figure(moments=3)
    names = {"λ = 0\nimagined", "λ = 0\nsimulated", "λ = 1\nimagined", "λ = 1\nsimulated"}
    assert len(fig.axes) == 12 and names <= set(texts(fig)) and {"0.00 s", "0.06 s"} <= set(texts(fig))
    pictures = [np.asarray(ax.get_images()[0].get_array()) for ax in fig.axes]
    np.testing.assert_array_equal(pictures[0], pictures[3])  # the simulator begins where the model does
    assert (pictures[2] != pictures[5]).any()  # and ends elsewhere
