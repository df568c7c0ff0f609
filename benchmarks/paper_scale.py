"""The pipeline in slices, for a machine that is lent for minutes: data, training, Figure 1, the fronts of the rules, claims.

python benchmarks/paper_scale.py --minutes 9 --scale paper [--out runs/paper_scale] [--features 512 ...]

Each call goes on where the last one stopped, in runs/, and ends after about so many minutes; the exit status is 0 when all is
done, 3 when more is left. `--out` gets what is known by then: figures, their tables, and card.json. Data are collected in one
go, minutes at paper scale.
"""

import json
import shutil
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from pgdlib import adroit, budget, claims, data, edm, guidance, params, pipeline, plots, plots_guidance, store, study, train

FIGURE_1 = [0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.25, 3.0]  # and 0
RULES = {
    **train.PARAMETERS,
    "minutes": params.number(0.01),
    "out": params.text(),
    "rule": params.one_of(*guidance.RULES),
    "guide": params.text(),
    "units": params.one_of("natural", "raw"),
    "lams": params.numbers(0),
    **params.optional_settings("solver steps warmup churn samples"),
}
GIVEN = {**train.GIVEN, "scale": "paper", "minutes": 9, "out": "runs/paper_scale", "rule": "annealed"}
GIVEN |= {"guide": "shipped", "units": "natural", "lams": FIGURE_1}
LARGEST = 16 * 2**20  # bytes of a file in `--out`
MORE_LEFT = 3


class TimeIsUp(Exception):
    pass


class Slice:
    """The minutes of this call, the settings `p`, and card.json in `p.out`, which goes on from the last call."""

    def __init__(self, p):
        self.p, self.out, self.end = p, Path(p.out), time.monotonic() + 60 * p.minutes
        self.out.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(p).items() if k not in ("minutes", "out")}
        before = json.loads((self.out / "card.json").read_text()) if (self.out / "card.json").exists() else {}
        fresh = dict(settings=settings, seconds={}, calibrated={}, slices=0)
        self.card = before if before.get("settings") == settings else fresh
        self.card["slices"] += 1

    def check(self, *_):
        """The watch of drawings: raises TimeIsUp when the minutes are over."""
        if time.monotonic() > self.end:
            raise TimeIsUp

    def bar(self, *given, **named):
        """A bar of training as tqdm's, that stops it in time."""
        check = self.check

        class Bar(tqdm):
            def update(self, n=1):
                super().update(n)
                check()

        return Bar(*given, **named)

    @contextmanager
    def stage(self, name):
        """Counts the seconds of a stage over all slices, also of one that is stopped."""
        self.check()
        print(f"== {name}", flush=True)
        started = time.monotonic()
        try:
            yield
        finally:
            self.card["seconds"][name] = round(self.card["seconds"].get(name, 0.0) + time.monotonic() - started, 1)
            self.write()

    def save(self, name, fig=None, table=None):
        """Write a figure and a table to `out`; ValueError if a file is too large to be fetched."""
        if fig is not None:
            fig.savefig(self.out / f"{name}.png")
            plt.close(fig)
        if table is not None:
            pd.DataFrame(table).to_csv(self.out / f"{name}.csv", index=False)
        for path in self.out.glob(f"{name}.*"):
            if path.stat().st_size >= LARGEST:
                raise ValueError(f"{path} has {path.stat().st_size:,} bytes; allowed are less than {LARGEST:,}")

    def write(self):
        text = json.dumps(self.card, indent=1, ensure_ascii=False, default=str) + "\n"
        with store.replacing(self.out / "card.json") as partial:
            Path(partial).write_text(text, encoding="utf-8")


