"""What panels are made of: figures in place of widgets, pictures that are kept, and work in threads that can be ended."""

import io
import sys
import threading
import types

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from conftest import wait_for
from matplotlib.figure import Figure
from PIL import Image
from small_study import is_live
from tqdm import tqdm

from pgdlib.lab.explorer import widgets

__all__ = ["is_live"]  # a fixture
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
BOOK = "application/vnd.jupyter.widget-view+json"


# Figures in place of widgets


NBCLIENT = "--HistoryManager.hist_file=:memory:"


@pytest.mark.parametrize(
    "kernel, argument, override, expected",
    [
        (True, "", "", True),  # whatever front end has started it
        (True, NBCLIENT, "", False),
        (False, "", "", False),  # a script
        (True, "", "0", False),
        (True, NBCLIENT, "1", True),
        (False, "", "1", True),
    ],
)
def test_live_knows_who_started_the_kernel(monkeypatch, kernel, argument, override, expected):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID"):  # what some front ends leave out
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGD_WIDGETS", override)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher", "-f", "kernel.json", argument])
    monkeypatch.setattr(widgets, "get_ipython", lambda: types.SimpleNamespace(kernel=1) if kernel else None)
    assert widgets.live() is expected


def test_another_override_is_refused(monkeypatch):
    monkeypatch.setenv("PGD_WIDGETS", "yes")
    with pytest.raises(ValueError, match="PGD_WIDGETS='yes' is not allowed; it must be 0, 1 or unset"):
        widgets.live()


@pytest.mark.parametrize("style", [{}, {"savefig.bbox": "tight", "savefig.dpi": 300, "savefig.facecolor": "red"}])
def test_a_png_has_the_pixels_of_its_figure(style):
    with plt.rc_context(style):
        read = Image.open(io.BytesIO(widgets.png(Figure(figsize=(5.0, 4.3)))))
    assert read.format == "PNG" and read.size == (550, 473)
    assert read.convert("RGB").getcolors() == [(550 * 473, (255, 255, 255))]


def shown(monkeypatch, widget):
    """What is displayed for it and a pyplot figure, which is closed then."""
    given = []
    monkeypatch.setattr(widgets, "display", lambda bundle, raw: given.append(bundle) if raw else None)
    fig = plt.figure(figsize=(1, 1))
    widgets.show(widget, fig)
    assert not plt.fignum_exists(fig.number)
    (bundle,) = given
    return bundle


def test_a_reader_gets_the_figure_alone(monkeypatch, capsys):
    bundle = shown(monkeypatch, ipywidgets.HTML())
    assert capsys.readouterr().out == ""
    assert bundle.keys() == {"image/png", "text/plain"}
    assert Image.open(io.BytesIO(bundle["image/png"])).size == (110, 110)


@pytest.mark.usefixtures("is_live")
def test_a_frontend_gets_the_widget_too_and_once_a_line_for_where_it_does_not_show(monkeypatch, capsys):
    widgets._tell.cache_clear()
    shown(monkeypatch, ipywidgets.HTML())
    assert "this front end runs no widgets" in capsys.readouterr().out
    widget = ipywidgets.HTML()
    bundle = shown(monkeypatch, widget)
    assert bundle.keys() == {"image/png", "text/plain", BOOK} and bundle[BOOK]["model_id"] == widget.model_id
    assert capsys.readouterr().out == ""


# Pictures that are kept


def album(**how):
    """An `Album` and the keys it has drawn, in order."""
    keys = []
    return widgets.Album(lambda key: keys.append(key) or f"picture {key}"), keys


def test_an_album_draws_once_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(widgets.Album, "SIZE", 3)
    pictures, drawn = album()
    assert [pictures[key] for key in (1, 2, 1, 3, 2)] == ["picture 1", "picture 2", "picture 1", "picture 3", "picture 2"]
    assert drawn == [1, 2, 3]
    assert pictures[4] == "picture 4" and pictures[3] == "picture 3" and drawn == [1, 2, 3, 4]
    assert pictures[1] == "picture 1" and drawn == [1, 2, 3, 4, 1]


def test_what_could_not_be_drawn_is_tried_again():
    pictures = widgets.Album(lambda key: 1 / key)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            pictures[0]
    assert pictures[2] == 0.5


def test_what_is_kept_waits_for_no_other():
    started, go_on = threading.Event(), threading.Event()

    def draw(key):
        if key == "slow":
            started.set()
            go_on.wait(10)
        return key

    pictures = widgets.Album(draw)
    assert pictures["quick"] == "quick"
    thread = threading.Thread(target=lambda: pictures["slow"])
    thread.start()
    started.wait(10)
    read = []
    threading.Thread(target=lambda: read.append(pictures["quick"])).start()
    try:
        wait_for(lambda: read == ["quick"], 2)
    finally:
        go_on.set()
        thread.join()


def test_nothing_is_drawn_ahead_for_a_reader():
    pictures, drawn = album()
    before = threading.active_count()
    pictures.draw_ahead([1, 2])
    assert threading.active_count() == before and drawn == []


@pytest.mark.usefixtures("is_live")
def test_drawing_ahead_stops_when_others_come():
    drawn, threads, begun, go_on = [], set(), threading.Event(), threading.Event()

    def draw(key):
        begun.set()
        go_on.wait(10)
        drawn.append(key)
        threads.add(threading.current_thread())
        return key

    pictures = widgets.Album(draw)
    pictures.draw_ahead(["a", "b", "c"])
    begun.wait(10)
    pictures.draw_ahead(["x", "y"])
    go_on.set()
    wait_for(lambda: len(drawn) == 3)
    assert drawn == ["a", "x", "y"] and all(t.daemon for t in threads) and threading.current_thread() not in threads
    wait_for(lambda: not any(t.is_alive() for t in threads))
    pictures.draw_ahead(["x", "y"])
    assert pictures["y"] == "y" and drawn == ["a", "x", "y"]


