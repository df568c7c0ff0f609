"""A study of guidance: one dataset, its denoiser and a guide. Trajectories drawn by any rule and λ, their measures, sweeps.

Every λ starts from the same noise, so trajectory i at one λ is the sibling of trajectory i at another, in whatever chunks
they are drawn.
"""

import shutil
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from pgdlib import calibrate, data, dynamics, guidance, measures, sampler
from pgdlib.lab import budget, load, store
from pgdlib.synthetic import WARMED

# What is swept of each rule, in natural units; λ = 0 is always in it.
GRIDS = {
    "explicit": [0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.25, 3.0],
    "normalised_linear": [2.0, 4.0, 6.0, 9.0, 12.0, 20.0],
    "normalised_cosine": [2.0, 4.0, 6.0, 9.0, 12.0, 20.0],
    "proximal": [0.02, 0.03, 0.05, 0.1, 0.3],
    "smoothed": [0.2, 0.5, 1.0, 2.0, 10.0],
    "annealed": [0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 2.0],
}
MEASURES = ("log_likelihood", "density", "normalised", "motion", "reconstructed", "appendix_b")
ROOMS = ("guidance", "sampler", "edm", "dynamics", "measures", "simulators.pen", "lab.study")


@dataclass
class Point:
    """The n trajectories of one λ and what was measured of them."""

    x: torch.Tensor  # [n, T, 71], normalised
    measures: dict  # name of `MEASURES` -> [n]; the last two are the plain errors of the two estimators
    counts: dict  # how many of them "diverged", and how many are "unjudged", so have no error


