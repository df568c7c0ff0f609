"""The sweeps over λ that the explorer can show: those in runs/, of one study and of its siblings on other datasets."""

import contextlib
from types import SimpleNamespace

from pgdlib.lab import minari_files, study
from pgdlib.lab.explorer import plots_explorer

FRESH = 64  # trajectories, at most, that are drawn at any λ while somebody waits


class NotMade(Exception):
    """What is asked for has to be made first, and that takes long."""


def refuse(*_, desc="", **__):
    """A maker of bars, as tqdm, that lets nothing long begin."""
    raise NotMade(f"{desc} comes first, then the sweep")


class Shelf:
    """What is known of one dataset and rule at a time, those of the last `choose`.

    sweeps: rule -> the λ of its sweep, where not `study.GRIDS`; calibrated: rule -> λ; both of the study `lab` alone. A *stop*
    is a place of the slider: (λ, 0) of the sweep, or (λ, n) of the n-th drawing of fresh trajectories.
    """

    def __init__(self, lab, sweeps=None, calibrated=None):
        self.lab, self._first = lab, lab
        self._sweeps, self._calibrated = dict(sweeps or {}), dict(calibrated or {})
        self._labs, self._fresh, self._drawn = {lab.p.dataset: lab}, {}, 0
        self._making = set()  # the datasets whose data and denoiser are being made, in a thread
        self.dataset, self.rule, self.points, self.stops, self.frame = lab.p.dataset, "explicit", {}, [], None

    def choose(self, dataset, rule):
        """Take what runs/ holds of the rule's sweep on `dataset`; (what to tell the user, what to offer), both "" if all."""
        self.dataset, self.rule, self.points, self.stops, self.frame = dataset, rule, {}, [], None
        try:
            self.lab = self._labs.get(dataset) or self.open(dataset, refuse)
        except (NotMade, ValueError, OSError) as e:
            return f"{dataset} is not ready yet: {str(e).rstrip('.')}.", "Compute"
        wanted, points = self._wanted(self.lab, rule), {}
        for lam in self.lab.status(rule, wanted)[0]:
            with contextlib.suppress(NotMade):  # a damaged one is set aside, so it is missing from now on
                points[lam] = self.lab.point(rule, lam, watch=refuse)
        have, missing, differs = self.lab.status(rule, wanted)
        if 0.0 in points:
            self.points, self.frame = points, study.summary(points)
            self.restock()
        if missing and have:
            return f"{len(have)} of {len(have) + len(missing)} λ of this sweep are computed.", "Compute the rest"
        if missing and differs:
            return f"The sweep in runs/ is stale: it was made with another {', '.join(sorted(differs))}.", "Compute it anew"
        if missing:
            return f"There is no sweep of the {rule} rule on {self.lab.dataset.label} yet.", "Compute it"
        return "", ""

    def open(self, dataset, progress):
        """The study of another dataset; its data and denoiser are made if missing, with bars from `progress`.

        With `refuse` for `progress` nothing is made: NotMade, ValueError or OSError says what would have to be.
        """
        source = "d4rl" if self._first.dataset.is_d4rl else "local"
        if progress is refuse:
            if dataset in self._making:  # whoever makes something locks it: one would wait for its end
                raise NotMade("its data and its denoiser are being made")
            if source == "d4rl":
                minari_files.find_d4rl(dataset, download=False)
        p = SimpleNamespace(**vars(self._first.p) | {"dataset": dataset, "source": source})
        self._labs[dataset] = study.Study.open(p, progress, say=lambda text: None)
        return self._labs[dataset]

    def compute(self, dataset, rule, progress, report):
        """Make what the rule's sweep on `dataset` lacks; each λ is kept as soon as it is done. `report(share, text)`."""
        self._making.add(dataset)
        try:
            lab = self._labs.get(dataset) or self.open(dataset, progress)
        finally:
            self._making.discard(dataset)
        missing = lab.status(rule, self._wanted(lab, rule))[1]
        for i, lam in enumerate(missing):
            text = f"λ = {lam:.3g}, {i + 1} of {len(missing)}"
            lab.point(rule, lam, lambda x, denoised, sigma, done, i=i, text=text: report((i + done) / len(missing), text))

    def sample(self, lab, rule, lam, n, report):
        """Draw n fresh trajectories of the study `lab` at any λ; a function that puts them on the shelf.

        That function gives their stop, or None where another dataset or rule has been chosen by then.
        """
        self._drawn += 1
        where, number, seed = (lab.p.dataset, rule), self._drawn, lab.p.seed + 1_000_000 + self._drawn
        x, diverged = lab.draw(rule, lam, n, seed, watch=lambda x, denoised, sigma, done: report(0.8 * done))
        report(0.8, "simulating")
        point = study.Point(x, *lab.judge(x, diverged))
        report(1.0)

        def keep():
            self._fresh.setdefault(where, {})[lam, number] = point
            self.restock()
            return (lam, number) if where == (self.dataset, self.rule) and self.points else None

        return keep

    def restock(self):
        """Make the list of stops anew; of each λ, the last that was drawn afresh."""
        fresh = dict(sorted(self._fresh.get((self.dataset, self.rule), {})))
        self.stops = sorted([*((lam, 0) for lam in self.points), *fresh.items()]) if self.points else []

    def point(self, stop):
        """The `study.Point` of a stop."""
        lam, number = stop
        return self._fresh[self.dataset, self.rule][stop] if number else self.points[lam]

    @property
    def limit(self):
        """The λ from which the rule must diverge, or None."""
        return self.lab.limit if self.rule == "explicit" else None

    @property
    def calibrated(self):
        """The calibrated λ: the given one, or where the sweep meets the on-policy likelihood; None if neither."""
        if self.lab is self._first and self.rule in self._calibrated:
            return self._calibrated[self.rule]
        return None if self.frame is None else study.crossing(self.frame, self.lab.on_policy)

    @property
    def first(self):
        """The stop where one begins: the one nearest to the calibrated λ."""
        wanted = self.calibrated or 0.0
        return min(self.stops, key=lambda stop: abs(stop[0] - wanted))

    def view(self, stop, estimator, picked=None):
        """The `plots_explorer.View` of a stop."""
        return plots_explorer.View(
            label=self.lab.dataset.label,
            rule=self.rule,
            points=self.points,
            lam=stop[0],
            here=self.point(stop),
            on_policy=self.lab.on_policy,
            floor=self.lab.floor,
            estimator=estimator,
            picked=picked,
            limit=self.limit,
            calibrated=self.calibrated,
        )

    def _wanted(self, lab, rule):
        return self._sweeps[rule] if lab is self._first and rule in self._sweeps else lab.grid(rule)
