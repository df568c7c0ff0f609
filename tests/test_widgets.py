"""What panels are made of: figures in place of widgets, pictures that are kept, and work in threads that can be ended."""

import functools
import io
import sys
import threading
import time

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from conftest import kept
from matplotlib.figure import Figure
from PIL import Image
from test_load_models import CPU, assert_same, dataset, settings

from pgdlib import edm
from pgdlib.lab import load
from pgdlib.lab.explorer import widgets

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
BOOK = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def is_live(monkeypatch):
    """As if a frontend ran widgets."""
    monkeypatch.setattr(widgets, "live", lambda: True)


@pytest.fixture
def is_read(monkeypatch):
    """As if nobody ran widgets."""
    monkeypatch.setattr(widgets, "live", lambda: False)


def eventually(holds, timeout=10):
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


# Figures in place of widgets


@pytest.mark.parametrize(
    "environment, argument, module, expected",
    [
        ({}, "", "", False),
        ({"JPY_SESSION_NAME": "a.ipynb"}, "", "", True),
        ({"VSCODE_PID": "1"}, "", "", True),
        ({}, "", "google.colab", True),
        ({"JPY_SESSION_NAME": "a.ipynb"}, "--HistoryManager.hist_file=:memory:", "", False),
    ],
)
def test_live_knows_who_started_the_kernel(monkeypatch, environment, argument, module, expected):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher", "-f", "kernel.json", *([argument] if argument else [])])
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    assert widgets.live() is expected


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


@pytest.mark.usefixtures("is_read")
def test_a_reader_gets_the_figure_alone(monkeypatch):
    bundle = shown(monkeypatch, ipywidgets.HTML())
    assert bundle.keys() == {"image/png", "text/plain"}
    assert Image.open(io.BytesIO(bundle["image/png"])).size == (110, 110)


@pytest.mark.usefixtures("is_live")
def test_a_frontend_gets_the_widget_too(monkeypatch):
    widget = ipywidgets.HTML()
    bundle = shown(monkeypatch, widget)
    assert bundle.keys() == {"image/png", "text/plain", BOOK} and bundle[BOOK]["model_id"] == widget.model_id


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
        eventually(lambda: read == ["quick"], 2)
    finally:
        go_on.set()
        thread.join()


@pytest.mark.usefixtures("is_read")
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
    eventually(lambda: len(drawn) == 3)
    assert drawn == ["a", "x", "y"] and all(t.daemon for t in threads) and threading.current_thread() not in threads
    eventually(lambda: not any(t.is_alive() for t in threads))
    pictures.draw_ahead(["x", "y"])
    assert pictures["y"] == "y" and drawn == ["a", "x", "y"]


@pytest.mark.usefixtures("is_live")
def test_what_is_asked_for_comes_before_what_is_drawn_ahead():
    pictures, drawn = album()
    pictures.draw_ahead(list(range(100_000)))
    assert pictures["asked for"] == "picture asked for" and len(drawn) < 100
    pictures.draw_ahead([])


@pytest.mark.parametrize("live", [False, True])
def test_slide_shows_the_figure_of_its_place(monkeypatch, live):
    monkeypatch.setattr(widgets, "live", lambda: live)
    figures = [Figure(figsize=(1 + i, 1), facecolor=c) for i, c in enumerate(("red", "green", "blue"))]
    drawn = []
    slider, image = widgets.slide("noise", ["a", "b", "c"], lambda i: drawn.append(i) or figures[i], start=1).children

    def is_of(i):
        return image.value == widgets.png(figures[i])

    assert slider.label == "b" and slider.description == "noise" and is_of(1)
    if live:
        eventually(lambda: sorted(drawn) == [0, 1, 2])
    slider.value = 2
    assert slider.label == "c" and is_of(2) and not is_of(1)
    slider.value = 0
    assert is_of(0) and sorted(drawn) == [0, 1, 2]


# Work


def is_at_rest(job):
    return {job.bar.layout.display, job.cancel.layout.display} == {"none"} and not job.busy


def test_a_job_works_in_a_thread_that_dies_with_the_kernel():
    job, seen, go_on = widgets.Job(), [], threading.Event()
    assert is_at_rest(job)

    def work(report):
        seen.append(threading.current_thread())
        report(0.5, "a < b")
        go_on.wait(10)
        return 7

    job.start("begins", work, lambda result: seen.extend([result, threading.current_thread()]))
    eventually(lambda: job.line.value == "a &lt; b")
    assert job.busy and job.bar.value == 0.5 and job.cancel.layout.display == job.bar.layout.display == ""
    assert not job.wait(0.05) and seen[0].daemon and seen[0] is not threading.current_thread()
    go_on.set()
    assert job.wait(10) and seen[1:] == [7, seen[0]] and is_at_rest(job) and job.line.value == ""


