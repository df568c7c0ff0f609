"""The paper's claims: what is measured for each, the effect with its interval, and the verdict, by rules that stand here."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from IPython.display import Markdown
from scipy import stats

from pgdlib.lab import artifacts
from pgdlib.lab.seeds import PAPER_GAINS, paired_interval
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
    "C10": "Guidance reduces the need for conservatism",
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


def _judged(id, measure, rule, effect, reproduced, partly, testable=True):
    """The `Claim` with the verdict that follows; effect: (value, low, high)."""
    verdict = UNTESTED if not testable else REPRODUCED if reproduced else PARTLY if partly else NOT
    return Claim(id.strip(), measure, *effect, verdict, rule)


def likelihood_raised(unguided, guided, on_policy):
    """C1 from log-likelihoods [n] at λ = 0 and at the tuned λ, from the same noise."""
    closed = bootstrap(lambda u, g: (g - u).mean(-1) / (on_policy - u.mean(-1)), unguided, guided, paired=True)
    gap = bootstrap(lambda u, g: on_policy - u.mean(-1), unguided, guided, paired=True)
    measure = "share of the gap from unguided to on-policy log-likelihood that is closed"
    rule = "reproduced if at least half of the gap is closed, partly if any; not testable unless there surely is a gap"
    return _judged("C1", measure, rule, closed, closed[1] >= 0.5, closed[1] > 0, gap[1] > 0)


def error_not_raised(unguided, guided, which):
    """C2 from dynamics errors [n] at λ = 0 and at the tuned λ, from the same noise; `which` rule and estimator, in words."""
    ratio = bootstrap(ratio_of_means, guided, unguided, paired=True)
    measure = f"dynamics error at the tuned λ over that at λ = 0 ({which})"
    rule = f"reproduced if surely below {MARGIN}, partly if it may be; not testable where the tuned λ is 0"
    is_guided = not np.array_equal(unguided, guided)
    return _judged(f"C2 {which}", measure, rule, ratio, ratio[2] <= MARGIN, ratio[1] <= MARGIN, is_guided)


def threshold(lams, likelihoods, errors, diverged):
    """C3 from a sweep: λ rising [L], log-likelihoods and errors, a list of [n] for each λ, shares of diverged trajectories [L].

    The effect is the middle of the last λ before the collapse and the first after it, its interval these two. Collapsed is a
    λ at which the likelihood lies surely below the best, and half the trajectories have diverged or the error has doubled.
    """
    best = int(np.nanargmax([np.mean(v) for v in likelihoods]))

    def collapsed(i):
        falls = interval(likelihoods[i])[2] < interval(likelihoods[best])[1]
        with np.errstate(invalid="ignore"):
            shoots = not np.isfinite(errors[i]).any() or np.nanmean(errors[i]) > 2 * np.nanmean(errors[best])
        return falls and (shoots or diverged[i] >= 0.5)

    first = next((i for i in range(best + 1, len(lams)) if collapsed(i)), None)
    low, high = (lams[-1], math.nan) if first is None else map(float, lams[first - 1 : first + 1])
    measure = "λ of the paper's rule between the last that works and the first that does not"
    rule = "reproduced if the collapse lies between 1.5 and 3, partly if elsewhere"
    return _judged("C3", measure, rule, ((low + high) / 2, low, high), low >= 1.5 and high <= 3, first is not None)


def returns_raised(returns, which="", unit="seeds"):
    """C4 from returns on D4RL's scale, dataset -> (unguided [S], guided [S]), and `which` guidance, in words.

    Returns are paired by seed, or by another `unit`, NaN where one diverged. The effect is the mean over the datasets of the
    mean gain. With few seeds its interval holds zero whether the claim is true or not, so this alone is no failure: what is not
    surely above zero fails if the paper's own gain on these datasets lies above the interval, too, and is undecided if not.
    ValueError if there is no dataset, or one that is not in Table 1.
    """
    if not returns or (unknown := set(returns) - set(PAPER_GAINS)):
        found = ", ".join(sorted(unknown)) if returns else "none"
        raise ValueError(f"the datasets of C4 must be one or more of {', '.join(PAPER_GAINS)}; got {found}")
    unguided, guided = map(list, zip(*returns.values()))
    gain, paper = paired_interval(guided, unguided), np.mean([PAPER_GAINS[name] for name in returns])
    shown, flawed = [], False
    for name, pair in returns.items():
        mean, _, high = paired_interval(pair[1], pair[0])
        kept, seeds = int(np.isfinite(pair).all(0).sum()), len(pair[0])
        shown.append(f"{name} {mean:+.0f}, {kept}{f' of {seeds}' * (kept < seeds)} {unit}")
        flawed |= kept < seeds or high < 0
    words = f"{which}, {'; '.join(shown)}" if which else "; ".join(shown)
    measure = f"mean gain in return, guided less unguided, D4RL's scale ({words}; the paper's {paper:+.0f})"
    rule = "reproduced if surely above zero, partly if a dataset surely loses or a seed diverged; "
    rule += f"not testable with so few {unit} if the interval holds both zero and the paper's gain"
    undecided = np.isnan(gain[1]) or gain[1] <= 0 < paper <= gain[2]
    return _judged(f"C4 {which}", measure, rule, gain, gain[1] > 0 and not flawed, gain[1] > 0, not undecided)


def warmup_cures(with_warmup, without, diverged):
    """C5 from dynamics errors [n] at one λ with and without a warm-up, and (with, without) shares of diverged trajectories."""
    ratio = bootstrap(ratio_of_means, without, with_warmup, paired=True)
    unstable = diverged[1] > 0.05 and diverged[0] <= 0.05
    measure = "dynamics error without a warm-up over that with one"
    rule = f"reproduced if surely above {MARGIN} or only those without diverge, partly if surely above 1"
    return _judged("C5", measure, rule, ratio, unstable or ratio[1] > MARGIN, ratio[1] > 1)


def compounding(model_early, model_late, whole_early, whole_late, steps):
    """C6 from k-step errors [n] of a one-step model's rollouts and of whole trajectories, at the first and the last k."""
    ratio = bootstrap(ratio_of_means, model_late, whole_late)
    model = bootstrap(ratio_of_means, model_late, model_early, paired=True)
    whole = bootstrap(ratio_of_means, whole_late, whole_early, paired=True)
    grows_more = model[1] > whole[2]
    measure = f"error of the one-step model's rollouts over whole trajectories', {steps} steps on"
    rule = "reproduced if surely above 1 and the one-step model's error grows more, partly if only the latter"
    return _judged("C6", measure, rule, ratio, grows_more and ratio[1] > 1, grows_more)


