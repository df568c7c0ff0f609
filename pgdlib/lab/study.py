"""A study of guidance: one dataset, its denoiser and a guide. Trajectories drawn by any rule and λ, their measures, sweeps.

Every λ starts from the same noise, so trajectory i at one λ is the sibling of trajectory i at another, in whatever chunks
they are drawn.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from pgdlib import calibrate, data, dynamics, fast, guidance, measures, sampler
from pgdlib.lab import artifacts, budget, load, models, tasks
from pgdlib.lab.parts import Parts

# What is swept of each rule, in natural units; λ = 0 is always in it.
GRIDS = {
    "explicit": [0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.25, 3.0],
    "normalised_linear": [2.0, 4.0, 6.0, 9.0, 12.0, 20.0],
    "normalised_cosine": [2.0, 4.0, 6.0, 9.0, 12.0, 20.0],
    "proximal": [0.02, 0.03, 0.05, 0.1, 0.17, 0.3],
    "smoothed": [0.2, 0.5, 1.0, 2.0, 4.0, 10.0],
    "annealed": [0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 6.0],
}


@dataclass
class Point:
    """The n trajectories of one λ and what was measured of them."""

    x: torch.Tensor  # [n, T, width], normalised
    measures: dict  # name -> [n], as `Study.judge` has them
    counts: dict  # how many of them "diverged", and how many are "unjudged", so have no error


class Study:
    """One dataset, its denoiser and a guide (None: nothing is guided), with the settings `p` that notebook 04 has."""

    def __init__(self, dataset, denoiser, policy, p, device="cpu"):
        self.dataset, self.denoiser, self.policy, self.p, self.device = dataset, denoiser, policy, p, torch.device(device)
        self.normaliser, self.spec = denoiser.normaliser, denoiser.normaliser.spec
        self.train, self.val = load.train_val(dataset)
        self.simulator, self.variance = dataset.simulator, self.train.variance
        self.states = self.train.obs[:: -(-len(self.train.obs) // 4_096)].to(self.device)  # some, evenly spread
        self.on_policy = float(measures.on_policy_log_likelihood(policy, self.states)) if policy else np.nan
        self._most = {}

    @classmethod
    def open(cls, p, progress=tqdm, say=print):
        """The study of `p.dataset`; its data and its denoiser are loaded, or made, with the bar `progress`."""
        device = load.device_of(p.device)
        task = p.dataset in tasks.DATASETS and tasks.of_dataset(p.dataset)
        policy = task and load.load_guide(p.guide, task)[0]  # one that does not fit is refused before data are made
        dataset = load.load_data(p.dataset, p.source, p.data_steps, progress, say)
        policy = policy or load.load_guide(p.guide, dataset.task, dataset.data.spec)[0]
        denoiser, *_ = models.load_denoiser(dataset, p, device, progress, say)
        return cls(dataset, denoiser, policy.to(device), p, device)

    @property
    def rulers(self):
        """The measures of wrongness that there are, the one to trust first: errors, or without a simulator the distance."""
        errors = ("normalised", *(name for name in self.simulator.states if name != "reconstructed"))
        return errors if self.simulator.states else ("distance",)

    @cached_property
    def limit(self):
        """The λ from which the explicit rule must diverge: 2 in natural units, 2 (s/d)² of the sharpest action in raw ones."""
        if self.p.units == "natural":
            return 2.0
        return float((2 * (self.policy(self.states)[1] / self.normaliser.std[self.spec.actions]).square()).min())

    @cached_property
    def real(self):
        """The measures of real windows, of the validation side: what a perfect model would have, if the ruler were perfect."""
        x, mask = self.windows(self.val, self.p.samples, self.p.seed)
        return self.judge(x, alive=mask)[0]

    @cached_property
    def floor(self):
        """The mean of each measure on real windows."""
        return {name: measures.interval(values)[0] for name, values in self.real.items()}

    def windows(self, episodes, n, seed):
        """n random windows [n, T, width] of `episodes`, normalised, and mask [n, T]; beyond an end its last step repeats."""
        cut = data.Windows(episodes, self.normaliser, self.p.horizon, self.device)
        ids = torch.randint(len(cut), (n,), generator=torch.Generator().manual_seed(seed))
        return cut[ids.to(self.device)]

    def grid(self, rule):
        """The λ that are swept of a rule by default, in this study's units."""
        scaled = self.limit / 2 if rule in guidance.WARMED else 1.0
        return [scaled * lam for lam in GRIDS[rule]]

    def draw(
        self, rule, lam, n=None, seed=None, units=None, target=None, warmup=None, on=None, noise=None, watch=None, parts=None
    ):
        """n trajectories [n, T, width], normalised, guided by `rule` with λ, and which diverged [n].

        `target` is another policy than the study's, `noise` another `fast.stream` than that of the seed; `watch` as in
        `sampler.draw`. They are drawn as many at once as fit (`most`), and kept by then in `parts`.
        """
        p, n = self.p, n or self.p.samples
        noise = noise or fast.stream(self.device, "drawing", p.seed if seed is None else seed)
        warmup = (p.warmup if warmup is None else warmup) if rule in guidance.WARMED else 0
        guide = guidance.Guide(rule, target or self.policy, self.normaliser, lam, p.steps, warmup, units or p.units, on)
        most = (parts and parts.at_once) or self.most(n)
        where = dict(solver=p.solver, most=most, keep=parts and parts.keep, watch=watch)
        return sampler.draw(self.denoiser, (n, p.horizon, self.spec.width), p.steps, p.churn, noise, guide, **where)

    def most(self, n):
        """How many of n trajectories are drawn at once (`budget.most`); the same every time."""
        if n not in self._most:
            asked = sampler.evaluations(self.p.solver, self.p.steps)
            self._most[n] = budget.most(self.denoiser, n, self.p.horizon, asked, self.device)
        return self._most[n]

    def judge(self, x, diverged=None, estimators=None, alive=None):
        """The measures of normalised trajectories [n, T, width], name -> [n]; counts of what has none.

        Beside likelihoods: "normalised", the dynamics error over the variance; "motion", the same of stillness; the plain error
        of each of the `estimators` (all by default). Without a simulator: "distance", how far in the mean the states lie from
        the nearest of `states` (std). `alive` [n, T] is 1 on the steps that count; by default up to the first terminal one.
        """
        steps = self.normaliser.denormalise(x.to(self.device))
        alive = measures.alive(steps[..., self.spec.terminal]) if alive is None else alive
        parts = steps[..., self.spec.obs], steps[..., self.spec.actions], alive
        likelihoods = {"log_likelihood": measures.log_likelihood, "density": measures.mean_density} if self.policy else {}
        found = {name: of(self.policy, *parts).cpu().numpy() for name, of in likelihoods.items()}
        if not self.simulator.states:
            where = self.states, torch.as_tensor(self.variance**0.5).to(steps), alive
            found["distance"], estimators = measures.nearest(parts[0], *where).cpu().numpy(), ("still",)
        obs, actions, lasts = (v.cpu().numpy() for v in parts)
        how, estimators = (self.simulator, obs, actions, self.variance), estimators or (*self.simulator.states, "still")
        error = {name: dynamics.dynamics_error(*how, name, lasts) for name in estimators}
        names = dict(reconstructed="normalised", still="motion")
        found |= {names[name]: error[name].normalised for name in names if name in error}
        found |= {name: error[name].plain for name in estimators if name != "still"}
        lost = 0 if diverged is None else int(diverged.sum())
        return found, {"diverged": lost, "unjudged": int(np.isnan(found[self.rulers[0]]).sum())}

    def calibrate(self, rule, tolerance, watch=None):
        """The `Calibration` of a rule; at ci scale, where nothing is learnt, only to 20%. If out of reach, the nearest.

        `watch` as in `draw`. Until it is over, what was drawn in several chunks is kept, as that of a `point`.
        """
        all_parts = self._parts("calibration", rule, 0.0)

        def likelihoods(lam, n, number):
            parts = Parts(f"{all_parts.folder.name}/{lam!r}-{n}-{number}", self.device)
            noise = fast.stream(self.device, "calibration", self.p.seed, number)
            x, diverged = self.draw(rule, lam, n, noise=noise, watch=watch, parts=parts)
            steps = self.normaliser.denormalise(x)
            alive = measures.alive(steps[..., self.spec.terminal])
            found = measures.log_likelihood(self.policy, steps[..., self.spec.obs], steps[..., self.spec.actions], alive)
            return torch.where(diverged, torch.nan, found)[~diverged | diverged.all()].cpu()

        try:
            found = calibrate.calibrate(likelihoods, self.on_policy, 0.2 if self.p.scale == "ci" else tolerance)
        except calibrate.OutOfReach as reason:
            print(f"{rule}: {reason}; the nearest is taken")
            found = reason.nearest
        all_parts.discard()
        return found

    def sweep(self, rule, lams, progress=tqdm):
        """λ -> `Point` of a rule, for `lams` and 0, rising; each is kept in runs/ and made only if missing."""
        return {lam: self.point(rule, lam) for lam in progress(self._wanted(lams), desc=rule, mininterval=5)}

    def point(self, rule, lam, watch=None):
        """The `Point` of one λ, from runs/ or made and kept there; `watch` as in `draw`.

        Until it is complete the finished chunks of its trajectories are in runs/checkpoints/, from where a killed run goes on.
        """
        parts = self._parts("point", rule, lam)

        def make():
            x, diverged = self.draw(rule, lam, watch=watch, parts=parts)
            values, counts = self.judge(x, diverged)
            tensors = {"x": x, **{f"measures.{k}": torch.from_numpy(v) for k, v in values.items()}}
            return tensors, dict(kind="guided trajectories", lam=lam, counts=counts, inputs=self._inputs(rule))

        tensors, card = artifacts.artifact(self._path(rule, lam), make, report=lambda message: None)
        parts.discard()
        values = {k.removeprefix("measures."): t.numpy() for k, t in tensors.items() if k.startswith("measures.")}
        return Point(tensors["x"].to(self.device), values, card["counts"])

    def status(self, rule, lams):
        """(λ that are in runs/, λ that are missing, what differs in sweeps that are there but made with other inputs)."""
        wanted = self._wanted(lams)
        have = [lam for lam in wanted if self._path(rule, lam).exists()]
        folder, own = self._path(rule, 0.0).parent, self._inputs(rule)
        differs, others = set(), list(folder.glob("*.safetensors"))
        if not have and others:
            try:
                other = artifacts.load(max(others, key=lambda path: path.stat().st_mtime))[1]["inputs"]
                differs = {name for name in {**own, **other} if own.get(name) != other.get(name)}
            except (artifacts.CorruptArtifact, FileNotFoundError, KeyError):
                differs = {"file, damaged"}
        return have, [lam for lam in wanted if lam not in have], differs

    @staticmethod
    def _wanted(lams):
        return sorted({0.0, *map(float, lams)})

    def _parts(self, what, rule, lam):
        path = self._path(rule, lam)
        return Parts(f"{what}-{path.parent.name}-{path.stem}", self.device)

    def _path(self, rule, lam):
        name = f"{self.dataset.slug}-{self.p.scale}-{rule}-{self.p.units}"
        return artifacts.root() / "sweeps" / name / f"{artifacts.key(**self._inputs(rule))}-{float(lam)!r}.safetensors"

    def _inputs(self, rule):
        """All that decides a point beside its λ."""
        p = self.p
        settings = dict(solver=p.solver, steps=p.steps, churn=p.churn, warmup=p.warmup if rule in guidance.WARMED else 0)
        return {**self._digests, "sampler": settings, "horizon": p.horizon, "trajectories": p.samples, "seed": p.seed}

    @cached_property
    def _digests(self):
        return {
            "diffusion model": artifacts.digest(self.denoiser.state_dict())[:12],
            "guide": artifacts.digest(self.policy.state_dict())[:12],
            "data": self.dataset.key,
            "code": artifacts.code_version("lab.study"),
        }


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
class Denoising:
    """One trajectory on its way from noise, at K steps of falling noise."""

    sigma: np.ndarray  # [K]
    noised: np.ndarray  # [K, T, width], normalised
    actions: np.ndarray  # [K, T, action_dim], of the denoised estimate, environment space
    means: np.ndarray  # [K, T, action_dim], the policy's mean actions in the states of that estimate
    states: dict  # name -> slice of the observation, as `tasks.Task` has them


def denoising(lab, rule, lam, seed=0):
    """The `Denoising` of one trajectory of the `Study` lab."""
    seen = []
    lab.draw(rule, lam, 1, seed, watch=lambda x, denoised, sigma, done: seen.append((sigma, x[0], denoised[0])))
    sigma, noised, denoised = zip(*seen[:: 2 if lab.p.solver == "heun" else 1])  # the corrector's evaluations are no steps
    steps = lab.normaliser.denormalise(torch.stack(denoised))
    parts = torch.stack(noised), steps[..., lab.spec.actions], lab.policy(steps[..., lab.spec.obs])[0]
    return Denoising(np.array(sigma), *(v.cpu().numpy() for v in parts), lab.dataset.task.states)
