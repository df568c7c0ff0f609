"""Promote a run into the repository: its executed notebooks, cleaned, and its figures. And check what was promoted.

python -m tools.promote             runs/notebooks/*.ipynb -> notebooks/
python -m tools.promote --figures   runs/figures/quick/*.png and *.gif, with the CSV of the same name -> figures/;
                                    runs/results/quick/*.json -> figures/; from figures/, the blocks of README.md
python -m tools.promote --check     name everything wrong with notebooks/*.ipynb and with those blocks
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
from papermill.translators import PythonTranslator
from PIL import Image, ImageChops, ImageStat

from tools import readme

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES, MAX_FIGURE_BYTES, MAX_CELL_LINES = 1_000_000, 2_000_000, 40
MAX_MEAN_OFF, MAX_OFF = 1.0, 24  # of 255: what a palette may change of a channel, over the image and at any pixel
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_REPR = re.compile(r"\s*\w+\(.*\)\s*", re.DOTALL)  # such as VBox(children=...)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
HERE = "|".join(re.escape(str(path)) + r"(?![\w-])" for path in (ROOT, Path.home()) if len(path.parts) > 1)
MACHINE_PATH = re.compile(rf"(?<![\w.~-])(?:{HERE}|/(?:home|root|Users|tmp|mnt)/[\w.-]|[A-Z]:\\Users\\)")


def read(path):
    """The notebook at `path`, multi-line strings joined. Bad JSON and what is not of format 4.5 raise ValueError."""
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    ids = {cell.get("id") for cell in raw.get("cells", [])}  # before nbformat.read, which would quietly mend them
    if (raw.get("nbformat"), raw.get("nbformat_minor")) != (4, 5) or None in ids or len(ids) < len(raw["cells"]):
        raise ValueError("is not of notebook format 4.5, each cell with an id of its own")
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


def parameters(notebook):
    """Name -> default of the cell tagged `parameters`. ValueError where papermill would misread it."""
    cells = tagged(notebook, "parameters")
    if [cell.cell_type for cell in cells] != ["code"]:
        raise ValueError("needs exactly one code cell tagged `parameters`")
    try:
        values = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cells[0].source).body}
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError("parameters cell: not every line is `name = literal`") from None
    seen = {p.name: ast.literal_eval(p.default) for p in PythonTranslator.inspect(cells[0])}
    if seen != values:
        raise ValueError(f"parameters cell: papermill, which needs exactly one `=` on a line, sees {seen}")
    if values.get("scale") != "quick":
        raise ValueError('parameters cell: needs `scale = "quick"`, the default that `make paper` relies on')
    return values


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
    seen = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    common = [colour for _, colour in sorted(seen.getcolors(seen.width * seen.height), reverse=True)[:32]]  # stay exact
    indexed = seen.quantize(256 - len(common), Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    colours, index = np.asarray(seen), np.asarray(indexed) + len(common)
    for i, colour in enumerate(common):
        index[(colours == colour).all(-1)] = i
    palette = [channel for colour in common for channel in colour] + indexed.getpalette()
    indexed, new = Image.fromarray(index), BytesIO()
    indexed.putpalette(palette[: 3 * (int(index.max()) + 1)])
    indexed.save(new, "PNG", optimize=True, dpi=image.info.get("dpi"))
    off = ImageStat.Stat(ImageChops.difference(seen, indexed.convert("RGB")))
    same = max(high for _, high in off.extrema) <= MAX_OFF and max(off.mean) < MAX_MEAN_OFF
    return base64.b64encode(new.getvalue()).decode() if same and len(new.getvalue()) < len(png) else text


def same_every_run(text):
    """`text` without what differs between equal runs: addresses in memory, and the random ids of pandas' styled tables."""
    text = re.sub(r"<([\w.]+) (?:object )?at 0x[0-9a-f]+>", r"<\1>", text)
    for name in set(re.findall(r'<table id="(T_[0-9a-f]{5})"', text)):  # its style goes by its id: give it one of its content
        text = text.replace(name, f"T_{hashlib.sha256(text.replace(name, '').encode()).hexdigest()[:8]}")
    return text


def clean_data(data):
    """An output's formats (MIME type -> content), changed to be without a live widget, whose still picture stays."""
    if data.pop(WIDGET_VIEW, None) is not None:
        repr_only = WIDGET_REPR.fullmatch(data.get("text/plain", "")) or set(data) == {"text/plain"}  # of what is gone
        if repr_only:
            data.pop("text/plain", None)
    by_kind = {"text/html": same_every_run, "text/plain": same_every_run, "image/png": smaller_png}
    data.update({kind: by_kind[kind](content) for kind, content in data.items() if kind in by_kind})
    return data


def clean_outputs(outputs):
    """What is worth committing of a code cell's outputs: no stderr, no progress bars, no live widgets, no large PNGs."""
    cleaned = []
    for output in outputs:
        if output.output_type != "stream":
            if clean_data(output.data):
                cleaned.append(output)
        elif output.name == "stdout":
            if cleaned and cleaned[-1].output_type == "stream":  # two that stderr stood between
                output.text = cleaned.pop().text + output.text
            cleaned.append(output)
    for output in [output for output in cleaned if output.output_type == "stream"]:
        lines = output.text.replace("\r\n", "\n").split("\n")  # nbconvert's own would leave a bar's last state
        output.text = "\n".join(line for line in lines if "\r" not in line)
    return [output for output in cleaned if output.get("text", True)]