def test_wait_also_waits_for_what_follows():
    job, done = widgets.Job(), []

    def then(result):
        time.sleep(0.1)
        done.append(result)
        if result < 2:
            job.start("next", lambda report: result + 1, then)

    job.start("first", lambda report: 0, then)
    assert job.wait(10) and done == [0, 1, 2]


def test_only_one_job_at_a_time():
    """Whenever the second is asked for: even while the first is being set up."""
    job, ran, go_on = widgets.Job(), [], threading.Event()
    job.line.observe(lambda _: job.start("second", lambda report: ran.append(2), ran.append), "value")
    job.start("first", lambda report: go_on.wait(10) and ran.append(1), lambda result: job.line.unobserve_all())
    job.start("third", lambda report: ran.append(3), ran.append)
    go_on.set()
    assert job.wait(10) and ran == [1]


def test_cancel_ends_a_job_at_its_next_report():
    job, ended, done = widgets.Job(), [], []

    def work(report):
        for i in range(100_000):
            report(i / 100_000)
            done.append(i)
            if i == 2:
                job.cancel.click()

    job.start("work", work, ended.append, ended.append)
    assert job.wait(10) and done == [0, 1, 2] and isinstance(ended[0], widgets.Cancelled) and len(ended) == 1
    assert job.line.value == "cancelled" and is_at_rest(job)
    job.start("again", lambda report: report(0.1), ended.append)  # an old wish to cancel is forgotten
    assert job.wait(10) and ended[1:] == [None]


def test_a_job_that_fails_says_why_and_the_next_one_runs():
    job, ended = widgets.Job(), []
    job.start("divides", lambda report: 1 / 0, lambda _: ended.append("well"), ended.append)
    assert job.wait(10) and is_at_rest(job) and job.line.value == "ZeroDivisionError: division by zero"
    assert [type(e) for e in ended] == [ZeroDivisionError]
    job.start("raises", lambda report: {}["<b>"], ended.append)
    assert job.wait(10) and job.line.value == "KeyError: &#x27;&lt;b&gt;&#x27;" and len(ended) == 1
    job.start("works", lambda report: 3, ended.append)
    assert job.wait(10) and ended[1:] == [3] and job.line.value == ""


def test_what_follows_a_job_may_fail_too(monkeypatch):
    job, ended, told = widgets.Job(), [], []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_type))
    job.start("works", lambda report: 0, lambda result: 1 / result)
    assert job.wait(10) and job.line.value == "ZeroDivisionError: division by zero" and is_at_rest(job)
    assert told == [ZeroDivisionError]  # it stands in the log
    job.start("works", lambda report: 3, ended.append)
    assert job.wait(10) and ended == [3]


def test_the_bar_moves_in_few_steps_and_back():
    job, seen = widgets.Job(), []
    job.bar.observe(lambda change: seen.append(change["new"]), "value")
    job.start("counts", lambda report: [report(i / 5000) for i in range(5001)] and report(0.25), lambda _: None)
    assert job.wait(10) and len(seen) < 60 and seen[-2:] == [1.0, 0.25] and seen[:-1] == sorted(seen[:-1])


# Bars


def test_bars_count_as_those_of_tqdm():
    seen = []
    bar = widgets.bars(lambda share, text: seen.append((round(share, 3), text)))
    with bar(total=4, desc="collecting", unit="%", mininterval=2) as one:
        one.update(3)
        one.update(4 - one.n)
        assert one.n == 4
    assert seen == [(0, "collecting"), (0.75, "collecting"), (1, "collecting")]
    seen.clear()
    assert list(bar(["a", "b"], desc="sweep", mininterval=5)) == ["a", "b"] and list(bar([])) == []
    assert [share for share, _ in seen] == [0, 0.5, 0.5, 1]
    with bar(total=0, desc="nothing"):
        pass
    assert seen[-1] == (1, "nothing")


def train_in(job, runs, until, save_every=120.0):
    """Train a denoiser in the job, which is cancelled when the bar has come to `until`; the files that are left."""

    def work(report):
        def watching(share, text):
            assert text == "training the denoiser on toy"
            if share >= until:
                job.stop()
            report(share, text)

        train = functools.partial(edm.train, save_every=save_every)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(edm, "train", train)
            return load.load_denoiser(dataset(), settings(), CPU, widgets.bars(watching))[0]

    made = []
    job.start("training", work, made.append)
    assert job.wait(30)
    return made, kept(runs)


@pytest.mark.parametrize("save_every", [120.0, 0.0])
def test_a_cancelled_training_leaves_no_model_and_goes_on_later(runs, save_every):
    expected, _ = load.load_denoiser(dataset(), settings(), CPU)
    (runs / kept(runs)[0]).unlink()
    job = widgets.Job()
    made, files = train_in(job, runs, 0.75, save_every)
    assert not made and job.line.value == "cancelled"
    assert [name.split("/")[0] for name in files] == ["checkpoints"]
    (made,), (file,) = train_in(job, runs, 2.0)
    assert_same(made, expected)
    assert file.startswith("denoisers/")
