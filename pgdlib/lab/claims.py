"""The paper's claims: what is measured for each, the effect with its interval, and the verdict, by rules that stand here.

A verdict is one of `VERDICTS`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from pgdlib.lab import artifacts
from pgdlib.lab.seedstats import PAPER_GAINS, paired_interval
from pgdlib.measures import bootstrap, interval, ratio_of_means

REPRODUCED, PARTLY, NOT, UNTESTED = VERDICTS = ("reproduced", "partly", "not reproduced", "not testable here")
MARGIN = 1.05  # an error that is at most so many times another is not higher

CLAIMS = {
    "C1": "Guidance raises the likelihood under the target policy a lot",
    "C2": "At a tuned λ it does not raise dynamics error",
    "C3": "Past a threshold likelihood falls and dynamics error shoots up",
    "C4": "IQL trained on guided data returns more than on unguided, on every dataset (in the paper not significantly)",
    "C5": "Guidance at high noise is unstable; a warm-up cures it",
    "C6": "Whole trajectories avoid the compounding error of one-step models",
    "C7": "C1 and C2 hold although the guide is far better than the data's policy",
    "C8": "Trajectories likely under the behaviour model have lower dynamics error",
    "C9": "States shift too, although only actions are guided",
}


@dataclass
class Claim:
    """A verdict and what it rests on. `id` is a key of `CLAIMS`, with what sets this test apart after a space."""

    id: str
    measure: str  # what the effect is, in words
    effect: float
    low: float  # the 95% interval of the effect
    high: float
    verdict: str
    rule: str  # when the verdict is `REPRODUCED` and when `PARTLY`

    @property
    def text(self):
        return CLAIMS[self.id.split()[0]]


def likelihood_raised(unguided, guided, on_policy):
    """C1 from log-likelihoods [n] at λ = 0 and at the tuned λ, from the same noise."""
    effect = bootstrap(lambda u, g: (g - u).mean(-1) / (on_policy - u.mean(-1)), unguided, guided, paired=True)
    gap = bootstrap(lambda u, g: on_policy - u.mean(-1), unguided, guided, paired=True)
    rule = "reproduced if at least half of the gap is closed, partly if any; not testable unless there surely is a gap"
    verdict = _grade(effect[1] >= 0.5, effect[1] > 0) if gap[1] > 0 else UNTESTED
    return Claim("C1", "share of the gap from unguided to on-policy log-likelihood that is closed", *effect, verdict, rule)


def error_not_raised(unguided, guided, which):
    """C2 from dynamics errors [n] at λ = 0 and at the tuned λ, from the same noise; `which` rule and estimator, in words."""
    effect = bootstrap(ratio_of_means, guided, unguided, paired=True)
    rule = f"reproduced if surely below {MARGIN}, partly if it may be; not testable where the tuned λ is 0"
    verdict = UNTESTED if np.array_equal(unguided, guided) else _grade(effect[2] <= MARGIN, effect[1] <= MARGIN)
    return Claim(f"C2 {which}", f"dynamics error at the tuned λ over that at λ = 0 ({which})", *effect, verdict, rule)


def threshold(lams, likelihoods, errors, diverged):
    """C3 from a sweep: λ rising [L], log-likelihoods and errors, a list of [n] for each λ, shares of diverged trajectories [L].

    The effect is the middle of the last λ before the collapse and the first after it, its interval these two. Collapsed is a
    λ at which the likelihood lies surely below the best, and half the trajectories have diverged or the error has doubled.
    """
    best = int(np.nanargmax([np.mean(v) for v in likelihoods]))
    low_best = interval(likelihoods[best])[1]

    def collapsed(i):
        falls = interval(likelihoods[i])[2] < low_best
        with np.errstate(invalid="ignore"):
            shoots = not np.isfinite(errors[i]).any() or np.nanmean(errors[i]) > 2 * np.nanmean(errors[best])
        return falls and (shoots or diverged[i] >= 0.5)

    first = next((i for i in range(best + 1, len(lams)) if collapsed(i)), None)
    rule = "reproduced if the collapse lies between 1.5 and 3, partly if elsewhere"
    measure = "λ of the paper's rule between the last that works and the first that does not"
    if first is None:
        return Claim("C3", measure, float("nan"), float(lams[-1]), float("nan"), NOT, rule)
    low, high = float(lams[first - 1]), float(lams[first])
    return Claim("C3", measure, (low + high) / 2, low, high, _grade(low >= 1.5 and high <= 3, True), rule)


def returns_raised(returns, which="", unit="seeds"):
    """C4 from returns on D4RL's scale, dataset -> (unguided [S], guided [S]), and `which` guidance, in words.

    Returns are paired by seed, or by another `unit`, NaN where one diverged. The effect is the mean over the datasets of the
    mean gain, in return: as in the paper's Table 1, and because Student's interval fits a difference and not a ratio. With few
    seeds that interval holds zero whether the claim is true or not, so this alone is no failure: what is not surely above zero
    fails if the paper's own gain on these datasets lies above the interval, too, and is undecided if not. That human gains most
    is shown but not judged: the paper's gains differ by less than their standard errors. ValueError if there is no dataset, or
    one that is not in Table 1.
    """
    if not returns or (unknown := set(returns) - set(PAPER_GAINS)):
        found = ", ".join(sorted(unknown)) if returns else "none"
        raise ValueError(f"the datasets of C4 must be one or more of {', '.join(PAPER_GAINS)}; got {found}")
    unguided, guided = (list(side) for side in zip(*returns.values()))
    effect = paired_interval(guided, unguided)
    paper = np.mean([PAPER_GAINS[name] for name in returns])
    shown, flawed = [], False
    for name, pair in returns.items():
        gain, _, high = paired_interval(pair[1], pair[0])
        kept, seeds = int(np.isfinite(pair).all(0).sum()), len(pair[0])
        shown.append(f"{name} {gain:+.0f}, {kept}{f' of {seeds}' * (kept < seeds)} {unit}")
        flawed |= kept < seeds or high < 0
    if np.isnan(effect[1]) or effect[1] <= 0 < paper <= effect[2]:
        verdict = UNTESTED
    else:
        verdict = _grade(effect[1] > 0 and not flawed, effect[1] > 0)
    rule = (
        "reproduced if surely above zero, partly if a dataset surely loses or a seed diverged; "
        f"not testable with so few {unit} if the interval holds both zero and the paper's gain"
    )
    rule_of = f"{which}, " if which else ""
    measure = f"mean gain in return, guided less unguided, D4RL's scale ({rule_of}{'; '.join(shown)}; the paper's {paper:+.0f})"
    return Claim(f"C4 {which}".strip(), measure, *effect, verdict, rule)


def warmup_cures(with_warmup, without, diverged):
    """C5 from dynamics errors [n] at one λ with and without a warm-up, and (with, without) shares of diverged trajectories."""
    effect = bootstrap(ratio_of_means, without, with_warmup, paired=True)
    unstable = diverged[1] > 0.05 and diverged[0] <= 0.05
    rule = f"reproduced if surely above {MARGIN} or only those without diverge, partly if surely above 1"
    verdict = _grade(unstable or effect[1] > MARGIN, effect[1] > 1)
    return Claim("C5", "dynamics error without a warm-up over that with one", *effect, verdict, rule)


def compounding(model_early, model_late, whole_early, whole_late, steps):
    """C6 from k-step errors [n] of a one-step model's rollouts and of whole trajectories, at the first and the last k."""
    effect = bootstrap(ratio_of_means, model_late, whole_late)
    growth = [bootstrap(ratio_of_means, b, a, paired=True) for a, b in ((model_early, model_late), (whole_early, whole_late))]
    rule = "reproduced if surely above 1 and the one-step model's error grows more, partly if only the latter"
    grows_more = growth[0][1] > growth[1][2]
    verdict = _grade(grows_more and effect[1] > 1, grows_more)
    return Claim(
        "C6", f"error of the one-step model's rollouts over whole trajectories', {steps} steps on", *effect, verdict, rule
    )


