"""The λ explorer: slide λ and see what guidance does to the cloud of trajectories, to the means, and to their numbers."""

import html
import threading
import time

import ipyevents
import ipywidgets as w
import numpy as np

from pgdlib import guidance
from pgdlib.lab import settings
from pgdlib.lab.explorer import plots_explorer, shelf, widgets

STYLE = """<style>.pgd-numbers table {border-collapse: collapse} .pgd-numbers td, .pgd-numbers th
{padding: 0 8px; line-height: 1.4; text-align: right; color: var(--jp-ui-font-color1, inherit)}</style>"""


class Explorer:
    """One panel over the sweeps of a `study.Study` that are kept in runs/; arguments are those of `shelf.Shelf`.

    `widget` is what to display. `listeners` are called, without arguments, whenever another view has been drawn. Callbacks and
    jobs come from several threads: `lock` is held while what is chosen changes, and to read more than one thing of it.
    """

    def __init__(self, lab, sweeps=None, calibrated=None):
        self.shelf, self.picked, self.listeners = shelf.Shelf(lab, sweeps, calibrated), None, []
        self.lock, self._album = threading.RLock(), widgets.Album(self._draw)
        self._build()
        self.choose()

    @property
    def stop(self):
        """The chosen stop of the shelf; None where there is no sweep."""
        with self.lock:
            return self.shelf.stops[self._slider.value] if self.shelf.stops else None

    @property
    def view(self):
        """The `plots_explorer.View` of what is chosen, where there is a sweep."""
        with self.lock:
            return self.shelf.view(self.stop, self._estimator.value, self.picked)

    def choose(self, _=None):
        """Show the chosen dataset and rule, if their sweep is in runs/; say what is missing, and offer it, if not."""
        with self.lock:
            self._album.draw_ahead([])
            self.picked = None
            if self._dataset.value != self.shelf.dataset:
                self._message.value = f"opening {self._dataset.value} ..."  # that takes a few seconds
            with self._album.lock:  # what is drawn belongs to what is chosen
                text, button = self.shelf.choose(self._dataset.value, self._rule.value)
            self._message.value = f"<b>{html.escape(text)}</b>" if text else ""
            self._compute.description = button
            self._compute.layout.display = "" if button else "none"
            self._restock(self.shelf.first if self.shelf.stops else None)

    def compute(self, _=None):
        """Make what the chosen sweep lacks, in a thread; cancelled or killed, it goes on there the next time."""
        chosen = self.shelf.dataset, self.shelf.rule

        def work(report):
            self.shelf.compute(*chosen, widgets.bars(report), report)

        def ended(_):  # well or not: some of it may be there now
            if chosen == (self.shelf.dataset, self.shelf.rule):
                self.choose()

        self._job.start("starting", work, ended, ended)

    def sample(self, _=None):
        """Draw fresh trajectories at the λ of the text box, in a thread; the slider gets a stop there."""
        lam, begun = self._number.value, time.monotonic()
        if not np.isfinite(lam) or lam < 0:
            self._job.line.value = html.escape(f"λ = {lam} is not allowed; it must be a number of at least 0")
            return
        if self.stop is None:  # no sweep to put it beside
            return
        lab, rule = self.shelf.lab, self.shelf.rule
        n = min(shelf.FRESH, lab.p.samples)

        def then(keep):
            with self.lock:
                with self._album.lock:
                    stop = keep()
                if stop is not None:
                    self.picked = None
                    self._restock(stop)
            self._job.line.value = f"{n} fresh trajectories at λ = {lam:.3g} in {time.monotonic() - begun:.1f} s"

        self._job.start(f"sampling at λ = {lam:.3g}", lambda report: self.shelf.sample(lab, rule, lam, n, report), then)

    def pick(self, number):
        """Pick a trajectory of the cloud by its number, or none."""
        with self.lock:
            self.picked = number
            self.redraw()

    def redraw(self, _=None):
        """Draw what is chosen."""
        with self.lock:
            if self.stop is None:
                return
            self._cloud.value, self._curve.value, self._numbers.value = self._album[self._key(self.stop)]
            self._number.value = self.stop[0]
            for listener in self.listeners:
                listener()
            self._album.draw_ahead([self._key(stop) for stop in self.shelf.stops])

    def _key(self, stop):
        """What names the pictures of a stop."""
        shelf = self.shelf
        return shelf.dataset, shelf.rule, tuple(shelf.points), stop, self._estimator.value, self.picked

    def _draw(self, key):
        """(both pictures as PNG, the numbers as HTML)"""
        view = self.shelf.view(*key[-3:])
        cloud, curve = plots_explorer.cloud(view), plots_explorer.curve(view, frame=self.shelf.frame)
        return widgets.png(cloud), widgets.png(curve), STYLE + plots_explorer.numbers(view).to_html(border=0)

    def _restock(self, stop):
        """Show a slider over the stops of the shelf, at `stop`.

        Each time a new one: in one that gets fewer options, a browser moves the handle, and the kernel would believe it.
        """
        stops = self.shelf.stops
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
        self._marks.value = self._ticks()
        self.redraw()

    def _ticks(self):
        """Marks under the slider, at the calibrated λ and at the predicted limit."""
        lams, spans = [lam for lam, _ in self.shelf.stops], []
        for name, lam in (("calibrated", self.shelf.calibrated), ("limit", self.shelf.limit)):
            if lam is not None and len(lams) > 1 and lams[0] <= lam <= lams[-1]:
                place = 100 * np.interp(lam, lams, np.arange(len(lams))) / (len(lams) - 1)
                # What is far to the right is written to the left of its mark, or it would stick out.
                at, text = (f"right:{100 - place:.1f}%", f"{name} {lam:.3g} ▲") if place > 70 else (f"left:{place:.1f}%", "")
                style = f"position:absolute;{at};white-space:nowrap;margin:0 -5px"
                spans.append(f'<span style="{style}">{text or f"▲ {name} {lam:.3g}"}</span>')
        style = "position:relative;height:16px;margin:-6px 2% 0 0;font-size:11px;line-height:16px"
        return f'<div style="{style}">{"".join(spans)}</div>'

    def _clicked(self, event):
        """A click on the cloud, in the pixels of the picture itself: pick the nearest trajectory."""
        with self.lock:
            if self.stop is None:
                return
            with self._album.lock:
                fig = plots_explorer.cloud(self.view)  # anew, for figures are too large to be kept
            scale = fig.dpi / widgets.DPI
            found = plots_explorer.nearest(self.view, fig, event["dataX"] * scale, event["dataY"] * scale)
            if found is not None:
                self.pick(found)

    def _build(self):
        chooser = dict(style={"description_width": "initial"}, layout=w.Layout(width="auto"))
        self._dataset = w.Dropdown(options=settings.DATASETS, description="dataset", value=self.shelf.dataset, **chooser)
        self._rule = w.Dropdown(options=guidance.RULES, description="rule", **chooser)
        self._estimator = w.Dropdown(options=plots_explorer.ESTIMATORS, description="error", **chooser)
        self._slider, self._slot = w.SelectionSlider(options=["–"]), w.VBox()  # until there are stops
        self._marks, self._message, self._numbers = (w.HTML(layout=widgets.PAD) for _ in range(3))
        self._compute = w.Button(button_style="info", layout=w.Layout(width="150px"))
        self._cloud, self._curve = (widgets.picture(f"pgd-{name}", 500) for name in ("cloud", "curve"))
        self._number = w.FloatText(
            description="λ", step=0.01, style={"description_width": "20px"}, layout=w.Layout(width="120px")
        )
        self._now = w.Button(description="Sample now", icon="play", layout=w.Layout(width="120px"))
        self._job = widgets.Job()
        for widget, name in ((self._numbers, "pgd-numbers"), (self._now, "pgd-sample")):
            widget.add_class(name)
        for widget in (self._dataset, self._rule):
            widget.observe(self.choose, "value")
        self._estimator.observe(self.redraw, "value")
        self._compute.on_click(self.compute)
        self._now.on_click(self.sample)
        self._clicks = ipyevents.Event(source=self._cloud, watched_events=["click"])
        self._clicks.on_dom_event(self._clicked)
        row = w.Layout(flex_flow="row wrap", align_items="center")
        for image in (self._cloud, self._curve):
            image.layout.flex = "0 1 49%"  # side by side, if at least 330 px remain for each
            image.layout.min_width = "330px"
        pictures = w.HBox([self._cloud, self._curve], layout=w.Layout(flex_flow="row wrap"))
        self._box = w.VBox([self._slot, self._marks, pictures, self._numbers])
        choosers = w.HBox([self._dataset, self._rule, self._estimator], layout=row)
        offer = w.HBox([self._message, self._compute], layout=row)
        sample = w.HBox([self._number, self._now, self._job.view], layout=row)
        self.widget = w.VBox([choosers, offer, self._box, sample])
        self.widget.add_class("pgd-explorer")
