"""Interactive panels for notebooks. Beside each stands a figure, for readers whose notebook has no kernel.

What a panel draws is made by pure functions (`views`); here is only what reacts. Work that takes longer than a redraw runs in
a thread of its own, a `Job`: the kernel stays free, and the work can be cancelled.
"""

import functools
import html
import io
import os
import sys
import threading
import time

import ipywidgets as w
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import display
from tqdm import tqdm

PAD = w.Layout(margin="2px 0", width="100%")
ROW = w.Layout(flex_flow="row wrap", align_items="center")
DPI = 110


def live():
    """Whether this kernel may have a front end that runs widgets.

    papermill and nbconvert start kernels too, by nbclient, and nobody is there to move a slider. $PGD_WIDGETS (0 or 1) decides
    where this is wrong, as under Voilà, which also starts kernels by nbclient. ValueError if it is anything else.
    """
    if (asked := os.environ.get("PGD_WIDGETS", "")) not in ("", "0", "1"):
        raise ValueError(f"PGD_WIDGETS={asked!r} is not allowed; it must be 0, 1 or unset")
    by_nbclient = "--HistoryManager.hist_file=:memory:" in sys.argv  # from within JupyterLab too
    return asked == "1" if asked else hasattr(get_ipython(), "kernel") and not by_nbclient


def png(fig):
    """`fig` as the bytes of a PNG."""
    buffer = io.BytesIO()
    whole = fig.bbox_inches  # also where the user's own style would crop it: clicks are told in its pixels
    fig.savefig(buffer, format="png", dpi=DPI, facecolor="white", bbox_inches=whole, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def show(widget, figure):
    """Display `widget` where a front end may run it and, for every other reader, `figure`."""
    bundle = {"image/png": png(figure), "text/plain": "a figure"}
    plt.close(figure)  # or the notebook would show it a second time
    if live():
        bundle["application/vnd.jupyter.widget-view+json"] = widget.get_view_spec()
    display(bundle, raw=True)
    if live():
        _tell()


@functools.cache  # once will do
def _tell():
    print("If a picture stands above, without a slider, this front end runs no widgets; JupyterLab (`make lab`) does.")


def picture(name, width):
    """An empty image, `width` px wide or as wide as its place, that can be told by its class `name`."""
    # No margin, or one as wide as its place would stick out of it by as much.
    image = w.Image(format="png", layout=w.Layout(width=f"{width}px", max_width="100%", margin="0"))
    image.add_class(name)
    return image


class Album:
    """What `draw(key)` gives, kept; and drawn ahead of time, in a thread, so that a slider answers at once."""

    SIZE = 500

    def __init__(self, draw):
        self._draw, self._kept, self._ahead, self._lock = draw, {}, [], threading.RLock()

    def __getitem__(self, key):
        if (kept := self._kept.get(key)) is not None:  # at once, whatever is being drawn
            return kept
        with self._lock:  # one at a time
            if key not in self._kept:
                self._kept[key] = self._draw(key)
                while len(self._kept) > self.SIZE:
                    del self._kept[next(iter(self._kept))]
            return self._kept[key]

    def draw_ahead(self, keys, rest=0.0, then=lambda: None):
        """Draw `keys`, a list, in a thread, and no more of those that were to be drawn ahead before.

        It begins after `rest` s, if no others have come by then; `then()` is called after the first.
        """
        if self._ahead != keys and live():
            self._ahead = keys
            threading.Thread(target=self._draw_all, args=(keys, rest, then), daemon=True).start()

    def _draw_all(self, keys, rest, then):
        time.sleep(rest)
        for key in keys:
            with self._lock:
                if self._ahead is not keys:
                    return
                self[key]
            if key is keys[0]:
                then()
            time.sleep(0.001)  # or this thread would take the lock again before those who wait for it


def slide(name, options, render, start=0, width=900):
    """A slider over `options`, texts, above the figure that `render(i)` draws for the one at place i."""
    layout = w.Layout(width="100%", max_width=f"{width}px", margin="0")
    how = dict(value=start, description=name, layout=layout, style={"description_width": "initial"})
    slider = w.SelectionSlider(options=list(zip(options, range(len(options)))), **how)
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
        self.cancel.on_click(lambda _: self._stopped.set())
        self.view = w.HBox([self.line, self.bar, self.cancel], layout=ROW)
        self.view.add_class("pgd-job")
        self.thread, self._stopped, self._lock = None, threading.Event(), threading.Lock()
        self._tell("", "none")

    @property
    def busy(self):
        """Whether it is at work."""
        return self.thread is not None and self.thread.is_alive()

    def start(self, text, work):
        """Run `work(report)` in a thread, and leave the text that it returns; nothing if busy.

        `report(share, text)` moves the bar, from 0 to 1, and raises Cancelled if the user asked for an end.
        """
        with self._lock:
            if not self.busy:
                self._stopped.clear()
                self.thread = threading.Thread(target=self._run, args=(text, work), daemon=True)  # dies with the kernel
                self.thread.start()

    def _run(self, text, work):
        self.bar.value = 0.0
        self._tell(text, "")
        try:
            text = work(self._report)
        except Cancelled:
            text = "cancelled"
        except Exception as e:  # a thread has no cell to show it in
            text = f"{type(e).__name__}: {e}"
        self._tell(text, "none")

    def _report(self, share, text=None):
        if self._stopped.is_set():
            raise Cancelled
        if share - self.bar.value > 0.02 or share < self.bar.value or share == 1.0:  # few messages
            self.bar.value = share
        if text is not None:
            self.line.value = html.escape(text)

    def _tell(self, text, display):
        self.line.value = html.escape(text)
        self.bar.layout.display = self.cancel.layout.display = display


def bars(report):
    """A maker of bars as tqdm's, for what is made in a `Job`, which move the bar of that job instead."""

    class Bar(tqdm):
        monitor_interval = 0  # no thread of its own

        def __init__(self, *given, **how):
            super().__init__(*given, **how | dict(mininterval=0, miniters=1, file=io.StringIO(), disable=False))

        def refresh(self, *_, **__):
            report(self.n / self.total if self.total else 1.0, self.desc.removesuffix(": "))

    return Bar
