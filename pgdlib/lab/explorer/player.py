"""The player: a trajectory of the λ explorer in the hand, as the model imagined it beside what the simulator makes of it."""

import contextlib
import html
import io
import threading

import ipywidgets as w
import numpy as np
from PIL import Image

from pgdlib import data, dynamics
from pgdlib.lab import artifacts
from pgdlib.lab.explorer import film, plots_explorer, widgets
from pgdlib.simulators import pen as adroit

FPS = 10  # frames a second; they are 100 Hz, so ten times slower than life
KEPT = 20  # films in memory
PATIENCE = 0.4  # s that λ has to rest before a film is rendered


class Player:
    """A film of the trajectory that is picked in an `explorer.Explorer`, unguided and at its λ; `widget` is what to display.

    Films are rendered in a thread, kept, and saved as GIFs in runs/films/. Where MuJoCo cannot render, the player says so.
    A panel has one player: another takes its place.
    """

    def __init__(self, panel):
        self.panel, self._films, self._shown = panel, {}, []
        self._timer, self._lock = threading.Timer(PATIENCE, self.load), threading.RLock()  # taken before the panel's
        self._build()
        with panel.lock:
            others = [f for f in panel.listeners if not isinstance(getattr(f, "__self__", None), Player)]
            panel.listeners[:] = [*others, self.follow]  # the player of a cell that is run again renders no more
            self.follow()

    @property
    def number(self):
        """Which trajectory is shown: the picked one, or, where there is none, one of median dynamics error at its λ."""
        with self.panel.lock:
            here, picked = self.panel.view.here, self.panel.picked
        if picked is not None and picked < len(here.x):  # there are fewer fresh ones
            return picked
        error = here.measures["normalised"]
        return int(np.argsort(error)[np.isfinite(error).sum() // 2])

    def follow(self):
        """Show what the explorer stands at; a listener, so the panel's lock is held."""
        if self.panel.stop is None:
            return
        lam, fresh = self.panel.stop
        n, number, guided, self._quiet = len(self.panel.view.here.x), self.number, self._guided.value, True
        unguided, here = ("λ = 0, other noise", f"λ = {lam:.3g} (fresh)") if fresh else ("λ = 0", f"λ = {lam:.3g}")
        self._guided.options = [(unguided, False), (here, True)]
        self._guided.value = guided
        self._number.options = list(range(n))
        self._number.value, self._quiet = number, False
        if widgets.live():
            self._timer.cancel()  # as long as λ moves, nothing is rendered
            self._timer = threading.Timer(PATIENCE, self.load)
            self._timer.daemon = True
            self._timer.start()

    def load(self, _=None):
        """Show the film of the chosen trajectory; if it is not kept, render it in a thread, in place of any other."""
        with self._lock:  # the main thread, a timer and a job come here
            with self.panel.lock:
                if self.panel.stop is None:
                    return
                key, path, render = self._choice(self._guided.value)
            if key in self._films:
                return self._show(self._films[key])
            if self._job.busy:
                if key != self._rendering:
                    self._again = True  # when the other has ended
                    self._job.stop()
                return

            def work(report):
                frames = render(report)
                film.save_gif(frames, path, FPS)
                return [_png(frame) for frame in frames]

            def then(frames):
                with self._lock:
                    self._films[key] = frames
                    while len(self._films) > KEPT:
                        del self._films[next(iter(self._films))]
                    self.load()  # perhaps another one is wanted by now

            self._rendering, self._again = key, False
            self._job.start("rendering", work, then, self._ended)

    def figure(self, moments=5):
        """Some frames, unguided and guided, or why there are none: what stands where the player cannot run."""
        rows = {}
        try:
            for guided in (False, True):
                (_, _, (lam, _), _), played = self._replay(guided)
                picks = np.linspace(0, len(played.imagined) - 1, moments).round().astype(int)
                for name, qpos in (("imagined", played.imagined), ("simulated", played.simulated)):
                    rows[f"λ = {lam:.3g}\n{name}"] = film.frames(qpos[picks], played.target_axis, (240, 200))
        except film.CannotRender as reason:
            return plots_explorer.message(str(reason))
        view = self.panel.view
        title = f"{view.label}, {view.rule} rule: trajectory {self.number} (green: where the pen should be)"
        return film.strip(rows, picks * adroit.CONTROL_DT, title)

    def save(self, path):
        """Write a GIF of both films, unguided above and guided below; nothing where MuJoCo cannot render."""
        with contextlib.suppress(film.CannotRender):
            films = [self._choice(guided)[2](size=(250, 210)) for guided in (False, True)]
            film.save_gif(film.stack(films), path, FPS)

    def _replay(self, guided):
        """(what names the shown trajectory: dataset, rule, stop and number; its replay)"""
        with self.panel.lock:
            shelf, view, number = self.panel.shelf, self.panel.view, self.number
            key = shelf.dataset, shelf.rule, self.panel.stop if guided else (0.0, 0), number
            x, normaliser = (view.here if guided else view.points[0.0]).x[number], shelf.lab.normaliser
        steps = normaliser.denormalise(x).cpu().numpy()
        return key, dynamics.replay(steps[:, data.OBS], steps[:, data.ACTIONS])

    def _choice(self, guided):
        """(what names a film, where its GIF belongs, a function of `report` that renders it)"""
        lab, (key, played) = self.panel.shelf.lab, self._replay(guided)
        _, rule, (lam, fresh), number = key
        name = f"{lam:.3g}{f'-fresh-{fresh}' if fresh else ''}"
        title = f"{lab.dataset.label}: λ = {lam:.3g}, no. {number}"
        path = artifacts.root() / "films" / f"{lab.dataset.slug}-{lab.p.scale}-{rule}-{name}-{number}.gif"

        def render(report=lambda share: None, size=(320, 270)):
            total, errors = 2 * len(played.imagined), played.normalised(lab.variance)
            return film.side_by_side(played, errors, title, size, lambda done: report(done / total))

        return key, path, render

    def _show(self, frames):
        self._shown = frames
        self._frame.max = self._play.max = len(frames) - 1
        self._draw()

    def _draw(self, _=None):
        if self._shown:
            self._image.value = self._shown[min(self._frame.value, len(self._shown) - 1)]

    def _ended(self, error):
        """After a film that was not finished: the wanted one next, or why there is none."""
        with self._lock:
            again, self._again = self._again, False
        if again:
            self.load()
        elif isinstance(error, film.CannotRender):
            self._job.line.value = ""
            self._note.value = f"<pre>{html.escape(str(error))}</pre>"

    def _chosen(self, _):
        if not self._quiet:
            self.load()

    def _numbered(self, change):
        if not self._quiet:
            self.panel.pick(change["new"])

    def _build(self):
        self._quiet = self._again = False  # whether traits are set from here; whether a film is given up for another
        self._rendering = None
        narrow = dict(style={"description_width": "initial"})
        self._number = w.Dropdown(description="trajectory", layout=w.Layout(width="150px"), **narrow)
        self._guided = w.ToggleButtons(options=[("λ = 0", False), ("guided", True)], value=True, style={"button_width": "auto"})
        self._play = w.Play(interval=1000 // FPS, max=1, show_repeat=True)
        self._frame = w.IntSlider(max=1, readout=False, layout=w.Layout(flex="1 1 200px"))
        self._image, self._note, self._job = widgets.picture("pgd-film", 670), w.HTML(), widgets.Job()
        w.jslink((self._play, "value"), (self._frame, "value"))
        self._number.observe(self._numbered, "value")
        self._guided.observe(self._chosen, "value")
        self._frame.observe(self._draw, "value")
        row = w.Layout(flex_flow="row wrap", align_items="center")
        choice = w.HBox([self._number, self._guided, self._job.view], layout=row)
        controls = w.HBox([self._play, self._frame], layout=w.Layout(max_width="670px"))
        self.widget = w.VBox([choice, self._note, self._image, controls])
        self.widget.add_class("pgd-player")


def _png(frame):
    """A frame [H, W, 3] as the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()
