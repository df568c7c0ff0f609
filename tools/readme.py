"""The blocks of README.md that no hand writes: each stands between its two marks.

The parameters are made from `pgdlib.lab.settings`, the models and guides from their cards in the package; the others from
files of figures/, so by a run.

`make figures` brings these files from the run: figures/<kind>.json holds, by dataset, what the notebooks have left in
runs/results/quick/<kind>_<dataset>.json:

    claims    id -> row, as `pgdlib.lab.claims.record` writes it, with its trend of runs/results/quick/trends_<dataset>.json
    floors    measure (log_likelihood, normalised, motion, appendix_b) -> [mean, low, high] of real data
    findings  a list of sentences in Markdown with their numbers in them, in the README's order
"""

import json
import re
from decimal import Decimal

import pandas as pd
from scipy import stats

from pgdlib.lab import artifacts, settings, tasks
from pgdlib.lab import claims as verdicts
from pgdlib.lab.models import ASSETS

KINDS = ("claims", "floors", "findings")
BLOCK = re.compile(r"(<!-- (\w+): made by `make figures` -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)
OF_TASK = {
    "floor": "the floor: error of real data / variance",
    "error": "error of unguided samples / variance",
    "motion": "the same, if nothing moved",
}
MEASURES = {
    "log_likelihood": "log-likelihood, nats per action dimension",
    "normalised": "error / variance, state reconstructed",
    "motion": "motion",
    "appendix_b": "error, Appendix B",
}


def gather(results, figures):
    """Write figures/<kind>.json of every kind that the folder `results` has something of."""
    for kind in KINDS:
        found = {p.stem.removeprefix(f"{kind}_"): json.loads(p.read_text("utf-8")) for p in sorted(results.glob(f"{kind}_*"))}
        for slug, rows in found.items() if kind == "claims" else ():
            trends = results / f"trends_{slug}.json"  # of notebook 09
            for name, words in json.loads(trends.read_text("utf-8")).items() if trends.exists() else ():
                rows.get(name, {})["trend"] = words
        if found:
            (figures / f"{kind}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def written(readme, figures):
    """The text `readme` with every block made anew from the folder `figures`. ValueError if its blocks are not all there."""
    found = sorted(name for _, name, *_ in BLOCK.findall(readme))
    if found != sorted(BLOCKS):
        raise ValueError(f"README.md has blocks {found}; it must have each of {sorted(BLOCKS)} once, between its two marks")
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]](figures)}\n\n{match[4]}", readme)


