"""Promote a run into the repository: its executed notebooks, cleaned, and its figures. And check what was promoted.

    python tools/promote.py             runs/notebooks/*.ipynb -> notebooks/
    python tools/promote.py --figures   runs/figures/quick/*.png and *.gif, with the CSV of the same name -> figures/;
                                        runs/results/quick/claims_*.json -> figures/claims.json and the README's table
    python tools/promote.py --check     name everything wrong with notebooks/*.ipynb and with that table

A promoted notebook is the committed one with the run's outputs put into its cells, so a run can change nothing else.
Its figures get a palette of at most 256 colours, where that looks the same: they are most of a notebook's bytes.
"""

import argparse
import ast
import base64
import copy
import hashlib
import json
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

from pgdlib.lab import claims

ROOT = Path(__file__).resolve().parent.parent
CLAIMS_BEGIN, CLAIMS_END = "<!-- claims: made by `make figures` -->", "<!-- end of claims -->"
MAX_BYTES = 1_000_000
MAX_FIGURE_BYTES = 2_000_000
MAX_MEAN_OFF, MAX_OFF = 1.0, 24  # of 255: what a palette may change of a channel, over the image and at any pixel
MAX_CELL_LINES = 40
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_REPR = re.compile(r"\w+\(.*\)", re.DOTALL)  # such as VBox(children=...)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
HERE = "|".join(re.escape(str(path)) + r"(?![\w-])" for path in (ROOT, Path.home()) if len(path.parts) > 1)
MACHINE_PATH = re.compile(rf"(?<![\w.~-])(?:{HERE}|/(?:home|root|Users|tmp|mnt)/[\w.-]|[A-Z]:\\Users\\)")


class Refused(Exception):
    """A run that must not be promoted, and why."""


def read(path):
    """The notebook at `path`, multi-line strings joined. Bad JSON and notebooks not of format 4.5 raise ValueError."""
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    if (raw.get("nbformat"), raw.get("nbformat_minor")) != (4, 5):
        raise ValueError("is not of notebook format 4.5")
    ids = [cell.get("id") for cell in raw.get("cells", [])]  # before nbformat.read, which would quietly mend them
    if None in ids or len(set(ids)) < len(ids):
        raise ValueError("has cells without an id of their own")
    try:
        nbformat.validate(raw)
    except nbformat.ValidationError as error:
        raise ValueError(f"is not a valid notebook: {error.message}") from None
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def source_sha256(notebook):
    """The hash of all cell types and sources, in order: outputs and metadata do not count."""
    return hashlib.sha256(json.dumps([(c.cell_type, c.source) for c in notebook.cells]).encode()).hexdigest()


def texts(output):
    """Every text of an output that a reader may see; images are left out."""
    if output.output_type == "stream":
        return [output.text]
    data = output.get("data", {})
    return [v if isinstance(v, str) else json.dumps(v) for k, v in data.items() if not k.startswith("image/") or "svg" in k]


def parameters(notebook):
    """Name -> default of the cell tagged `parameters`. ValueError where papermill would misread it."""
    cells = tagged(notebook, "parameters")
    if len(cells) != 1 or cells[0].cell_type != "code":
        raise ValueError("needs exactly one code cell tagged `parameters`")
    values = {}
    for line in cells[0].source.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line.count("=") != 1:
            raise ValueError(f"parameters cell: papermill needs exactly one `=` on the line {line!r}")
        try:
            (statement,) = ast.parse(line).body
            (target,) = statement.targets
            values[target.id] = ast.literal_eval(statement.value)
        except (SyntaxError, ValueError, AttributeError):
            raise ValueError(f"parameters cell: not `name = literal`: {line!r}") from None
    if values.get("scale") != "quick":
        raise ValueError('parameters cell: needs `scale = "quick"`, the default that `make paper` relies on')
    return values


def without_progress(text):
    """`text` without the lines that a progress bar redrew."""
    return "\n".join(line for line in text.replace("\r\n", "\n").split("\n") if "\r" not in line)


def palette(colours, counts, size=256):
    """At most `size` of the `colours` [n, 3], with `counts` pixels each, and for every colour the index of its nearest."""
    chosen, nearest, distance = [], np.zeros(len(colours), int), np.full(len(colours), 3 * 256**2)
    while distance.any() and len(chosen) < size:
        # The farthest alone would turn pale bands grey, and the commonest alone would lose small marks.
        new = colours[np.argmax(distance * np.sqrt(counts))]
        to_new = ((colours - new) ** 2).sum(axis=1)
        nearest[to_new < distance] = len(chosen)
        distance = np.minimum(distance, to_new)
        chosen.append(new)
    return np.array(chosen), nearest


