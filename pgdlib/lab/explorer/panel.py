"""The λ explorer: slide λ and see what guidance does to the cloud of trajectories, to the means, and to their numbers."""

import html
import threading
import time

import ipyevents
import ipywidgets as w
import numpy as np

from pgdlib import guidance
from pgdlib.lab import tasks
from pgdlib.lab.explorer import views, widgets
from pgdlib.lab.explorer.stops import Stops

STYLE = """<style>.pgd-numbers table {border-collapse: collapse} .pgd-numbers td, .pgd-numbers th
{padding: 0 8px; line-height: 1.4; text-align: right; color: var(--jp-ui-font-color1, inherit)}</style>"""


class Explorer:
    """One panel over the sweeps of a `study.Study` that are kept in runs/; arguments are those of `stops.Stops`.

    `widget` is what to display. `follow` is called, without arguments, whenever another view is shown. Callbacks and jobs come
    from several threads: `lock` is held while what is chosen changes, and to read more than one thing of it.
    """

    def __init__(self, lab, lams=None, calibrated=None):
        self.stops, self.picked, self.follow = Stops(lab, lams, calibrated), None, lambda: None
        self.lock, self._album = threading.RLock(), widgets.Album(_draw)
        self._build()
        self.choose()

    @property
    def stop(self):
        """The chosen stop; None where there is no sweep."""
        with self.lock:
            return self.stops.all[self._slider.value] if self.stops.sweep else None

    @property
    def view(self):
        """The `views.View` of what is chosen, where there is a sweep."""
        with self.lock:
            return self.stops.view(self.stop, self._estimator.value, self.picked)

    def choose(self, _=None):
        """Show the chosen dataset and rule, if their sweep is in runs/; say what is missing, and offer it, if not."""
        with self.lock:
            if self._dataset.value != self.stops.dataset:
                self._message.value = f"opening {self._dataset.value} ..."  # that takes a few seconds
            text, self._compute.description = self.stops.choose(self._dataset.value, self._rule.value)
            self._message.value = f"<b>{html.escape(text)}</b>" if text else ""
            self._compute.layout.display = "" if text else "none"
            self._go_to(self.stops.first)

    def compute(self, _=None):
        """Make what the chosen sweep lacks, in a thread; cancelled or killed, it goes on there the next time."""
        chosen = self.stops.dataset, self.stops.rule

        def work(report):
            try:
                self.stops.compute(*chosen, report)
            finally:  # some of it may be there now
                if chosen == (self.stops.dataset, self.stops.rule):
                    self.choose()
            return ""

        self._job.start("starting", work)

    def sample(self, _=None):
        """Draw fresh trajectories at the λ of the text box, in a thread; the slider gets a stop there."""
        lam, lab, rule, begun = self._number.value, self.stops.lab, self.stops.rule, time.monotonic()

        def work(report):
            stop, n = self.stops.sample(lab, rule, lam, report)
            with self.lock:
                if stop in self.stops.all:  # not where another dataset or rule has been chosen by now
                    self._go_to(stop)
            return f"{n} fresh trajectories at λ = {lam:.3g} in {time.monotonic() - begun:.1f} s"

        if not np.isfinite(lam) or lam < 0:
            self._job.line.value = html.escape(f"λ = {lam} is not allowed; it must be a number of at least 0")
        elif self.stop is not None:  # or there is no sweep to put it beside
            self._job.start(f"sampling at λ = {lam:.3g}", work)

    def pick(self, number):
        """Pick a trajectory of the cloud by its number, or none."""
        with self.lock:
            self.picked = number
            self.redraw()

    def redraw(self, _=None):
        """Draw what is chosen."""
        with self.lock:
            if self.stop is not None:
                self._cloud.value, self._curve.value, self._numbers.value = self._album[self.view]
                self._number.value = self.stop[0]
                self.follow()
            ahead = [self.stops.view(stop, self._estimator.value, self.picked) for stop in self.stops.all]
            self._album.draw_ahead(ahead)

    def _go_to(self, stop):
        """Show a slider over all stops, at `stop`; nothing is picked.

        Each time a new one: in one that gets fewer options, a browser moves the handle, and the kernel would believe it.
        """
        stops, self.picked = self.stops.all, None
        labels = [f"{lam:.3g}{' (fresh)' if drawn else ''}" for lam, drawn in stops] or ["–"]
        options, place = list(zip(labels, range(len(labels)))), stops.index(stop) if stops else 0
        self._slider.unobserve_all()
        self._slider.close()
        self._slider = w.SelectionSlider(options=options, value=place, layout=w.Layout(width="98%"), readout=False)
        self._slider.add_class("pgd-lam")
        self._slider.observe(self.redraw, "value")
        self._slot.children = [self._slider]
        for widget in (self._slider, self._number, self._now):
            widget.disabled = not stops
        self._box.layout.display = "" if stops else "none"
        self._marks.value = _marks(self.stops.sweep, [lam for lam, _ in stops])
        self.redraw()

    def _clicked(self, event):
        """A click on the cloud, in the pixels of the picture itself: pick the nearest trajectory."""
        with self.lock:
            if self.stop is not None:
                found = views.nearest(self.view, event["dataX"], event["dataY"], widgets.DPI)
                if found is not None:
                    self.pick(found)

    def _build(self):
        rulers = {name: key for name, key in views.ESTIMATORS.items() if key in self.stops.lab.rulers}
        chooser = dict(style={"description_width": "initial"}, layout=w.Layout(width="auto"))
        self._dataset = w.Dropdown(options=tasks.siblings(self.stops.dataset), description="dataset", **chooser)
        self._dataset.value = self.stops.dataset
        self._rule = w.Dropdown(options=guidance.RULES, description="rule", **chooser)
        self._estimator = w.Dropdown(options=rulers, description="error", **chooser)
        self._slider, self._slot = w.SelectionSlider(options=["–"]), w.VBox()  # until there are stops
        self._marks, self._message, self._numbers = (w.HTML(layout=widgets.PAD) for _ in range(3))
        self._compute = w.Button(button_style="info", layout=w.Layout(width="150px"))
        self._cloud, self._curve = (widgets.picture(f"pgd-{name}", 500) for name in ("cloud", "curve"))
        self._number = w.FloatText(description="λ", step=0.01, style={"description_width": "20px"}, layout={"width": "120px"})
        self._now = w.Button(description="Sample now", icon="play", layout={"width": "120px"})
        self._job, self._clicks = widgets.Job(), ipyevents.Event(source=self._cloud, watched_events=["click"])
        for widget, react in ((self._dataset, self.choose), (self._rule, self.choose), (self._estimator, self.redraw)):
            widget.observe(react, "value")
        for source, react in ((self._compute.on_click, self.compute), (self._now.on_click, self.sample)):
            source(react)
        self._clicks.on_dom_event(self._clicked)
        for image in (self._cloud, self._curve):
            image.layout.flex = "0 1 49%"  # side by side, if at least 330 px remain for each
            image.layout.min_width = "330px"
        pictures = w.HBox([self._cloud, self._curve], layout=w.Layout(flex_flow="row wrap"))
        self._box = w.VBox([self._slot, self._marks, pictures, self._numbers])
        choosers = w.HBox([self._dataset, self._rule, self._estimator], layout=widgets.ROW)
        offer = w.HBox([self._message, self._compute], layout=widgets.ROW)
        sample = w.HBox([self._number, self._now, self._job.view], layout=widgets.ROW)
        self.widget = w.VBox([choosers, offer, self._box, sample])
        for widget, name in ((self._numbers, "numbers"), (self._now, "sample"), (self.widget, "explorer")):
            widget.add_class(f"pgd-{name}")


def _draw(view):
    """(both pictures as PNG, the numbers as HTML)"""
    return widgets.png(views.cloud(view)), widgets.png(views.curve(view)), STYLE + views.numbers(view).to_html(border=0)


def _marks(sweep, lams):
    """Marks under a slider over `lams`, at the calibrated λ and at the predicted limit."""
    spans = []
    marked = {"calibrated": sweep.calibrated, "limit": sweep.limit} if len(lams) > 1 else {}
    for name, lam in marked.items():
        if lam is not None and lams[0] <= lam <= lams[-1]:
            place = 100 * np.interp(lam, lams, np.arange(len(lams))) / (len(lams) - 1)
            # What is far to the right is written to the left of its mark, or it would stick out.
            at, text = (f"right:{100 - place:.1f}%", f"{name} {lam:.3g} ▲") if place > 70 else (f"left:{place:.1f}%", "")
            style = f"position:absolute;{at};white-space:nowrap;margin:0 -5px"
            spans.append(f'<span style="{style}">{text or f"▲ {name} {lam:.3g}"}</span>')
    style = "position:relative;height:16px;margin:-6px 2% 0 0;font-size:11px;line-height:16px"
    return f'<div style="{style}">{"".join(spans)}</div>'