def table(rows):
    """A Markdown table of `rows`, the first of which is its head."""
    head, *rows = [[str(cell).replace("|", "/") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def number(mean, low, high):
    """Three digits, no exponent, with the interval: 0.0175 [0.0164, 0.0187]."""
    words = [f"{Decimal(f'{x:.2e}'):f}" for x in (mean, low, high)]
    return f"{words[0]} [{words[1]}, {words[2]}]".replace("-", "−")


def claims(figures):
    """The verdicts of the dataset with most of them, then what others add."""
    found = sorted(_results(figures, "claims").values(), key=len, reverse=True)
    rows = verdicts.table(verdicts.merged(*found))
    one = next(iter(found[0].values()))
    intro = f"On {one['dataset']}, scale `{one['scale']}`; effects with 95% intervals:\n\n"
    return intro + table([["", *[k for k in rows[0] if k]], *[row.values() for row in rows]])


def by_task(figures):
    """The claims on each task that notebook 07 shows, under the floor and its model's unguided error; of the first seed."""
    runs = pd.read_csv(figures / "07_claims.csv").drop_duplicates(["variant", "id"])
    lines = [["", *(names := runs["variant"].unique())]]
    of_task = runs.groupby("variant", sort=False)[[*OF_TASK]].first()
    lines += [[words, *(f"{v:.2g}" for v in of_task[k])] for k, words in OF_TASK.items()]
    for name, part in runs.groupby("id"):
        cells = dict.fromkeys(names, "")
        for row in part.to_dict("records"):
            cells[row["variant"]] = f"{verdicts.effect(row)}, {row['verdict']}".replace("-", "−")
        lines.append([name, *cells.values()])
    return table(lines)


def guidance(figures):
    """Likelihood and dynamics error of real data, unguided, calibrated, and at the λ that stands for the paper's."""
    (path,) = figures.glob("04_figure1_annealed_*.csv")
    slug = path.stem.removeprefix("04_figure1_annealed_")
    paper, annealed = (pd.read_csv(p, index_col="lam") for p in (figures / f"04_figure1_{slug}.csv", path))
    floors = _results(figures, "floors").get(slug)
    lines = [["real data (the floor)", *(number(*floors[measure]) for measure in MEASURES)]] if floors else []
    for name, row in (
        ("unguided", paper.loc[0]),
        ("the paper's rule, calibrated", _calibrated(paper)),
        ("annealed, calibrated", _calibrated(annealed)),
        ("the paper's rule", paper.loc[1.5]),
    ):
        cells = [number(*(row[f"{measure}.{of}"] for of in ("mean", "low", "high"))) for measure in MEASURES]
        lines.append([f"{name}: λ = {row.name:.3g}", *cells])
    return f"On {slug}; means with 95% intervals:\n\n" + table([["", *MEASURES.values()], *lines])


def _calibrated(sweep):
    """The row of the one λ that was not asked for but found, so that it has more than three digits."""
    (row,) = (row for lam, row in sweep.iterrows() if lam != float(f"{lam:.3g}"))
    return row


def benchmark(figures):
    """Table 1: each row's return, and how much more it is than that of unguided samples."""
    (path,) = figures.glob("05_table1_iql_*-human_*.csv")  # the default run
    runs = pd.read_csv(path)
    returns = runs.pivot(index="seed", columns="row", values="d4rl_return")[runs["row"].unique()]
    unguided = returns["IQL, unguided (λ = 0)"]
    lines = [["", "return", "less unguided"]]
    for row, values in returns.items():
        low, high = stats.ttest_rel(values, unguided).confidence_interval()
        less = f"{(values - unguided).mean():+,.0f} [{low:+,.0f}, {high:+,.0f}]".replace("-", "−")
        lines.append([row, f"{values.mean():,.0f} ± {values.sem():,.0f}", "" if row == unguided.name else less])
    how = f"mean ± standard error over {len(returns)} seeds; differences paired by seed, with 95% t-intervals"
    return f"On {runs['dataset'][0]}; returns on D4RL's scale, {how}:\n\n" + table(lines)


def findings(figures):
    """The sentences of all notebooks, one a bullet."""
    found = [f"* {text}" for texts in _results(figures, "findings").values() for text in texts]
    return "\n".join(found) or "(No run has left its findings yet.)"


def parameters(figures):
    """All parameters with what is allowed, and of those that have them the values of the three scales; of no file."""
    lines = [["name", "what it is", "allowed", *settings.SCALES]]
    lines += [[f"`{name}`", what, _allowed(kind), *[""] * 3] for name, (kind, what) in settings.PARAMETERS.items()]
    for name, (kind, *values, what) in settings.SETTINGS.items():
        lines.append([f"`{name}`", what, _allowed(kind), *(f"{v:,}" if isinstance(v, int) else v for v in values)])
    return table(lines)


def models(figures):
    """The cards of the models that ship; of no file of figures/."""
    lines = [["model", "weights", "training", "hours", "on", "loss, last tenth", "MB"]]
    for path in sorted(ASSETS.glob("*_*.safetensors")):
        tensors, card = artifacts.load(path)
        if "losses" not in tensors:
            continue  # a policy
        losses, recipe = tensors.pop("losses"), card["recipe"]
        weights = sum(t.numel() for name, t in tensors.items() if not name.startswith("normaliser"))
        training = f"{recipe['steps']:,} batches of {recipe['batch_size']}, {card['made']['steps']:,} steps of data"
        last, size = losses[-(len(losses) // 10) :].mean(), path.stat().st_size / 1e6
        hours, loss = f"{card['seconds'] / 3600:.2f}", f"{last:.3g}".replace("-", "−")
        lines.append([f"`{path.stem}`", f"{weights:,}", training, hours, card["machine"], loss, f"{size:.1f}"])
    return table(lines)


def guides(figures):
    """The cards of the policies that ship; of no file of figures/."""
    lines = [["policy", "environment", "steps of PPO", "return, mean action", "return, sampled actions", "score, mean action"]]
    for path in sorted(ASSETS.glob("ppo_*.safetensors")):
        (_, card), task = artifacts.load(path), tasks.by_name(path.stem.split("_")[1])
        found = [card[f"return, {of}"] for of in ("mean action", "sampled action")]
        score, p = task.simulator.score(float(found[0].split()[0])), card["parameters"]
        lines.append([f"`{path.stem}`", task.simulator.name, f"{p.get('ended at', p['steps']):,}", *found, f"{score:.0f}"])
    return table(lines)


def _allowed(kind):
    return kind.__metadata__[-1].replace(f"{2**32 - 1}", "2³² − 1")


def _results(figures, kind):
    path = figures / f"{kind}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


BLOCKS = {block.__name__: block for block in (claims, by_task, guidance, benchmark, findings, parameters, models, guides)}