class Study:
    """One dataset, its denoiser and a guide, with the settings `p` that notebook 04 has (`params.check`)."""

    def __init__(self, dataset, denoiser, policy, p, device="cpu"):
        self.dataset, self.denoiser, self.policy, self.p, self.device = dataset, denoiser, policy, p, torch.device(device)
        self.normaliser = denoiser.normaliser
        self.train, self.val = load.train_val(dataset)
        variance = self.train.obs.var(0).numpy()
        self.variance = np.where(variance > 1e-12, variance, np.float32(1))  # 1 for a dimension that never changes
        self.on_policy = measures.on_policy_log_likelihood(policy)
        self._most = {}

    @classmethod
    def open(cls, p, progress=tqdm, say=print):
        """The study of `p.dataset`; its data and its denoiser are loaded, or made, with the bar `progress`."""
        device = load.device_of(p.device)
        policy, _ = load.load_guide(p.guide)
        dataset = load.load_data(p.dataset, p.source, p.data_steps, progress, say)
        denoiser, _ = load.load_denoiser(dataset, p, device, progress, say)
        return cls(dataset, denoiser, policy.to(device), p, device)

    @cached_property
    def limit(self):
        """The λ from which the explicit rule must diverge: 2 in natural units, 2 (s/d)² of the sharpest action in raw ones."""
        slope = self.normaliser.std[data.ACTIONS]
        return 2.0 if self.p.units == "natural" else float((2 * (self.policy.log_std.exp() / slope).square()).min())

    @cached_property
    def real(self):
        """The measures of real windows, of the validation side: what a perfect model would have, if the ruler were perfect."""
        x, mask = self._windows(self.val, self.p.samples, self.p.seed)
        return self.judge(x, alive=mask.cpu())[0]

    @cached_property
    def floor(self):
        """The mean of each measure on real windows."""
        return {name: measures.interval(values)[0] for name, values in self.real.items()}

    def windows(self, episodes, n, seed):
        """n random windows [n, T, 71] of `episodes`, normalised; beyond an episode's end its last step is repeated."""
        return self._windows(episodes, n, seed)[0]

    def _windows(self, episodes, n, seed):
        cut = data.Windows(episodes, self.normaliser, self.p.horizon, self.device)
        ids = torch.randint(len(cut), (n,), generator=torch.Generator().manual_seed(seed))
        return cut[ids.to(self.device)]

    def grid(self, rule):
        """The λ that are swept of a rule by default, in this study's units."""
        scaled = self.limit / 2 if rule in WARMED else 1.0
        return [scaled * lam for lam in GRIDS[rule]]

    def draw(self, rule, lam, n=None, seed=None, units=None, target=None, warmup=None, on=None, watch=None, parts=None):
        """n trajectories [n, T, 71], normalised, guided by `rule` with λ, and which diverged [n].

        `target` is another policy than the study's. They are drawn as many at once as fit (`most`); `watch` and `parts`
        as in `sampler.draw`.
        """
        p, target = self.p, target or self.policy
        n, seed, units = n or p.samples, p.seed if seed is None else seed, units or p.units
        warmup = (p.warmup if warmup is None else warmup) if rule in WARMED else 0  # the others begin at the highest noise
        guide = guidance.Guide(rule, target, self.normaliser, lam, p.steps, warmup, units, on)
        most = (parts and sampler.kept_most(parts)) or self.most(n)
        where = dict(device=self.device, solver=p.solver, most=most, parts=parts, watch=watch)
        return sampler.draw(self.denoiser, (n, p.horizon, data.CHANNELS), p.steps, p.churn, seed, guide, **where)

    def most(self, n):
        """How many of n trajectories are drawn at once (`budget.most`); the same every time."""
        if n not in self._most:
            asked = sampler.evaluations(self.p.solver, self.p.steps)
            self._most[n] = budget.most(self.denoiser, n, self.p.horizon, asked, self.device)
        return self._most[n]

    def judge(self, x, diverged=None, estimators=dynamics.ESTIMATORS, alive=None):
        """The measures of normalised trajectories [n, T, 71], name -> [n]; counts of what has none.

        `alive` [n, T] is 1 on the steps that count; by default those up to the first terminal one.
        """
        steps = self.normaliser.denormalise(x).cpu()
        obs, actions = steps[..., data.OBS], steps[..., data.ACTIONS]
        alive = measures.alive(steps[..., data.TERMINAL]) if alive is None else alive
        error = {
            name: dynamics.dynamics_error(obs.numpy(), actions.numpy(), self.variance, name, alive.numpy())
            for name in estimators
        }
        on_device = (self.policy, obs.to(self.device), actions.to(self.device), alive.to(self.device))
        found = {
            "log_likelihood": measures.log_likelihood(*on_device).cpu().numpy(),
            "density": measures.mean_density(*on_device).cpu().numpy(),
            "normalised": error["reconstructed"].normalised,
            "motion": error["still"].normalised,
            **{name: error[name].plain for name in estimators if name != "still"},
        }
        lost = 0 if diverged is None else int(diverged.sum())
        return found, {"diverged": lost, "unjudged": error["reconstructed"].unjudged}

    def calibrate(self, rule, tolerance, start, watch=None):
        """The `Calibration` of a rule; at ci scale, where nothing is learnt, only to 20%. If out of reach, the nearest.

        `watch` as in `draw`. Until it is over, what was drawn in several chunks is kept, as that of a `point`.
        """
        kept = self._kept(self._path(rule, 0.0), "calibration")

        def likelihoods(lam, n, seed):
            parts = kept / f"{float(lam)!r}-{n}-{seed}"
            x, _ = self.draw(rule, lam, n, self.p.seed + 1000 + seed, watch=watch, parts=parts)
            steps = self.normaliser.denormalise(x)
            alive = measures.alive(steps[..., data.TERMINAL])
            return measures.log_likelihood(self.policy, steps[..., data.OBS], steps[..., data.ACTIONS], alive).cpu().numpy()

        try:
            found = calibrate.calibrate(likelihoods, self.on_policy, 0.2 if self.p.scale == "ci" else tolerance, start=start)
        except calibrate.OutOfReach as reason:
            print(f"{rule}: {reason}; the nearest is taken")
            found = reason.nearest
        shutil.rmtree(kept, ignore_errors=True)
        return found

    def sweep(self, rule, lams, progress=tqdm):
        """λ -> `Point` of a rule, for `lams` and 0, rising; each is kept in runs/ and made only if missing."""
        return {lam: self.point(rule, lam) for lam in progress(self._wanted(lams), desc=rule, mininterval=5)}

    def point(self, rule, lam, watch=None):
        """The `Point` of one λ, from runs/ or made and kept there; `watch` as in `draw`.

        Until it is complete the finished chunks of its trajectories are in runs/checkpoints/, from where a killed run goes on.
        """
        path = self._path(rule, lam)
        parts = self._kept(path, "point")

        def make():
            x, diverged = self.draw(rule, lam, watch=watch, parts=parts)
            values, counts = self.judge(x, diverged)
            tensors = {"x": x, **{f"measures.{k}": torch.from_numpy(v) for k, v in values.items()}}
            return tensors, dict(kind="guided trajectories", lam=lam, counts=counts, inputs=self._inputs(rule))

        tensors, card = store.artifact(path, make, report=lambda message: None)
        shutil.rmtree(parts, ignore_errors=True)
        values = {name: tensors[f"measures.{name}"].numpy() for name in MEASURES}
        return Point(tensors["x"].to(self.device), values, card["counts"])

    def status(self, rule, lams):
        """(λ that are in runs/, λ that are missing, what differs in sweeps that are there but made with other inputs)."""
        wanted = self._wanted(lams)
        have = [lam for lam in wanted if self._path(rule, lam).exists()]
        folder, own = self._path(rule, 0.0).parent, self._inputs(rule)
        differs, others = set(), sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        if not have and others:
            try:
                other = store.load(others[-1])[1]["inputs"]
                differs = {name for name in {**own, **other} if own.get(name) != other.get(name)}
            except (store.CorruptArtifact, FileNotFoundError, KeyError):
                differs = {"file, damaged"}
        return have, [lam for lam in wanted if lam not in have], differs

    @staticmethod
    def _wanted(lams):
        return sorted({0.0, *map(float, lams)})

    @staticmethod
    def _kept(path, what):
        return store.root() / "checkpoints" / f"{what}-{path.parent.name}-{path.stem}"

    def _path(self, rule, lam):
        name = f"{self.dataset.slug}-{self.p.scale}-{rule}-{self.p.units}"
        return store.root() / "sweeps" / name / f"{store.key(**self._inputs(rule))}-{float(lam)!r}.safetensors"

    def _inputs(self, rule):
        """All that decides a point beside its λ."""
        p = self.p
        settings = dict(solver=p.solver, steps=p.steps, churn=p.churn, warmup=p.warmup if rule in WARMED else 0)
        return {**self._digests, "sampler": settings, "horizon": p.horizon, "trajectories": p.samples, "seed": p.seed}

    @cached_property
    def _digests(self):
        digests = {
            "diffusion model": store.digest(self.denoiser.state_dict())[:12],
            "guide": store.digest(self.policy.state_dict())[:12],
            "data": self.dataset.key,
        }
        return {**digests, "code": store.code_version(*ROOMS)}


