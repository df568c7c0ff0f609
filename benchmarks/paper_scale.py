"""The pipeline in slices, for a machine that is lent for minutes: data, training, Figure 1, fronts, claims, Table 1.

python -m benchmarks.paper_scale --minutes 9 --scale paper [--out runs/paper_scale] [--features 512 ...]

Each call goes on where the last one stopped, in runs/, and ends after about so many minutes; the exit status is 0 when all is
done, 3 when more is left. `--out` gets what is known by then: figures, their tables, and card.json. Data are collected in one
go, minutes at paper scale. Table 1 comes last, for `--seeds` agents of each row (0: not at all) and without the world model,
so C6, which needs one, is left to notebook 06.
"""

import json
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import torch
from tqdm import tqdm

from benchmarks import paper_results
from pgdlib import guidance
from pgdlib.lab import budget, figures, params, pipeline, store, study, train

FIGURE_1 = [0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.25, 3.0]  # and 0
RULES = {
    **train.PARAMETERS,
    "minutes": params.number(0.01),
    "out": params.text(),
    "rule": params.one_of(*guidance.RULES),
    "guide": params.text(),
    "units": params.one_of("natural", "raw"),
    "lams": params.numbers(0),
    "seeds": params.integer(0, 1000),
    **params.optional_settings("solver steps warmup churn samples agent_steps hidden resample_every windows test_episodes"),
    **params.optional_settings("draw_solver draw_steps draw_warmup draw_churn"),
}
GIVEN = {**train.GIVEN, "scale": "paper", "minutes": 9, "out": "runs/paper_scale", "rule": "annealed"}
GIVEN |= {"guide": "shipped", "units": "natural", "lams": FIGURE_1, "seeds": 5}
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
        paper_results.show_training(part, lab, losses.numpy())

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
                paper_results.show_figure_1(part, lab, points["explicit"])
                paper_results.show_fronts(part, lab, points)
    with part.stage("calibration"):
        for rule, tolerance, start in (("explicit", 0.05, 0.1), (p.rule, 0.02, 0.3)):
            if rule not in part.card["calibrated"]:
                part.card["calibrated"][rule] = lab.calibrate(rule, tolerance, start, part.check).lam
    with part.stage("claims"):
        if "claims" not in part.card:  # else a slice before this one has judged them
            verdicts = paper_results.judge(part, lab, points["explicit"])
            verdicts += [paper_results.likely(lab, points["explicit"][0.0]), paper_results.states(part, lab)]
            paper_results.publish(part, lab, verdicts)
    if p.seeds:
        with part.stage("Table 1"):
            paper_results.publish(part, lab, paper_results.table_1(part, lab))
    part.card["complete"] = True
    part.write()


def main(arguments=None):
    """One slice; the exit status."""
    try:
        part = Slice(train.parse(arguments, __doc__, RULES, GIVEN))
        matplotlib.use("agg")
        figures.style.use_style()
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
