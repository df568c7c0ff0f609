"""The stops of the λ explorer's slider: the points of a sweep that are in runs/, and what is drawn afresh beside them.

They are of one study, and of its siblings on other datasets.
"""

import contextlib
from types import SimpleNamespace

from pgdlib import fast
from pgdlib.lab import fronts, minari_files, study, tasks
from pgdlib.lab.explorer import views, widgets

FRESH = 64  # trajectories, at most, that are drawn at any λ while somebody waits


class NotMade(Exception):
    """What is asked for has to be made first, and that takes long."""


def refuse(*_, desc="", **__):
    """A maker of bars, as tqdm, that lets nothing long begin."""
    raise NotMade(f"{desc} comes first, then the sweep")


class Stops:
    """What is known of one dataset and rule at a time, those of the last `choose`: the study `lab`, and a `sweep`, or None.

    lams: rule -> the λ of its sweep, where not `study.GRIDS`; calibrated: rule -> λ; both of the study `lab` alone. A stop is
    (λ, 0) of the sweep, or (λ, n) of the n-th drawing of fresh trajectories.
    """

    def __init__(self, lab, lams=None, calibrated=None):
        self.lab, self.dataset, self.rule, self.sweep = lab, lab.p.dataset, "explicit", None
        self._first, self._lams, self._calibrated = lab, lams or {}, calibrated or {}
        self._labs, self._sweeps, self._fresh, self._drawn = {lab.p.dataset: lab}, {}, {}, 0
        self._making = set()  # the datasets whose data and denoiser are being made, in a thread

    def choose(self, dataset, rule):
        """Take what runs/ holds of the rule's sweep on `dataset`; (what to tell the user, what to offer), both "" if all."""
        self.dataset, self.rule, self.sweep = dataset, rule, None
        try:
            self.lab = self._labs.get(dataset) or self._open(dataset, refuse)
        except (NotMade, ValueError, OSError) as e:
            return f"{dataset} is not ready yet: {str(e).rstrip('.')}.", "Compute"
        self.sweep = self._load()
        have, missing, differs = self.lab.status(rule, self._wanted(self.lab, rule))
        if missing and have:
            return f"{len(have)} of {len(have) + len(missing)} λ of this sweep are computed.", "Compute the rest"
        if missing and differs:
            return f"The sweep in runs/ is stale: it was made with another {', '.join(sorted(differs))}.", "Compute it anew"
        if missing:
            return f"There is no sweep of the {rule} rule on {self.lab.dataset.label} yet.", "Compute it"
        return "", ""

    def compute(self, dataset, rule, report):
        """Make what the rule's sweep on `dataset` lacks; each λ is kept as soon as it is done. `report(share, text)`."""
        self._making.add(dataset)
        try:
            lab = self._labs.get(dataset) or self._open(dataset, widgets.bars(report))
        finally:
            self._making.discard(dataset)
        missing = lab.status(rule, self._wanted(lab, rule))[1]
        for i, lam in enumerate(missing):
            text = f"λ = {lam:.3g}, {i + 1} of {len(missing)}"
            lab.point(rule, lam, lambda x, denoised, sigma, done, i=i, text=text: report((i + done) / len(missing), text))

    def sample(self, lab, rule, lam, report):
        """Draw fresh trajectories of the study `lab` at any λ, `FRESH` at most; their stop, and how many they are."""
        self._drawn += 1
        stop, noise = (lam, self._drawn), fast.stream(lab.device, "fresh", lab.p.seed, self._drawn)
        how = dict(noise=noise, watch=lambda x, denoised, sigma, done: report(0.8 * done))
        drawn = lab.draw(rule, lam, min(FRESH, lab.p.samples), **how)
        report(0.8, "simulating")
        point = study.Point(drawn[0], *lab.judge(*drawn))
        report(1.0)
        self._fresh.setdefault((lab.p.dataset, rule), {})[stop] = point
        return stop, len(point.x)

    @property
    def all(self):
        """The stops of the sweep, rising; of each λ, the last that was drawn afresh is among them."""
        fresh = dict(sorted(self._fresh.get((self.dataset, self.rule), {})))
        return sorted([*((lam, 0) for lam in self.sweep.points), *fresh.items()]) if self.sweep else []

    @property
    def first(self):
        """The stop where one begins: the one nearest to the calibrated λ; None where there is no sweep."""
        return min(self.all, key=lambda stop: abs(stop[0] - (self.sweep.calibrated or 0.0)), default=None)

    def view(self, stop, estimator, picked=None):
        """The `views.View` of a stop."""
        here = self._fresh[self.dataset, self.rule][stop] if stop[1] else self.sweep.points[stop[0]]
        return views.View(self.sweep, stop, here, estimator, picked)

    def _open(self, dataset, progress):
        """The study of another dataset; its data and denoiser are made if missing, with bars from `progress`.

        With `refuse` for `progress` nothing is made: NotMade, ValueError or OSError says what would have to be.
        """
        source = "d4rl" if self._first.dataset.is_public else "local"
        if progress is refuse:
            if dataset in self._making:  # whoever makes something locks it: one would wait for its end
                raise NotMade("its data and its denoiser are being made")
            if source == "d4rl":
                minari_files.find(tasks.PUBLIC[dataset][0], download=False)
        p = SimpleNamespace(**vars(self._first.p) | {"dataset": dataset, "source": source})
        self._labs[dataset] = study.Study.open(p, progress, say=lambda text: None)
        return self._labs[dataset]

    def _load(self):
        """The chosen sweep as far as it is in runs/, if λ = 0 is; the same one as long as no λ is added to it."""
        lab, rule, kept, points = self.lab, self.rule, self._sweeps.get((self.dataset, self.rule)), {}
        have = lab.status(rule, self._wanted(lab, rule))[0]
        if kept and list(kept.points) == have:
            return kept
        for lam in have:
            with contextlib.suppress(NotMade):  # a damaged one is set aside, so it is missing from now on
                points[lam] = lab.point(rule, lam, watch=refuse)
        if 0.0 not in points:
            return None
        frame, limit = study.summary(points), lab.limit if rule == "explicit" else None
        calibrated = self._calibrated.get(rule) if lab is self._first else None
        if calibrated is None:
            calibrated = fronts.crossing(frame["lam"], frame["log_likelihood.mean"], lab.on_policy)
        sweep = views.Sweep(lab.dataset.label, rule, points, frame, lab.on_policy, lab.floor, limit, calibrated)
        self._sweeps[self.dataset, rule] = sweep
        return sweep

    def _wanted(self, lab, rule):
        return self._lams[rule] if lab is self._first and rule in self._lams else lab.grid(rule)