def better_guide(guide_returns, data_returns, first, second):
    """C7 from returns [n] of the guide and of the data, and the claims C1 and C2."""
    ratio = bootstrap(ratio_of_means, guide_returns, data_returns)
    worse = max(first.verdict, second.verdict, key=VERDICTS.index)
    measure = "return of the guide over the data's"
    rule = "the worse verdict of C1 and C2 if the guide surely returns twice the data's, else not testable"
    return _judged("C7", measure, rule, ratio, worse == REPRODUCED, worse == PARTLY, ratio[1] > 2 and worse != UNTESTED)


def likely_is_real(losses, errors):
    """C8 from denoising losses [n], the model's own measure of unlikely, and dynamics errors [n] of unguided trajectories."""

    def correlation(a, b):
        return stats.pearsonr(stats.rankdata(a, axis=-1), stats.rankdata(b, axis=-1), axis=-1).statistic

    ranked = np.isfinite(np.multiply(losses, errors)).sum() > 1  # one trajectory has no correlation
    found = bootstrap(correlation, losses, errors, paired=True, resamples=500) if ranked else (math.nan,) * 3
    measure = "rank correlation of denoising loss and dynamics error"
    rule = "reproduced if surely above 0.3, partly if surely above 0"
    return _judged("C8", measure, rule, found, found[1] > 0.3, found[1] > 0)


def states_shift(shifted, unguided_to_policy, guided_to_policy):
    """C9 from energy distances (value, p, null quantile): unguided to guided states, and of both to on-policy states."""
    value, p, null = shifted
    closer = guided_to_policy[0] < unguided_to_policy[0]
    measure = f"energy distance of guided and unguided states, std (chance: up to {null:.3f}; p = {p:.3f})"
    rule = "reproduced if above what chance gives and guided states lie closer to on-policy ones, partly if only the former"
    return _judged("C9", measure, rule, (value, math.nan, math.nan), p <= 0.05 and closer, p <= 0.05)