def run(part):
    """All stages, as far as the time of this `Slice` allows."""
    p, device = part.p, pipeline.device_of(part.p.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    part.card |= dict(scale=p.scale, device=name, date=datetime.now(UTC).date().isoformat(), versions=store.versions())
    part.card["complete"] = False
    with part.stage("data"):
        policy, _ = pipeline.load_guide(p.guide)
        dataset = pipeline.load_data(p.dataset, p.source, p.data_steps)
        part.card |= dict(data=dataset.label, is_d4rl=dataset.is_d4rl, data_key=dataset.key)
    with part.stage("training"):
        denoiser, losses = pipeline.load_denoiser(dataset, p, device, part.bar)
    lab = study.Study(dataset, denoiser, policy.to(device), p, device)
    if not (part.out / "losses.csv").exists() or part.card["slices"] == 1:
        show_training(part, lab, losses.numpy())

    plan = {"explicit": sorted({0.0, *map(float, p.lams)}), **{r: lab.grid(r) for r in study.GRIDS if r != "explicit"}}
    missing = {rule: set(lab.status(rule, lams)[1]) & set(lams) for rule, lams in plan.items()}
    if any(missing.values()):
        budget.announce_draws(lab, {f"{rule} rule": len(lams) for rule, lams in missing.items() if lams})
    points = {}
    for rule, lams in plan.items():
        points[rule] = {} if rule == "explicit" else {0.0: points["explicit"][0.0]}  # which is the same for all
        try:
            with part.stage("Figure 1" if rule == "explicit" else f"front of {rule}"):
                for lam in lams:
                    points[rule][lam] = lab.point(rule, lam, part.check)
        finally:
            if missing[rule] and len(points[rule]) > 1:
                part.save(f"sweep_{rule}", table=study.summary(points[rule]))
                show_figure_1(part, lab, points["explicit"])
                show_fronts(part, lab, points)
    with part.stage("calibration"):
        for rule, tolerance, start in (("explicit", 0.05, 0.1), (p.rule, 0.02, 0.3)):
            if rule not in part.card["calibrated"]:
                part.card["calibrated"][rule] = lab.calibrate(rule, tolerance, start, part.check).lam
    with part.stage("claims"):
        judge(part, lab, points["explicit"])
    part.card["complete"] = True
    part.write()


def show_training(part, lab, losses):
    """The losses of training, and by noise level on both sides of the data."""
    sigmas = torch.logspace(-2.3, 1.5, 10)
    sides = [data.Windows(side, lab.normaliser, lab.p.horizon, lab.device) for side in (lab.train, lab.val)]
    curves = [edm.validation_loss(lab.denoiser, w, sigmas, 128, lab.p.seed).cpu().numpy() for w in sides]
    fig = plots.training(losses, sigmas.numpy(), *curves, f"denoiser on {lab.dataset.label}, scale {lab.p.scale}")
    part.save("training", fig, {"sigma": sigmas.numpy(), "training": curves[0], "validation": curves[1]})
    thinned = np.array_split(losses, min(len(losses), 1000))
    part.save("losses", table={"step": np.cumsum([len(v) for v in thinned]), "loss": [v.mean() for v in thinned]})


def show_figure_1(part, lab, sweep):
    """Figure 1 of the paper's rule, with the clouds of λ = 0 and of the calibrated λ, before that of the likeliest one."""
    frame = study.summary(sweep)
    best = part.card["calibrated"].get("explicit", float(frame.lam[frame["log_likelihood.mean"].idxmax()]))
    clouds = {lam: sweep[lam].measures for lam in sorted({0.0, best}) if lam in sweep}
    title = f"Figure 1 on {lab.dataset.label}: explicit rule, scale {lab.p.scale}"
    floors = {e: lab.floor[e] for e in ("normalised", "appendix_b")}
    part.save("figure1", plots_guidance.figure_1(clouds, frame, floors, lab.on_policy, title, lab.limit))


def show_fronts(part, lab, points):
    """Error against likelihood of the rules of which points are there, if there are two."""
    names = ("log_likelihood.mean", "normalised.mean", "normalised.low", "normalised.high")
    frames = {rule: study.summary(each) for rule, each in points.items() if len(each) > 1}
    if len(frames) < 2:
        return
    curves = {rule: tuple(f[c].to_numpy()[1:] for c in names) for rule, f in frames.items()}
    zero = tuple(frames["explicit"].loc[0, list(names[:2])])
    ours = lab.p.rule if lab.p.rule in curves else "explicit"
    title = f"Fronts of the rules on {lab.dataset.label}: {lab.p.samples} trajectories a point, scale {lab.p.scale}"
    part.save("fronts", plots_guidance.fronts(curves, zero, lab.on_policy, ours, title))


def judge(part, lab, sweep):
    """The claims C1 to C3, C5 and C7, as notebook 04 judges them; C8 and C9 need what only the notebooks have."""
    p, weights = lab.p, part.card["calibrated"]
    zero, at, own = (
        lab.point(*key, part.check).measures
        for key in (("explicit", 0.0), ("explicit", weights["explicit"]), (p.rule, weights[p.rule]))
    )
    sweep = {lam: lab.point("explicit", lam, part.check) for lam in sorted({*sweep, weights["explicit"]})}
    frame = study.summary(sweep)
    part.save("sweep_explicit", table=frame)
    show_figure_1(part, lab, sweep)
    parts = store.root() / "checkpoints" / f"no-warmup-{store.key(**part.card['settings'])}"
    pair = [
        lab.judge(*lab.draw("explicit", weights["explicit"], warmup=n, watch=part.check, parts=parts / str(n)))
        for n in (p.warmup, 0)
    ]
    shutil.rmtree(parts, ignore_errors=True)
    noise = np.random.default_rng(p.seed)
    returns = adroit.rollout(lab.policy.act(), 200, noise, adroit.D4RL_HORIZON).d4rl_returns
    raised = claims.likelihood_raised(zero["log_likelihood"], at["log_likelihood"], lab.on_policy)
    kept = claims.error_not_raised(zero["normalised"], at["normalised"], "the paper's rule, state reconstructed")
    measured = [[point.measures[k] for point in sweep.values()] for k in ("log_likelihood", "normalised")]
    verdicts = [
        raised,
        kept,
        claims.error_not_raised(zero["appendix_b"], at["appendix_b"], "the paper's rule, Appendix B"),
        claims.error_not_raised(zero["normalised"], own["normalised"], f"{p.rule} rule, state reconstructed"),
        claims.threshold(list(sweep), *measured, [point.counts["diverged"] / p.samples for point in sweep.values()]),
        claims.warmup_cures(*(v["normalised"] for v, _ in pair), [counts["diverged"] / p.samples for _, counts in pair]),
        claims.better_guide(returns, lab.dataset.data.returns().numpy(), raised, kept),
    ]
    claims.record(verdicts, lab.dataset.label, lab.dataset.slug, p.scale)
    part.card["claims"] = [
        {"id": c.id, "measure": c.measure, "effect": claims.effect(c), "verdict": c.verdict} for c in verdicts
    ]
    part.save("claims", table=part.card["claims"])


def main(arguments=None):
    """One slice; the exit status."""
    try:
        part = Slice(train.parse(arguments, __doc__, RULES, GIVEN))
        matplotlib.use("agg")
        plots.use_style()
        run(part)
    except TimeIsUp:
        print(f"time is up; the same command goes on. {part.out / 'card.json'} says how far it is")
        return MORE_LEFT
    except (ValueError, FileNotFoundError) as reason:
        print(" ".join(str(reason).split()), file=sys.stderr)
        return 1
    print(f"all is done, see {part.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