def smaller_png(text):
    """The PNG in base64 `text`, on white and with a palette, if that looks the same and is smaller. Else `text` itself."""
    try:
        png = base64.b64decode(text)
        image = Image.open(BytesIO(png), formats=["PNG"])
        if image.mode not in ("RGB", "RGBA") or image.is_animated:  # those with a palette were here before
            return text
        rgba = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError):  # not a PNG, or a broken one
        return text
    pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")).reshape(-1, 3)
    _, first, which, counts = np.unique(
        pixels @ np.array([1 << 16, 1 << 8, 1]), return_index=True, return_inverse=True, return_counts=True
    )
    colours = pixels[first].astype(int)
    chosen, nearest = palette(colours, counts)
    off = np.abs(colours - chosen[nearest])
    if off.max() > MAX_OFF or np.average(off, axis=0, weights=counts).max() >= MAX_MEAN_OFF:
        return text
    indexed = Image.fromarray(nearest[which].astype(np.uint8).reshape(image.height, image.width))
    indexed.putpalette(chosen.astype(np.uint8).tobytes())
    new = BytesIO()
    indexed.save(new, "PNG", optimize=True, dpi=image.info.get("dpi"))
    return base64.b64encode(new.getvalue()).decode() if len(new.getvalue()) < len(png) else text


def same_every_run(text):
    """`text` without what differs between equal runs: addresses in memory, and the random id of each of pandas' tables.

    A table's rules of style go by its id, so it gets one from its content.
    """
    text = re.sub(r"<([\w.]+) (?:object )?at 0x[0-9a-f]+>", r"<\1>", text)
    ids = set(re.findall(r'<table id="(T_[0-9a-f]{5})"', text))
    named = re.compile("|".join(ids) or "(?!)")
    content = hashlib.sha256(named.sub("", text).encode()).hexdigest()
    return named.sub(lambda match: f"T_{content[:8]}", text) if len(ids) == 1 else text


def clean_outputs(outputs):
    """What is worth committing of a code cell's outputs: no stderr, no progress bars, no live widgets, no large PNGs."""
    cleaned = []
    for output in copy.deepcopy(outputs):
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if cleaned and cleaned[-1].output_type == "stream":  # two that stderr stood between
                cleaned[-1].text += output.text
                continue
        elif WIDGET_VIEW in output.get("data", {}):
            del output.data[WIDGET_VIEW]
            if not set(output.data) - {"text/plain"}:  # only the widget's repr is left
                continue
            if WIDGET_REPR.fullmatch(output.data.get("text/plain", "").strip()):  # of what is no longer there
                del output.data["text/plain"]
        cleaned.append(output)
    for output in cleaned:
        if output.output_type == "stream":
            output.text = without_progress(output.text)
        elif "data" in output:
            output.data |= {k: same_every_run(v) for k, v in output.data.items() if k in ("text/html", "text/plain")}
            if "image/png" in output.data:
                output.data["image/png"] = smaller_png(output.data["image/png"])
    return [output for output in cleaned if output.output_type != "stream" or output.text]


def promoted(executed, committed):
    """The `committed` notebook with the outputs of the `executed` one, cleaned. Refused unless they belong together."""
    run = executed.metadata.get("papermill", {})
    if run.get("parameters") or tagged(executed, "injected-parameters"):
        raise Refused("ran with injected parameters; only runs at the default parameters are promoted")
    if run.get("exception") or any(o.output_type == "error" for c in code_cells(executed) for o in c.outputs):
        raise Refused("failed")
    if not run.get("end_time"):
        raise Refused("did not run to its end")
    if source_sha256(executed) != source_sha256(committed):
        raise Refused("is stale: its cells differ from the committed notebook's; run `make paper` again")
    result = copy.deepcopy(committed)
    result.metadata = nbformat.from_dict({**METADATA, "pgd": {"source_sha256": source_sha256(committed)}})
    for cell in result.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
    cells = [pair for pair in zip(code_cells(result), code_cells(executed), strict=True) if pair[0].source.strip()]
    for count, (cell, ran) in enumerate(cells, start=1):
        cell.execution_count, cell.outputs = count, clean_outputs(ran.outputs)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    return result


def promote(executed_path, committed_path):
    """Write the run at `executed_path` over the notebook at `committed_path`, or leave that as it is and raise Refused."""
    if not committed_path.exists():
        raise Refused(f"has no counterpart {committed_path.name} in {committed_path.parent.name}/")
    try:
        result = promoted(nbformat.read(executed_path, as_version=4), read(committed_path))
    except ValueError as error:
        raise Refused(str(error)) from None
    new = committed_path.with_suffix(".ipynb.new")
    nbformat.write(result, new)
    wrong = problems(new)
    if wrong:
        new.unlink()
        raise Refused("; ".join(wrong))
    new.replace(committed_path)