def better_guide(guide_returns, data_returns, first, second):
    """C7 from returns [n] of the guide and of the data, and the claims C1 and C2."""
    effect = bootstrap(ratio_of_means, guide_returns, data_returns)
    rule = "the worse verdict of C1 and C2 if the guide surely returns twice the data's, else not testable"
    worse = max(first.verdict, second.verdict, key=VERDICTS.index)
    return Claim("C7", "return of the guide over the data's", *effect, worse if effect[1] > 2 else UNTESTED, rule)


def likely_is_real(losses, errors):
    """C8 from denoising losses [n], the model's own measure of unlikely, and dynamics errors [n] of unguided trajectories."""

    def correlation(a, b):
        return stats.spearmanr(a, b).statistic if a.ndim == 1 else np.array([stats.spearmanr(*p).statistic for p in zip(a, b)])

    effect = bootstrap(correlation, losses, errors, paired=True, resamples=500)
    rule = "reproduced if surely above 0.3, partly if surely above 0"
    return Claim(
        "C8", "rank correlation of denoising loss and dynamics error", *effect, _grade(effect[1] > 0.3, effect[1] > 0), rule
    )


def states_shift(shifted, unguided_to_policy, guided_to_policy):
    """C9 from energy distances (value, p, null quantile): unguided to guided states, and of both to on-policy states."""
    value, p, null = shifted
    closer = guided_to_policy[0] < unguided_to_policy[0]
    rule = "reproduced if above what chance gives and guided states lie closer to on-policy ones, partly if only the former"
    measure = f"energy distance of guided and unguided states, std (chance: up to {null:.3f}; p = {p:.3f})"
    return Claim("C9", measure, value, float("nan"), float("nan"), _grade(p <= 0.05 and closer, p <= 0.05), rule)