@pytest.mark.usefixtures("is_live")
def test_drawing_ahead_waits_until_no_others_come_and_tells_of_the_first():
    pictures, drawn = album()
    told = []
    for keys in ([1, 2], [3, 4], [5, 6]):
        pictures.draw_ahead(keys, 0.1, lambda: told.append(drawn[-1]))
    assert drawn == []
    wait_for(lambda: drawn == [5, 6])
    assert told == [5]


@pytest.mark.usefixtures("is_live")
def test_what_is_asked_for_comes_before_what_is_drawn_ahead():
    pictures, drawn = album()
    pictures.draw_ahead(list(range(100_000)))
    assert pictures["asked for"] == "picture asked for" and len(drawn) < 100
    pictures.draw_ahead([])


@pytest.mark.usefixtures("is_live")
def test_slide_shows_the_figure_of_its_place():
    figures = [Figure(figsize=(1 + i, 1), facecolor=c) for i, c in enumerate(("red", "green", "blue"))]
    drawn = []
    slider, image = widgets.slide("noise", ["a", "b", "c"], lambda i: drawn.append(i) or figures[i], start=1).children

    def is_of(i):
        return image.value == widgets.png(figures[i])

    assert slider.label == "b" and slider.description == "noise" and is_of(1)
    wait_for(lambda: sorted(drawn) == [0, 1, 2])
    slider.value = 2
    assert slider.label == "c" and is_of(2) and not is_of(1)
    slider.value = 0
    assert is_of(0) and sorted(drawn) == [0, 1, 2]


# Work


def finish(job):
    job.thread.join(10)
    assert not job.busy and {job.bar.layout.display, job.cancel.layout.display} == {"none"}


def test_a_job_works_in_a_thread_that_dies_with_the_kernel():
    job, seen, go_on = widgets.Job(), [], threading.Event()
    assert not job.busy and job.bar.layout.display == "none"

    def work(report):
        seen.append(threading.current_thread())
        report(0.5, "a < b")
        go_on.wait(10)
        return "7 <"

    job.start("begins", work)
    wait_for(lambda: job.line.value == "a &lt; b")
    assert job.busy and job.bar.value == 0.5 and job.cancel.layout.display == job.bar.layout.display == ""
    assert seen[0].daemon and seen[0] is not threading.current_thread()
    go_on.set()
    finish(job)
    assert job.line.value == "7 &lt;"


def test_only_one_job_at_a_time():
    """Whenever the second is asked for: even while the first is being set up."""
    job, ran, go_on = widgets.Job(), [], threading.Event()
    job.line.observe(lambda _: job.start("second", lambda report: ran.append(2)), "value")
    job.start("first", lambda report: (go_on.wait(10) and ran.append(1)) or "")
    job.start("third", lambda report: ran.append(3))
    go_on.set()
    finish(job)
    assert ran == [1]


def test_cancel_ends_a_job_at_its_next_report():
    job, done = widgets.Job(), []

    def work(report):
        for i in range(100_000):
            report(i / 100_000)
            done.append(i)
            if i == 2:
                job.cancel.click()

    job.start("work", work)
    finish(job)
    assert done == [0, 1, 2] and job.line.value == "cancelled"
    job.start("again", lambda report: report(0.1) or "well")  # an old wish to cancel is forgotten
    finish(job)
    assert job.line.value == "well"


def test_a_job_that_fails_says_why_and_the_next_one_runs():
    job = widgets.Job()
    for work, text in (
        (lambda report: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda report: {}["<b>"], "KeyError: &#x27;&lt;b&gt;&#x27;"),
        (lambda report: "", ""),
    ):
        job.start("works", work)
        finish(job)
        assert job.line.value == text


def test_the_bar_moves_in_few_steps_and_back():
    job, seen = widgets.Job(), []
    job.bar.observe(lambda change: seen.append(change["new"]), "value")
    job.start("counts", lambda report: ([report(i / 5000) for i in range(5001)] and report(0.25)) or "")
    finish(job)
    assert len(seen) < 60 and seen[-2:] == [1.0, 0.25] and seen[:-1] == sorted(seen[:-1])


# Bars


def test_bars_count_as_those_of_tqdm(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # counts for bars that are seen
    seen = []
    bar = widgets.bars(lambda share, text: seen.append((round(share, 3), text)))
    with bar(total=4, desc="collecting", unit="%", mininterval=2) as one:
        one.update(3)
        one.update(4 - one.n)
        assert one.n == 4
    assert list(dict.fromkeys(seen)) == [(0, "collecting"), (0.75, "collecting"), (1, "collecting")]
    seen.clear()
    assert list(bar(["a", "b"], desc="sweep", mininterval=5)) == ["a", "b"] and list(bar([])) == []
    assert list(dict.fromkeys(share for share, _ in seen)) == [0, 0.5, 1] and seen[1][1] == "sweep"
    with bar(total=0, desc="nothing"):
        pass
    assert seen[-1] == (1, "nothing")


def test_a_cancelled_bar_leaves_tqdm_as_it_was():
    def report(share, text):
        if share == 0.5:
            raise widgets.Cancelled

    with pytest.raises(widgets.Cancelled):
        list(widgets.bars(report)(range(4)))
    thread = threading.Thread(target=lambda: list(tqdm(range(3), file=io.StringIO())), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()  # the lock of all bars is free