def promote(executed_path, committed_path):
    """Write the run at `executed_path`, cleaned, over the notebook of that source at `committed_path`; or ValueError."""
    notebook = nbformat.read(executed_path, as_version=4)
    run = notebook.metadata.get("papermill", {})
    if run.get("parameters") or tagged(notebook, "injected-parameters"):
        raise ValueError("ran with injected parameters; only runs at the default parameters are promoted")
    if run.get("exception") or any(o.output_type == "error" for c in code_cells(notebook) for o in c.outputs):
        raise ValueError("failed")
    if not run.get("end_time"):
        raise ValueError("did not run to its end")
    if not committed_path.exists() or source_sha256(notebook) != source_sha256(read(committed_path)):
        raise ValueError(f"is stale: its cells are not those of notebooks/{committed_path.name}; run `make paper` again")
    notebook.metadata = nbformat.from_dict({**METADATA, "pgd": {"source_sha256": source_sha256(notebook)}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
    for cell in code_cells(notebook):
        cell.outputs = clean_outputs(cell.outputs)
    new = committed_path.with_suffix(".ipynb.new")
    nbformat.write(notebook, new)
    wrong = problems(new)
    new.unlink() if wrong else new.replace(committed_path)
    if wrong:
        raise ValueError("; ".join(wrong))


def problems(path):
    """Everything wrong with a committed notebook, each as a phrase that follows its name."""
    try:
        notebook = read(path)
        parameters(notebook)
    except ValueError as error:
        return [str(error)]
    size, metadata = Path(path).stat().st_size, notebook.metadata
    kernel, outputs = metadata.get("kernelspec", {}), any(cell.outputs for cell in code_cells(notebook))
    left = "widgets" in metadata or "papermill" in metadata or tagged(notebook, "injected-parameters")
    current = metadata.get("pgd", {}).get("source_sha256") == source_sha256(notebook)
    checks = {
        f"has {size:,} bytes; the limit is {MAX_BYTES:,}": size >= MAX_BYTES,
        "needs the kernel `python3` and its language in its metadata": kernel != METADATA["kernelspec"],
        "holds what a run left behind (widget state, papermill's metadata or its injected cell)": left,
        "has no outputs: run `make paper`, then `make notebooks`": not outputs,
        "has outputs of another source: run `make paper`, then `make notebooks`": outputs and not current,
    }
    return [phrase for phrase, wrong in checks.items() if wrong] + [p for cell in notebook.cells for p in cell_problems(cell)]


def cell_problems(cell):
    """The same for one cell. All that a reader may see of its outputs is searched for paths, but for images of pixels."""
    data = [(kind, content) for output in cell.get("outputs", []) for kind, content in output.get("data", {}).items()]
    texts = [output.get("text", "") for output in cell.get("outputs", [])]
    texts += [c if isinstance(c, str) else json.dumps(c) for kind, c in data if "image/" not in kind or "svg" in kind]
    path = next(filter(None, map(MACHINE_PATH.search, [cell.source, *texts])), None)
    bad = any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.get("outputs", []))
    checks = {
        f"over {MAX_CELL_LINES} lines": cell.cell_type == "code" and len(cell.source.splitlines()) > MAX_CELL_LINES,
        "an error or stderr output": bad,
        "a live widget as output": WIDGET_VIEW in dict(data),
        f"a path of this machine: {path and path.string[path.start() : path.end() + 40]!r}": path,
    }
    return [f"cell {cell.id} has {phrase}" for phrase, wrong in checks.items() if wrong]


def check():
    found = [f"notebooks/{p.name} {wrong}" for p in sorted((ROOT / "notebooks").glob("*.ipynb")) for wrong in problems(p)]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stale = readme.written(text, ROOT / "figures") != text
    return found + ["README.md has blocks that are not those of figures/: run `make figures`"] * stale


def promote_notebooks():
    refused, runs = [], sorted((ROOT / "runs/notebooks").glob("*.ipynb"))
    for path in runs:
        try:
            promote(path, ROOT / "notebooks" / path.name)
            print(f"notebooks/{path.name}")
        except ValueError as reason:
            refused.append(f"runs/notebooks/{path.name} {reason}")
    return refused if runs else ["runs/notebooks/ holds no notebook: run `make paper` first"]


def promote_figures():
    """Each figure with its data, unless one of its files is too large: then none of them, so that they stay of one run."""
    source, target, refused = ROOT / "runs/figures/quick", ROOT / "figures", []
    names = sorted({path.stem for path in source.glob("*") if path.suffix in (".png", ".gif")})
    target.mkdir(exist_ok=True)
    for name in names:
        files = [path for suffix in ("png", "gif", "csv") if (path := source / f"{name}.{suffix}").exists()]
        large = [(path.name, size) for path in files if (size := path.stat().st_size) > MAX_FIGURE_BYTES]
        refused += [f"runs/figures/quick/{n} has {size:,} bytes; the limit is {MAX_FIGURE_BYTES:,}" for n, size in large]
        for path in [] if large else files:
            print(shutil.copyfile(path, target / path.name).relative_to(ROOT))
    readme.gather(ROOT / "runs/results/quick", target)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (ROOT / "README.md").write_text(readme.written(text, target), encoding="utf-8")
    return refused if names else ["runs/figures/quick/ holds no figure: run `make paper` first"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_const", dest="run", const=check)
    mode.add_argument("--figures", action="store_const", dest="run", const=promote_figures)
    sys.exit("\n".join((parser.parse_args().run or promote_notebooks)()) or None)


if __name__ == "__main__":
    main()