def record(claims, dataset, slug, scale):
    """Add `claims` to runs/results/<scale>/claims_<slug>.json; those of the same id are replaced. Returns the path."""
    path = artifacts.root() / "results" / scale / f"claims_{slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with artifacts.lock(path):
        kept = {**load(path), **{c.id: {**asdict(c), "claim": c.text, "dataset": dataset, "scale": scale} for c in claims}}
        with artifacts.replacing(path) as partial:
            rows = {k: _jsonable(kept[k]) for k in sorted(kept)}
            Path(partial).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load(path):
    """What `record` has written: id -> row; nothing if the file is missing."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}


def merged(first, *others):
    """The rows of one dataset, and of the others (in order) the claims that have no verdict before."""
    rows = dict(first)
    for other in others:
        known = {k.split()[0] for k in rows}
        rows.update({k: row for k, row in other.items() if k.split()[0] not in known})
    return rows


def of_scale(scale, slug):
    """All verdicts of a scale, `merged`: those of the dataset `slug` first."""
    paths = sorted((artifacts.root() / "results" / scale).glob("claims_*.json"), key=lambda path: path.stem != f"claims_{slug}")
    return merged({}, *map(load, paths))


def table(rows):
    """The rows as dicts of what is shown, in order; every claim has one, with or without a verdict.

    The first row's dataset is the table's; where a verdict is of another one, its measure says so.
    """
    main = next((row["dataset"] for row in rows.values()), None)
    untested = {k: dict(id=k, claim=v, measure="", verdict="not measured yet") for k, v in CLAIMS.items()}
    found = {k.split()[0] for k in rows}
    every = sorted([*rows.values(), *(row for k, row in untested.items() if k not in found)], key=lambda r: r["id"])
    return [
        {
            "": row["id"].split()[0],
            "claim": row["claim"],
            "measure": row["measure"] + (f", on {row['dataset']}" if row.get("dataset", main) != main else ""),
            "effect": _words(row),
            "verdict": row["verdict"],
        }
        for row in every
    ]


def markdown(rows):
    """`table` as Markdown, under a line that names data and scale."""
    first, columns = next(iter(rows.values())), ("", "claim", "measure", "effect", "verdict")
    lines = [f"On {first['dataset']}, scale `{first['scale']}`; effects with 95% intervals:", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row[c].replace("|", "/") for c in columns) + " |" for row in table(rows)]
    return "\n".join(lines) + "\n"


def effect(claim):
    """The effect of a `Claim` with its interval, as text."""
    return _words(_jsonable(asdict(claim)))


def _words(row):
    effect, low, high = (row.get(k) for k in ("effect", "low", "high"))
    if effect is None:
        return ""
    return f"{effect:.3g}" + ("" if low is None or high is None else f" [{low:.3g}, {high:.3g}]")


def _grade(reproduced, partly):
    return REPRODUCED if reproduced else PARTLY if partly else NOT


def _jsonable(row):
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