def summary(points):
    """A frame with a row for each λ of `points`: counts, and mean, low and high (95%) of each measure."""
    rows = []
    for lam, point in points.items():
        rows.append({"lam": lam, **point.counts})
        for name, values in point.measures.items():
            keys = (f"{name}.{k}" for k in ("mean", "low", "high"))
            rows[-1].update(zip(keys, measures.interval(values), strict=True))
    return pd.DataFrame(rows)


@dataclass
class Film:
    """One trajectory while it is denoised, at K steps of falling noise."""

    sigma: np.ndarray  # [K]
    noised: np.ndarray  # [K, T, 71], normalised
    actions: np.ndarray  # [K, T, 24], of the denoised estimate, environment space
    means: np.ndarray  # [K, T, 24], the policy's mean actions in the states of that estimate


def film(lab, rule, lam, seed=0):
    """The `Film` of one trajectory of the `Study` lab."""
    seen = []
    lab.draw(rule, lam, 1, seed, watch=lambda x, denoised, sigma, done: seen.append((sigma, x[0], denoised[0])))
    sigma, noised, denoised = zip(*seen[:: 2 if lab.p.solver == "heun" else 1])  # the corrector's evaluations are no steps
    steps = lab.normaliser.denormalise(torch.stack(denoised))
    means = lab.policy(steps[..., data.OBS])[0]
    arrays = (v.cpu().numpy() for v in (torch.stack(noised), steps[..., data.ACTIONS], means))
    return Film(np.array(sigma), *arrays)


def crossing(frame, on_policy):
    """The λ at which the mean log-likelihood of a `summary` first meets `on_policy`, linear between points; None if never."""
    lam, mean = frame["lam"].to_numpy(), frame["log_likelihood.mean"].to_numpy()
    passed = np.flatnonzero(mean >= on_policy)
    if len(passed) == 0:
        return None
    around = slice(max(passed[0] - 1, 0), passed[0] + 1)
    return float(np.interp(on_policy, mean[around], lam[around]))
