"""The player: a trajectory of the λ explorer, as the model imagined it beside what the simulator makes of it."""

import contextlib
import functools
import html
import io

import ipywidgets as w
import numpy as np
from PIL import Image

from pgdlib import dynamics
from pgdlib.lab.explorer import hand, views, widgets

FPS = 10  # frames a second; the hand's are 100 Hz, so ten times slower than life
PATIENCE = 0.3  # s that λ has to rest before the hand follows


class Player:
    """The trajectory that is picked in a `panel.Explorer`, in the hand, unguided and at its λ; `widget` is what to display.

    Frames are drawn when they are looked at, and before that in a thread. Where MuJoCo cannot render, the player says so. A
    panel has one player: another takes its place.
    """

    def __init__(self, panel):
        self.panel, self._quiet = panel, False  # quiet while traits are set from here
        self._album, self._side_by_side = widgets.Album(self._picture), functools.lru_cache(8)(_side_by_side)
        self._build()
        with panel.lock:
            panel.follow = self.follow
            self.follow()

    @property
    def number(self):
        """Which trajectory is shown: the picked one, or, where there is none, one of median dynamics error at its λ."""
        with self.panel.lock:
            here, picked = self.panel.view.here, self.panel.picked
        if picked is not None and picked < len(here.x):  # there are fewer fresh ones
            return picked
        error = here.measures[self.panel.stops.lab.rulers[0]]
        return int(np.argsort(error)[np.isfinite(error).sum() // 2])

    def follow(self):
        """Show what the explorer stands at, once λ rests; the panel's lock is held."""
        if self.panel.stop is None:
            return
        (lam, fresh), x, guided = self.panel.stop, self.panel.view.here.x, self._guided.value
        unguided, here = ("λ = 0, other noise", f"λ = {lam:.3g} (fresh)") if fresh else ("λ = 0", f"λ = {lam:.3g}")
        self._quiet, number = True, self.number
        self._guided.options = [(unguided, False), (here, True)]
        self._guided.value = guided
        self._number.options = list(range(len(x)))
        self._number.value = number
        self._frame.max = self._play.max = x.shape[1] - 2  # the first step has no state: velocities are differences
        self._quiet = False
        self._draw_ahead(PATIENCE)

    def draw(self, _=None):
        """Show the frame that is chosen, unless another has been chosen meanwhile."""
        if (key := self._key()) is not None:
            picture = self._album[key]
            with self.panel.lock:
                if key == self._key():
                    self._image.value = picture

    def figure(self, moments=5):
        """Some frames, unguided and guided, or why there are none: what stands where the player cannot run."""
        rows = {}
        try:
            for guided in (False, True):
                lab, view = self._shown(guided)
                played = _replay(lab, view)
                picks = np.linspace(0, len(played.imagined) - 1, moments).round().astype(int)
                for name, qpos in (("imagined", played.imagined), ("simulated", played.simulated)):
                    rows[f"λ = {view.lam:.3g}\n{name}"] = hand.frames(lab.simulator, qpos[picks], played.start, (240, 200))
        except hand.CannotRender as reason:
            return views.message(str(reason))
        title = f"{view.sweep.label}, {view.sweep.rule} rule: trajectory {view.picked}"
        title += f" ({hand.GREEN[lab.simulator.name]})" if lab.simulator.name in hand.GREEN else ""
        return hand.strip(rows, picks * lab.simulator.dt, title)

    def save(self, path):
        """Write a GIF of the trajectory, unguided above and guided below; nothing where MuJoCo cannot render."""
        with contextlib.suppress(hand.CannotRender):
            hand.save_gif([_side_by_side(*self._shown(guided), (250, 210)) for guided in (False, True)], path, FPS)

    def _shown(self, guided):
        """(the study, the view of the shown trajectory at λ = 0 or where the explorer stands)"""
        with self.panel.lock:
            stops = self.panel.stops
            return stops.lab, stops.view(self.panel.stop if guided else (0.0, 0), stops.lab.rulers[0], self.number)

    def _key(self):
        """What names the chosen frame; None where there is none to choose, or while that is being changed."""
        with self.panel.lock:
            return None if self._quiet or self.panel.stop is None else (*self._shown(self._guided.value), self._frame.value)

    def _picture(self, key):
        lab, view, k = key
        buffer = io.BytesIO()
        try:
            Image.fromarray(self._side_by_side(lab, view)[k]).save(buffer, format="png", compress_level=1)
        except hand.CannotRender as reason:
            self._note.value = f"<pre>{html.escape(str(reason))}</pre>"
        return buffer.getvalue()

    def _draw_ahead(self, rest=0.0):
        """Draw all frames of what is chosen, from the one at the slider on."""
        if (key := self._key()) is not None:
            n = self._frame.max + 1
            self._album.draw_ahead([(*key[:2], (key[2] + k) % n) for k in range(n)], rest, self.draw)

    def _choose(self, _):
        self.draw()
        self._draw_ahead()

    def _pick(self, change):
        if not self._quiet:
            self.panel.pick(change["new"])

    def _build(self):
        self._number = w.Dropdown(description="trajectory", layout={"width": "150px"}, style={"description_width": "initial"})
        self._guided = w.ToggleButtons(options=[("λ = 0", False), ("guided", True)], value=True, style={"button_width": "auto"})
        self._play = w.Play(interval=1000 // FPS, max=1, show_repeat=True)
        self._frame = w.IntSlider(max=1, readout=False, layout=w.Layout(flex="1 1 200px"))
        self._image, self._note = widgets.picture("pgd-film", 670), w.HTML()
        w.jslink((self._play, "value"), (self._frame, "value"))
        for widget, react in ((self._number, self._pick), (self._guided, self._choose), (self._frame, self.draw)):
            widget.observe(react, "value")
        choice = w.HBox([self._number, self._guided], layout=widgets.ROW)
        controls = w.HBox([self._play, self._frame], layout=w.Layout(max_width="670px"))
        self.widget = w.VBox([choice, self._note, self._image, controls])
        self.widget.add_class("pgd-player")


def _replay(lab, view):
    """The `dynamics.Replay` of the trajectory that is picked in a view."""
    x, normaliser = view.here.x[view.picked], lab.normaliser
    return dynamics.replay(lab.simulator, normaliser.obs(x).cpu(), normaliser.actions(x).cpu(), lab.variance)


def _side_by_side(lab, view, size=(320, 270)):
    played = _replay(lab, view)
    title = f"{view.sweep.label}: λ = {view.lam:.3g}, no. {view.picked}"
    return hand.SideBySide(played, played.error, title, size)
