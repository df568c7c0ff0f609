"""What the points of a sweep have measured, in one Parquet file: every row of every table that they wrote.

The columns of a table are as its notebook named them; `p.<name>` are the point's parameters; `run.<name>` say where a row comes
from: its table and its number there, the data, the point's key, seconds, threads, commit and versions.
"""

import json
import re

import numpy as np
import pandas as pd
from scipy import stats

from pgdlib.lab import artifacts
from pgdlib.lab.seeds import mean_se, paired_interval
from pgdlib.lab.sweep.plan import FOLDER

SLUG = re.compile(r"_([a-z0-9.]*-[a-z0-9.-]*)(?=_|$)")  # the data's, in names of files: no other part has a hyphen


def tables(folder):
    """(name without the data's, the data's or None, frame) of each CSV and JSON file in figures/ and results/ of a point."""
    for path in sorted([*folder.glob("figures/**/*.csv"), *folder.glob("results/**/*.csv"), *folder.glob("results/**/*.json")]):
        slug = SLUG.search(path.stem)
        if path.suffix == ".csv":
            frame = pd.read_csv(path)
        else:
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):  # name -> row, or one row
                found = list(found.values()) if all(isinstance(v, dict) for v in found.values()) else [found]
            else:  # sentences
                found = {"finding": found}
            frame = pd.DataFrame(found)
        yield SLUG.sub("", path.stem), slug and slug[1], frame


def gather(points):
    """The frame of the points `points`, of those that are done. A point without a table has one row, for its seconds."""
    parts = []
    for point in points:
        if (record := point.record) is None:
            continue
        run = {"point": point.key, "notebook": point.notebook, "seconds": record["seconds"], "threads": record["threads"]}
        run |= {"code": point.identity["code"], **record["versions"]}
        p = {f"p.{k}": v if isinstance(v, str | int | float | None) else json.dumps(v) for k, v in point.settings.items()}
        for name, slug, frame in list(tables(point.folder)) or [(None, None, pd.DataFrame(index=[0]))]:
            own = {f"run.{k}": v for k, v in {"table": name, "row": np.arange(len(frame)), "data": slug, **run}.items()}
            parts.append(frame.assign(**p, **own))
    names = dict.fromkeys(name for part in parts for name in part)
    filled = [part.dropna(axis=1, how="all") for part in parts]  # what is empty has no type
    frame = pd.concat(filled, ignore_index=True) if parts else pd.DataFrame()
    return frame.reindex(columns=sorted(names, key=lambda name: name.startswith("run.") - name.startswith("p.")))


def write(frame, path):
    """Write the frame whole or not at all. A column of numbers and texts, such as "auto", becomes one of texts."""
    mixed = [name for name in frame if pd.api.types.infer_dtype(frame[name], skipna=True).startswith("mixed")]
    frame = frame.assign(**{name: frame[name].map(str, na_action="ignore") for name in mixed})
    with artifacts.replacing(path) as partial:
        frame.to_parquet(partial, index=False)


def read(path, needed, scale, parameter="sweep"):
    """(path, frame) of a file that a sweep has written; "newest" is the last in runs/ at `scale` that has the table `needed`.

    A table's name may go on after `needed`, or one of several. ValueError that names `parameter` if there is no such file.
    """
    wanted = needed if isinstance(needed, str) else " or ".join(needed)
    if path == "newest":
        for found in sorted((artifacts.root() / FOLDER).glob("*.parquet"), key=lambda path: -path.stat().st_mtime):
            frame = pd.read_parquet(found)
            if (_of_table(frame, needed) & (frame["p.scale"] == scale)).any():
                return found, frame
        where = f"runs/ has no sweep at scale {scale!r} with the table {wanted}"
        raise ValueError(f"{parameter}='newest' is not allowed: {where}")
    path = artifacts.given(parameter, path, "a sweep's Parquet file (those that ship are in a checkout's figures/ alone)")
    try:
        frame = pd.read_parquet(path)
        has = ", ".join(sorted(frame["run.table"].dropna().unique()))
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{parameter}={str(path)!r} is not a file that a sweep has written: {e}") from e
    if not _of_table(frame, needed).any():
        raise ValueError(f"{parameter}={str(path)!r} has no table {wanted}; it has {has or 'none'}")
    return path, frame


def table(frame, name, **columns):
    """The rows of the table `name`, of its columns those that are asked for: own name -> the file's, each row once.

    `name` may be the beginning of a name, or of several, so that tables of runs that differ in a parameter are one.
    """
    own = frame.loc[_of_table(frame, name), list(columns.values())]
    return own.set_axis(list(columns), axis=1).drop_duplicates(ignore_index=True)


def _of_table(frame, name):
    return frame["run.table"].astype("string").str.startswith(name, na=False)


def over_seeds(rows, by, measures):
    """A row for each group of the columns `by`: how many "seeds" it has, and mean, low and high over them of the `measures`.

    The intervals are Student's, of 95%, NaN for one seed. Several rows of a seed count as one, their mean.
    """
    each = rows.groupby([*by, "seed"], sort=False)[measures].mean()
    groups = each.groupby(by, sort=False)
    n = groups.size()
    half = groups.std().mul(stats.t.ppf(0.975, n - 1) / np.sqrt(n), axis=0)
    parts = {"mean": groups.mean(), "low": groups.mean() - half, "high": groups.mean() + half}
    columns = {f"{m}.{name}": part[m] for m in measures for name, part in parts.items()}
    return pd.DataFrame({"seeds": n, **columns}).reset_index()


def gains(returns, baseline):
    """How much more each row of Table 1 returns than the row `baseline`: dataset, row, seed, agents, gain, low, high, error.

    returns: a frame with dataset, row, seed (of the run, so of its models), agent (its own seed) and value, NaN where an agent
    diverged. The gain is the mean over a run's agents of the difference to the same agent of the baseline, with the t-interval
    and the standard error that this run alone gives; agents: how many pairs are left. ValueError if runs of one dataset
    and seed differ in something else.
    """
    if len(twice := returns[returns.duplicated(["dataset", "seed", "row", "agent"])]):
        where = " and ".join(f"{name}={twice[name].iloc[0]}" for name in ("dataset", "seed"))
        raise ValueError(f"{where} have several runs; gains are those of one setting")
    found = []
    for (dataset, seed), part in returns.groupby(["dataset", "seed"], sort=False):
        values = part.pivot(index="agent", columns="row", values="value")
        for row in part["row"].unique():
            if row != baseline and baseline in values:
                more = values[row] - values[baseline]
                interval = paired_interval(values[row], values[baseline])
                found.append((dataset, row, seed, more.count(), *interval, mean_se(more)[1]))
    return pd.DataFrame(found, columns=["dataset", "row", "seed", "agents", "gain", "low", "high", "error"])
