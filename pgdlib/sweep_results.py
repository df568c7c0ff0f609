"""What the points of a sweep have measured, in one Parquet file: every row of every table that they wrote.

The columns of a table are as its notebook named them; `p.<name>` are the point's parameters; `run.<name>` say where a row comes
from: its table and its number there, the data, the point's key, seconds, threads, commit and versions.
"""

import json
import re

import numpy as np
import pandas as pd

from pgdlib import store, sweep_plan

SLUG = re.compile(r"_((?:d4rl|standin)-(?:human|cloned|expert))(?=_|$)")  # the data's, in names of files


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
            frame = pd.DataFrame(found)
        yield SLUG.sub("", path.stem), slug and slug[1], frame


def gather(tasks):
    """The frame of the points `tasks`, of those that are done. A point without a table has one row, for its seconds."""
    parts = []
    for task in tasks:
        if (record := task.record) is None:
            continue
        run = {"point": task.key, "notebook": task.source, "seconds": record["seconds"], "threads": record["threads"]}
        run |= {"code": task.identity["code"], **record["versions"]}
        p = {f"p.{k}": v if isinstance(v, str | int | float | None) else json.dumps(v) for k, v in task.settings.items()}
        for name, slug, frame in list(tables(task.folder)) or [(None, None, pd.DataFrame(index=[0]))]:
            own = {f"run.{k}": v for k, v in {"table": name, "row": np.arange(len(frame)), "data": slug, **run}.items()}
            parts.append(frame.assign(**p, **own))
    frame = pd.concat([part.dropna(axis=1, how="all") for part in parts], ignore_index=True) if parts else pd.DataFrame()
    return frame.reindex(columns=sorted(frame, key=lambda name: name.startswith("run.") - name.startswith("p.")))


def write(frame, path):
    """Write the frame whole or not at all. A column of numbers and texts, such as "auto", becomes one of texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mixed = [name for name in frame if pd.api.types.infer_dtype(frame[name], skipna=True).startswith("mixed")]
    frame = frame.assign(**{name: frame[name].map(str, na_action="ignore") for name in mixed})
    with store.replacing(path) as partial:
        frame.to_parquet(partial, index=False)


def newest(scale):
    """The newest file that a sweep at `scale` has written, or None."""
    found = sorted((store.root() / sweep_plan.FOLDER).glob("*.parquet"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((p for p in found if scale in set(pd.read_parquet(p, columns=["p.scale"])["p.scale"])), None)