def problems(path):
    """Everything wrong with a committed notebook, each as a phrase that follows its name."""
    path, found = Path(path), []
    if path.stat().st_size >= MAX_BYTES:
        found.append(f"has {path.stat().st_size:,} bytes; the limit is {MAX_BYTES:,}")
    try:
        notebook = read(path)
    except ValueError as error:
        return [*found, str(error)]
    try:
        parameters(notebook)
    except ValueError as error:
        found.append(str(error))
    kernel = notebook.metadata.get("kernelspec", {})
    if (kernel.get("name"), kernel.get("language")) != ("python3", "python"):
        found.append("needs the kernel `python3` and its language in its metadata, for papermill")
    if "widgets" in notebook.metadata or "papermill" in notebook.metadata or tagged(notebook, "injected-parameters"):
        found.append("holds what a run left behind (widget state, papermill's metadata or its injected cell)")
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        if cell.cell_type == "code" and len(cell.source.splitlines()) > MAX_CELL_LINES:
            found.append(f"cell {cell.id} has over {MAX_CELL_LINES} lines")
        if any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs):
            found.append(f"cell {cell.id} has an error or stderr output")
        if any(WIDGET_VIEW in o.get("data", {}) for o in outputs):
            found.append(f"cell {cell.id} has a live widget as output")
        for text in [cell.source, *(t for o in outputs for t in texts(o))]:
            if match := MACHINE_PATH.search(text):
                found.append(f"cell {cell.id} holds a path of this machine: ...{text[match.start() : match.end() + 40]!r}")
    if not any(cell.outputs for cell in code_cells(notebook)):
        found.append("has no outputs: run `make paper`, then `make notebooks`")
    elif notebook.metadata.get("pgd", {}).get("source_sha256") != source_sha256(notebook):
        found.append("has outputs of another source: run `make paper`, then `make notebooks`")
    return found


def check():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    found = [f"notebooks/{path.name} {wrong}" for path in notebooks for wrong in problems(path)]
    verdicts = json.loads((ROOT / "figures/claims.json").read_text(encoding="utf-8"))
    if (readme := (ROOT / "README.md").read_text(encoding="utf-8")) != with_claims(readme, verdicts):
        found.append("README.md has another table of claims than figures/claims.json: run `make figures`")
    return found


def promote_notebooks():
    refused, runs = [], sorted((ROOT / "runs/notebooks").glob("*.ipynb"))
    for path in runs:
        try:
            promote(path, ROOT / "notebooks" / path.name)
            print(f"notebooks/{path.name}")
        except Refused as reason:
            refused.append(f"runs/notebooks/{path.name} {reason}")
    return refused if runs else ["runs/notebooks/ holds no notebook: run `make paper` first"]


def promote_figures():
    """Each figure with its data, unless one of its files is too large: then none of them, so that they stay of one run."""
    source, refused = ROOT / "runs/figures/quick", []
    names = sorted({path.stem for suffix in ("png", "gif") for path in source.glob(f"*.{suffix}")})
    (ROOT / "figures").mkdir(exist_ok=True)
    for name in names:
        files = [path for suffix in ("png", "gif", "csv") if (path := source / f"{name}.{suffix}").exists()]
        large = [(path.name, size) for path in files if (size := path.stat().st_size) > MAX_FIGURE_BYTES]
        refused += [f"runs/figures/quick/{n} has {size:,} bytes; the limit is {MAX_FIGURE_BYTES:,}" for n, size in large]
        for path in [] if large else files:
            shutil.copyfile(path, ROOT / "figures" / path.name)
            print(f"figures/{path.name}")
    promote_claims()
    return refused if names else ["runs/figures/quick/ holds no figure: run `make paper` first"]


def promote_claims():
    """The verdicts of the run, dataset -> id -> row, into figures/claims.json and into the README."""
    found = sorted((ROOT / "runs/results/quick").glob("claims_*.json"))
    if not found:
        return
    verdicts = {path.stem.removeprefix("claims_"): claims.load(path) for path in found}
    text = json.dumps(verdicts, indent=1, ensure_ascii=False) + "\n"
    (ROOT / "figures/claims.json").write_text(text, encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_claims(readme.read_text(encoding="utf-8"), verdicts), encoding="utf-8")
    print("figures/claims.json and the table in README.md")


def with_claims(readme, verdicts):
    """The text of the README with the table between its two marks: the dataset with most verdicts, then what others add."""
    before, _, rest = readme.partition(CLAIMS_BEGIN)
    _, _, after = rest.partition(CLAIMS_END)
    if not after:
        raise ValueError(f"README.md has no place for the claims: {CLAIMS_BEGIN} ... {CLAIMS_END}")
    table = claims.markdown(claims.merged(*sorted(verdicts.values(), key=len, reverse=True)))
    return f"{before}{CLAIMS_BEGIN}\n{table}\n{CLAIMS_END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_const", dest="run", const=check)
    mode.add_argument("--figures", action="store_const", dest="run", const=promote_figures)
    errors = (parser.parse_args().run or promote_notebooks)()
    sys.exit("\n".join(errors) or None)


if __name__ == "__main__":
    main()
