"""Samplers beside each other: what is shown of each, and which are as good as the first.

`found`: (solver, steps, churn) -> (measures of trajectories from the same noise, name -> [n] as `Study.judge` gives them; what
`energy_distance` gives of their states and the data's). `truth`: the measures' means on real data.
"""

import numpy as np
import pandas as pd

from pgdlib import sampler
from pgdlib.lab.claims import MARGIN
from pgdlib.measures import bootstrap, interval, ratio_of_means


def frame(found, truth, ruler="normalised"):
    """A row for each sampler, as `figures.data.sampler_quality` draws them, and whether it is `as_good` as the first.

    `ruler`: the measure of wrongness (`Study.rulers`). Without a guide there are no likelihoods, and none is compared.
    """
    rows, names = [], dict(error=ruler, motion="motion", likelihood="log_likelihood")
    base = next(iter(found.values()))
    for (solver, steps, churn), (values, (distance, p, chance)) in found.items():
        relative = bootstrap(ratio_of_means, values[ruler], values["motion"], paired=True)
        each = {"relative": relative} | {name: interval(values[key]) for name, key in names.items() if key in values}
        each["distance"] = [distance] * 3
        family = {"heun": "Heun"}.get(solver, solver) + " with churn" * (churn > 0)
        row = dict(sampler=label(solver, steps, churn), evaluations=sampler.evaluations(solver, steps), family=family)
        row |= {f"{k}.{c}": v for k, of in each.items() for c, v in zip(("mean", "low", "high"), of)}
        real = dict(error=truth[ruler], relative=np.nan, motion=truth["motion"], distance=chance)
        row |= {"chance": chance} | {f"{k}.real": v for k, v in real.items()}
        rows.append(row | {"as good": as_good(values, (distance, p, chance), *base, truth, ruler)})
    return pd.DataFrame(rows)


def label(solver, steps, churn):
    """A sampler's name in tables and sentences."""
    return f"{solver} {steps}" + f", churn {churn:g}" * bool(churn)


def as_good(values, distance, base, base_distance, truth, ruler="normalised"):
    """Whether a sampler is as good as the base: in nothing surely worse, and surely better than predicting stillness.

    Compared are the error over the own motion (worse: by more than `MARGIN`), how far the log-likelihood is from the data's,
    and the energy distance to the data (worse: by more than chance); stillness is that of the data.
    """

    def relative(a, b, c, d):
        return ratio_of_means(a, b) / ratio_of_means(c, d)

    def farther(a, b):
        return abs(a.mean(-1) - truth["log_likelihood"]) - abs(b.mean(-1) - truth["log_likelihood"])

    pairs = [each[name] for each in (values, base) for name in (ruler, "motion")]
    _, error, _ = bootstrap(relative, *pairs, paired=True)
    both = [each["log_likelihood"] for each in (values, base) if "log_likelihood" in each]
    likelihood = bootstrap(farther, *both, paired=True)[1] if both else 0.0
    near = distance[0] <= base_distance[0] + distance[2]
    moves = ruler != "normalised" or interval(values[ruler])[2] < truth["motion"]
    return bool(error <= MARGIN and likelihood <= 0 and near and moves)
