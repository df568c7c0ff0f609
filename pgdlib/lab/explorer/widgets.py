"""Interactive panels for notebooks. Where no frontend runs them, each leaves a figure in its place.

What a panel draws is made by pure functions (`plots_explorer`); here is only what reacts. Work that takes longer than a
redraw runs in a thread of its own, a `Job`: the kernel stays free, and the work can be cancelled.
"""

import html
import io
import math
import os
import sys
import threading
import time

import ipywidgets as w
import matplotlib.pyplot as plt
from IPython.display import display

PAD = w.Layout(margin="2px 0", width="100%")
DPI = 110


def live():
    """Whether a frontend that runs widgets has started this kernel: JupyterLab, Notebook, VS Code or Colab.

    papermill and nbconvert start kernels too, and nobody is there to move a slider.
    """
    if "--HistoryManager.hist_file=:memory:" in sys.argv:  # so nbclient starts kernels, from within JupyterLab too
        return False
    return bool({"JPY_SESSION_NAME", "VSCODE_PID"} & set(os.environ)) or "google.colab" in sys.modules


def png(fig, dpi=DPI):
    """`fig` as the bytes of a PNG."""
    buffer = io.BytesIO()
    whole = fig.bbox_inches  # also where the user's own style would crop it: clicks are told in its pixels
    fig.savefig(buffer, format="png", dpi=dpi, facecolor="white", bbox_inches=whole, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def show(widget, figure):
    """Display `widget` and, for every reader who cannot run it, `figure`."""
    bundle = {"image/png": png(figure), "text/plain": "a figure"}
    plt.close(figure)  # or the notebook would show it a second time
    if live():
        bundle["application/vnd.jupyter.widget-view+json"] = widget.get_view_spec()
    display(bundle, raw=True)


def picture(name, width):
    """An empty image, `width` px wide or as wide as its place, that can be told by its class `name`."""
    # No margin, or one as wide as its place would stick out of it by as much.
    image = w.Image(format="png", layout=w.Layout(width=f"{width}px", max_width="100%", margin="0"))
    image.add_class(name)
    return image


class Album:
    """What `draw(key)` gives, kept; and drawn ahead of time, in a thread, so that a slider answers at once."""

    SIZE = 200

    def __init__(self, draw):
        self._draw, self._kept, self._ahead = draw, {}, []
        self.lock = threading.RLock()  # figures are drawn one at a time

    def __getitem__(self, key):
        if (kept := self._kept.get(key)) is not None:  # at once, whatever is being drawn
            return kept
        with self.lock:
            if key not in self._kept:
                self._kept[key] = self._draw(key)
                while len(self._kept) > self.SIZE:
                    del self._kept[next(iter(self._kept))]
            return self._kept[key]

    def draw_ahead(self, keys):
        """Draw `keys`, a list, in a thread, and no more of those that were to be drawn ahead before."""
        if self._ahead == keys or not live():
            return
        self._ahead = keys
        if keys:
            threading.Thread(target=self._draw_all, args=(keys,), daemon=True).start()

    def _draw_all(self, keys):
        for key in keys:
            with self.lock:
                if self._ahead is not keys:
                    return
                self[key]
            time.sleep(0.001)  # or this thread would take the lock again before those who wait for it


def slide(name, options, render, start=0, width=900):
    """A slider over `options`, texts, above the figure that `render(i)` draws for the one at place i."""
    slider = w.SelectionSlider(
        options=list(zip(options, range(len(options)))),
        value=start,
        description=name,
        layout=w.Layout(width="100%", max_width=f"{width}px", margin="0"),
        style={"description_width": "initial"},
    )
    slider.add_class("pgd-slider")
    image, album = picture("pgd-picture", width), Album(lambda i: png(render(i)))

    def move(_=None):
        image.value = album[slider.value]
        album.draw_ahead(list(range(len(options))))

    slider.observe(move, "value")
    move()
    return w.VBox([slider, image])


class Cancelled(Exception):
    """The user asked a `Job` to end."""


class Job:
    """Work in a thread, one at a time, with a bar, a line of text, and a button that ends it."""

    def __init__(self):
        self.bar = w.FloatProgress(min=0.0, max=1.0, layout=w.Layout(width="180px"))
        self.line = w.HTML(layout=w.Layout(margin="0 8px"))
        self.cancel = w.Button(description="Cancel", icon="stop", layout=w.Layout(width="90px"))
        self.cancel.on_click(lambda _: self.stop())
        self.view = w.HBox([self.line, self.bar, self.cancel], layout=w.Layout(flex_flow="row wrap", align_items="center"))
        self.view.add_class("pgd-job")
        self.busy, self._stopped, self._thread, self._lock = False, threading.Event(), None, threading.Lock()
        self._rest()

    def start(self, text, work, then, failed=lambda error: None):
        """Run `work(report)` in a thread, then `then(result)` there, or `failed(error)`; nothing if busy.

        `report(share, text)` moves the bar, and raises Cancelled if the user asked for an end.
        """
        with self._lock:
            if self.busy:
                return
            self.busy = True
        self._stopped.clear()
        self.bar.value, self.line.value = 0.0, html.escape(text)
        self.bar.layout.display = self.cancel.layout.display = ""
        with self._lock:
            self._thread = threading.Thread(target=self._run, args=(work, then, failed), daemon=True)  # dies with the kernel
            self._thread.start()

    def report(self, share, text=None):
        """Move the bar to `share` (0 to 1); raises Cancelled if the user asked for an end."""
        if self._stopped.is_set():
            raise Cancelled
        if share - self.bar.value > 0.02 or share < self.bar.value or share == 1.0:  # few messages
            self.bar.value = share
        if text is not None:
            self.line.value = html.escape(text)

    def stop(self):
        """Ask the work to end; it does so at its next report."""
        self._stopped.set()

    def wait(self, timeout=None):
        """Until the work and what follows it have ended, `timeout` s at most; whether they have."""
        ends = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:  # what follows may be starting another
                if self._thread is None or not self._thread.is_alive():
                    return True
            if time.monotonic() > ends:
                return False
            time.sleep(0.01)

    def _run(self, work, then, failed):
        try:
            result = work(self.report)
        except Exception as e:  # a thread has no cell to show it in
            self._rest("cancelled" if isinstance(e, Cancelled) else f"{type(e).__name__}: {e}")
            then, result = failed, e
        else:
            self._rest()
        self.busy = False  # what follows may start the next
        try:
            then(result)
        except Exception as e:
            self.line.value = html.escape(f"{type(e).__name__}: {e}")
            raise  # into the log

    def _rest(self, text=""):
        self.bar.layout.display = self.cancel.layout.display = "none"
        self.line.value = html.escape(text)


def bars(report):
    """A maker of bars as tqdm's, for `load` and `study`, which move the bar of a `Job` instead."""

    class Bar:
        def __init__(self, iterable=None, total=None, desc="", **_):
            self.iterable, self.total, self.desc, self.n = iterable, total, desc, 0

        def __iter__(self):
            self.total = len(self.iterable)
            for each in self.iterable:
                self.update(0)
                yield each
                self.update(1)

        def __enter__(self):
            self.update(0)
            return self

        def __exit__(self, *_):
            pass

        def update(self, n=1):
            self.n += n
            report(self.n / self.total if self.total else 1.0, self.desc)

    return Bar