def less_conservatism(returns, weights):
    """C10 from returns, agent -> (unguided, guided), [C, S] each: of S seeds at `weights` [C] of what holds it to the data.

    The best weight has the highest mean return. The effect is by how many powers of two guidance lowers it (then below zero),
    the mean over agents. An agent loses if its returns, paired by seed, are surely lower with guidance, each at its own best
    weight: then guidance costs it return, whatever the weight. A run that diverged, NaN, counts as its agent's worst.
    """
    best = np.log2(weights)
    agents = [np.where(np.isnan(pair), np.nanmin(pair), pair) for pair in map(np.asarray, returns.values())]  # [2, C, S]
    loses = any(paired_interval(*(of[of.mean(-1).argmax()] for of in pair[::-1]))[2] < 0 for pair in agents)

    def change(*cells):
        means = np.stack([v.mean(-1) for v in cells], -1)
        unguided, guided = np.moveaxis(best[means.reshape(*means.shape[:-1], -1, 2, len(best)).argmax(-1)], -1, 0)
        return (guided - unguided).mean(-1)

    found = bootstrap(change, *(cell for pair in agents for cell in pair.reshape(-1, pair.shape[-1])), paired=True)
    measure = f"powers of two by which the best weight on staying near the data changes ({', '.join(returns)})"
    rule = "reproduced if surely below zero, partly if surely not above, or an agent loses; not testable if it may be either"
    return _judged("C10", measure, rule, found, found[2] < 0 and not loses, found[0] < 0, not found[1] < 0 < found[2])


def record(claims, dataset, slug, scale):
    """Add `claims` to runs/results/<scale>/claims_<slug>.json; those of the same id are replaced. Returns the path."""
    path = artifacts.root() / "results" / scale / f"claims_{slug}.json"
    with artifacts.lock(path):
        new = {c.id: asdict(c) | dict(claim=CLAIMS[c.id.split()[0]], dataset=dataset, scale=scale) for c in claims}
        _write(path, dict(sorted({**load(path), **new}.items())))
    return path


def load(path):
    """What `record` has written: id -> row; nothing if the file is missing."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}


def note(name, sentences, slug, scale):
    """Findings in words, computed by a cell: kept in runs/results/<scale>/findings_<name>_<slug>.json, returned to be shown."""
    _write(artifacts.root() / "results" / scale / f"findings_{name}_{slug}.json", list(sentences))
    return Markdown("\n".join(f"* {sentence}" for sentence in sentences))


def keep(name, values, scale):
    """Write plain values to runs/results/<scale>/<name>.json."""
    _write(artifacts.root() / "results" / scale / f"{name}.json", values)


def merged(first, *others):
    """The rows of one dataset, and of the others (in order) those of ids that none before has."""
    rows = dict(first)
    for other in others:
        rows.update({k: row for k, row in other.items() if k not in rows})
    return rows


def of_scale(scale, slug):
    """All verdicts of a scale, `merged`: those of the dataset `slug` first."""
    paths = sorted((artifacts.root() / "results" / scale).glob("claims_*.json"), key=lambda path: path.stem != f"claims_{slug}")
    return merged({}, *map(load, paths))


def table(rows):
    """The rows as dicts of what is shown, in order; every claim has one, with or without a verdict.

    The first row's dataset is the table's; where a verdict is of another one, its measure says so. A row's "trend" is what its
    effect gains each time the error of the diffusion model halves, in words.
    """
    main = next((row["dataset"] for row in rows.values()), None)
    found = {k.split()[0] for k in rows}
    untested = [dict(id=k, claim=v, measure="", verdict="not measured yet") for k, v in CLAIMS.items() if k not in found]
    with_trend = any("trend" in row for row in rows.values())
    return [
        {
            "": row["id"].split()[0],
            "claim": row["claim"],
            "measure": row["measure"] + (f", on {row['dataset']}" if row.get("dataset", main) != main else ""),
            "effect": effect(row),
            "verdict": row["verdict"],
            **({"each time the model's error halves": row.get("trend", "")} if with_trend else {}),
        }
        for row in sorted([*rows.values(), *untested], key=lambda row: (int(row["id"].split()[0][1:]), row["id"]))
    ]


def effect(claim):
    """The effect of a `Claim`, or of its row, with its interval, as text; nothing if there is none."""
    row = claim if isinstance(claim, dict) else asdict(claim)
    value, low, high = (math.nan if row.get(k) is None else row[k] for k in ("effect", "low", "high"))
    if not math.isfinite(value):
        return ""
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if math.isfinite(low) and math.isfinite(high) else "")


def _write(path, values):
    """Write plain values as JSON, in which a number that is not finite is null."""
    values = json.loads(json.dumps(values), parse_constant=lambda word: None)
    with artifacts.replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
