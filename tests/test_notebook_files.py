"""The committed notebooks are well formed, clean, and carry the outputs of their own source. Nothing is executed here,
except a toy notebook that shows that what papermill really writes is promoted as it should be."""

import base64
import importlib
import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from pgdlib.lab import claims
from tools import promote

NOTEBOOKS = sorted((promote.ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = '# lam = 1 is an example\nscale = "quick"  # ci, quick or paper\nlam = 2.0\nguide = None'


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebook_is_clean_and_current(path):
    assert promote.problems(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_sees_every_parameter(path):
    assert set(papermill.inspect_notebook(path)) == set(promote.parameters(promote.read(path)))


# The rules themselves, on a toy notebook


def toy(**sources):
    """A notebook as a person would commit it, without outputs. `sources` replaces the source of a cell by its id."""
    cells = [
        new_markdown_cell("# A toy", id="title"),
        new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell("print(lam)", id="body", metadata={"execution": {"iopub.execute_input": "2026-01-01T00:00:00Z"}}),
    ]
    for cell in cells:
        cell.source = sources.get(cell.id, cell.source)
    return new_notebook(cells=cells, metadata={"kernelspec": promote.METADATA["kernelspec"]})


def executed(notebook, *outputs):
    """`notebook` as papermill leaves it, its last cell having made `outputs` (by default, one printed line)."""
    run = nbformat.from_dict(json.loads(nbformat.writes(notebook)))
    run.metadata["papermill"] = {"parameters": {}, "exception": None, "end_time": "2026-01-01T00:00:01Z", "duration": 1.0}
    run.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    run.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
    for cell in run.cells:
        cell.metadata["papermill"] = {"duration": 0.1, "status": "completed"}
        cell.metadata.setdefault("tags", [])
    run.cells[-1].execution_count = 7
    run.cells[-1].outputs = list(outputs) or [stream("2.0\n")]
    return run


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def write(folder, notebook):
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "toy.ipynb")
    return folder / "toy.ipynb"


def promote_toy(tmp_path, run, source=None):
    """The promoted notebook, read back, and its path."""
    path = write(tmp_path / "notebooks", source or toy())
    promote.promote(write(tmp_path / "runs", run), path)
    return promote.read(path), path


def test_promoted_notebook_has_no_problems_and_nothing_of_the_run_but_its_outputs(tmp_path):
    notebook, path = promote_toy(tmp_path, executed(toy()))
    assert promote.problems(path) == []
    assert [(c.id, c.source) for c in notebook.cells] == [(c.id, c.source) for c in toy().cells]
    assert [dict(c.metadata) for c in notebook.cells] == [{}, {"tags": ["parameters"]}, {}]
    assert set(notebook.metadata) == {"kernelspec", "language_info", "pgd"}
    assert [c.execution_count for c in notebook.cells[1:]] == [1, 2]
    assert notebook.cells[-1].outputs == [stream("2.0\n")]


def test_promoting_twice_changes_nothing(tmp_path):
    _, path = promote_toy(tmp_path, executed(toy()))
    first = path.read_bytes()
    promote.promote(tmp_path / "runs/toy.ipynb", path)
    assert path.read_bytes() == first


def test_stderr_progress_bars_and_live_widgets_are_stripped(tmp_path):
    figure = {"image/png": "aGVsbG8=", "text/plain": "<Figure>"}
    run = executed(
        toy(),
        stream("before\n"),
        stream("a warning\n", "stderr"),
        stream(" 10%\r 50%\r100%\nafter\n"),
        new_output("display_data", {promote.WIDGET_VIEW: {"model_id": "1"}, "text/plain": "FloatSlider(value=2.0)"}),
        new_output("display_data", {promote.WIDGET_VIEW: {"model_id": "2"}, **figure}),
        new_output("execute_result", {"text/plain": "42"}, execution_count=7),
    )
    notebook, path = promote_toy(tmp_path, run)
    assert promote.problems(path) == []
    assert notebook.cells[-1].outputs == [
        stream("before\nafter\n"),
        new_output("display_data", figure),
        new_output("execute_result", {"text/plain": "42"}, execution_count=2),
    ]


def red_png():
    """A figure as matplotlib makes them, with four bytes a pixel, all red."""
    file = BytesIO()
    Image.new("RGBA", (300, 200), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("lines", [str, lambda text: re.findall(".{1,76}\n?", text)], ids=["one string", "a list of lines"])
@pytest.mark.parametrize("breaks", [False, True])
def test_figures_get_a_palette(tmp_path, breaks, lines):
    text = base64.encodebytes(base64.b64decode(red_png())).decode() if breaks else red_png()
    run = write(tmp_path / "runs", executed(toy(), new_output("display_data", {"image/png": ""})))
    raw = json.loads(run.read_text())
    raw["cells"][-1]["outputs"][0]["data"]["image/png"] = lines(text)
    run.write_text(json.dumps(raw))
    path = write(tmp_path / "notebooks", toy())
    promote.promote(run, path)
    (output,) = json.loads(path.read_text())["cells"][-1]["outputs"]
    image = Image.open(BytesIO(base64.b64decode(output["data"]["image/png"])))
    assert image.mode == "P" and image.size == (300, 200) and len(output["data"]["image/png"]) < len(red_png())
    assert image.convert("RGB").getcolors() == [(300 * 200, (255, 0, 0))]


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("VBox(children=(FloatSlider(value=2.0), Output()))", False),
        ("interactive(children=(FloatSlider(value=2.0),\n Output()), _dom_classes=('widget-interact',))\n", False),
        ("<Figure size 640x480 with 1 Axes>", True),
        ("What the slider (run the notebook to move it) shows at 2", True),
        (None, False),
    ],
)
@pytest.mark.parametrize("kind", ["display_data", "execute_result"])
def test_the_still_picture_of_a_widget_is_kept_without_the_widget(tmp_path, text, stays, kind):
    data = {promote.WIDGET_VIEW: {"model_id": "1"}, "image/png": red_png(), **({"text/plain": text} if text else {})}
    count = {"execution_count": 7} if kind == "execute_result" else {}
    notebook, path = promote_toy(tmp_path, executed(toy(), new_output(kind, data, **count)))  # reads it back, so it is valid
    (output,) = notebook.cells[-1].outputs
    kept = {"image/png": promote.smaller_png(red_png()), **({"text/plain": text} if stays else {})}
    assert (output.output_type, output.data) == (kind, kept)
    assert promote.problems(path) == []


def test_the_repr_of_what_is_no_widget_is_kept():
    outputs = [new_output("execute_result", {"text/plain": "Point(x=1)", "image/png": "aGVsbG8="}, execution_count=7)]
    assert promote.clean_outputs(outputs) == outputs


def test_tables_of_equal_runs_are_equal():
    def ran(value):
        style = pd.DataFrame({"x": [value, 2.0]}).style.highlight_max(color="red")
        data = {"text/html": style.to_html(), "text/plain": repr(style)}
        (output,) = promote.clean_outputs([new_output("display_data", data)])
        return data, output.data

    (raw, one), (raw_2, two), (_, other) = ran(1.0), ran(1.0), ran(1.5)
    assert raw != raw_2 and one == two and one != other
    assert one["text/plain"] == "<pandas.io.formats.style.Styler>"
    (name,) = set(re.findall(r"T_[0-9a-f]+", one["text/html"]))
    assert f"#{name}_row1_col0" in one["text/html"] and f'id="{name}_row1_col0"' in one["text/html"]  # the style finds its cell
    assert name not in other["text/html"]


def test_the_still_picture_of_a_widget_is_what_a_renderer_without_a_kernel_shows(tmp_path):
    data = {promote.WIDGET_VIEW: {"model_id": "1"}, "image/png": red_png(), "text/plain": "VBox(children=())"}
    notebook, path = promote_toy(tmp_path, executed(toy(), new_output("display_data", data)))
    nbconvert = importlib.import_module("nbconvert")  # JupyterLab's
    page, _ = nbconvert.HTMLExporter(template_name="basic").from_filename(str(path))
    (shown,) = re.findall(r'<img[^>]* src="data:image/png;base64,\s*([^"]+)"', page)
    assert shown.strip() == notebook.cells[-1].outputs[0].data["image/png"]
    assert "VBox" not in page and "model_id" not in page


def injected(run):
    run.cells.insert(2, new_code_cell("lam = 3.0", id="injected", metadata={"tags": ["injected-parameters"]}))


def failed(run):
    run.cells[-1].outputs = [new_output("error", ename="ValueError", evalue="lam", traceback=[])]


REFUSALS = {
    "injected parameters": injected,
    "failed": failed,
    "did not run to its end": lambda run: run.metadata.papermill.update(end_time=None),
    "is stale": lambda run: run.cells[-1].update(source="print(lam + 1)"),
    "path of this machine": lambda run: run.cells[-1].update(outputs=[stream(f"saved {promote.ROOT}/runs/x.npz\n")]),
    "limit is 1,000,000": lambda run: run.cells[-1].update(outputs=[new_output("display_data", {"image/png": "A" * 10**6})]),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_promotion_is_refused_and_leaves_the_committed_notebook_as_it_was(tmp_path, reason):
    path, run = write(tmp_path / "notebooks", toy()), executed(toy())
    before = path.read_bytes()
    REFUSALS[reason](run)
    with pytest.raises(promote.Refused, match=reason):
        promote.promote(write(tmp_path / "runs", run), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_promotion_without_a_committed_notebook_is_refused(tmp_path):
    run = write(tmp_path / "runs", executed(toy()))
    with pytest.raises(promote.Refused, match="has no counterpart"):
        promote.promote(run, tmp_path / "notebooks" / "toy.ipynb")


def test_outputs_of_another_source_and_missing_outputs_are_found(tmp_path):
    notebook, path = promote_toy(tmp_path, executed(toy()))
    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, path)
    assert any("outputs of another source" in wrong for wrong in promote.problems(path))
    (wrong,) = promote.problems(write(tmp_path / "bare", toy()))
    assert "make notebooks" in wrong


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "place", ["/home/someone/x", "/root/x", "/Users/someone/x", "/tmp/x", r"C:\Users\someone", str(Path.home())]
)
def test_paths_of_a_machine_are_found_in_outputs_and_sources(tmp_path, place, name):
    for notebook in (executed(toy(), stream(f"saved to {place}\n", name)), toy(title=f"See {place}")):
        found = promote.problems(write(tmp_path, notebook))
        assert any("path of this machine" in wrong for wrong in found), found


@pytest.mark.parametrize("text", ["https://example.org/home/x", "runs/tmp/x.npz", "a/root/b", "../home/x", "~/tmp/x", "1/2"])
def test_other_slashes_are_not_paths_of_a_machine(text):
    assert not promote.MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (PARAMETERS + "\nseed = 1  # not = 0", "exactly one `=`"),
        (PARAMETERS + '\nname = "a=b"', "exactly one `=`"),
        (PARAMETERS + "\nhalf = lam / 2", "not `name = literal`"),
        (PARAMETERS + "\nprint(lam)", "exactly one `=`"),
        (PARAMETERS.replace("quick", "ci"), 'needs `scale = "quick"`'),
    ],
)
def test_parameters_that_papermill_would_misread_are_found(tmp_path, source, reason):
    assert any(reason in wrong for wrong in promote.problems(write(tmp_path, toy(parameters=source))))


def test_parameters_are_those_that_papermill_sees(tmp_path):
    path = write(tmp_path, toy())
    assert promote.parameters(promote.read(path)) == {"scale": "quick", "lam": 2.0, "guide": None}
    assert set(papermill.inspect_notebook(path)) == {"scale", "lam", "guide"}


def without_id(raw):
    del raw["cells"][0]["id"]


MALFORMED = {
    "not of notebook format 4.5": lambda raw: raw.update(nbformat_minor=4),
    "not a valid notebook": lambda raw: raw["cells"][0].update(cell_type="prose"),
    "without an id": without_id,
    "an id of their own": lambda raw: raw["cells"][0].update(id="body"),
    "exactly one code cell tagged": lambda raw: raw["cells"][1].update(metadata={}),
    "over 40 lines": lambda raw: raw["cells"][2].update(source="lam\n" * 41),
    "error or stderr": lambda raw: raw["cells"][2].update(outputs=[stream("", "stderr")]),
    "a live widget": lambda raw: raw["cells"][2].update(outputs=[new_output("display_data", {promote.WIDGET_VIEW: {}})]),
    "needs the kernel": lambda raw: raw["metadata"].pop("kernelspec"),
    "what a run left behind": lambda raw: raw["metadata"].update(papermill={}),
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_notebooks_are_found(tmp_path, reason):
    path = write(tmp_path, toy())
    raw = json.loads(path.read_text())
    MALFORMED[reason](raw)
    path.write_text(json.dumps(raw))
    assert any(reason in wrong for wrong in promote.problems(path))


@pytest.mark.notebook
def test_what_papermill_writes_is_promoted(tmp_path):
    body = """import sys
from ipywidgets import FloatSlider
from matplotlib import pyplot as plt
from tqdm.auto import tqdm
print("noise", file=sys.stderr)
for _ in tqdm(range(3), file=sys.stdout): pass
display(FloatSlider(2.0))
print(scale, lam)
plt.plot([0, lam]);"""
    source = write(tmp_path / "notebooks", toy(body=body))
    (tmp_path / "runs").mkdir()

    def papermill_run(*arguments):
        command = [sys.executable, "-m", "papermill", "-k", "python3", *arguments, source, tmp_path / "runs/toy.ipynb"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    papermill_run()
    promote.promote(tmp_path / "runs/toy.ipynb", source)
    assert promote.problems(source) == []
    printed, figure = promote.read(source).cells[-1].outputs
    assert printed == stream("quick 2.0\n")
    assert Image.open(BytesIO(base64.b64decode(figure.data["image/png"]))).mode == "P"

    papermill_run("-p", "scale", "ci")  # the promoted notebook is itself a source
    with pytest.raises(promote.Refused, match="injected"):
        promote.promote(tmp_path / "runs/toy.ipynb", source)


def verdicts():
    return json.loads((promote.ROOT / "figures/claims.json").read_text(encoding="utf-8"))


def test_the_readme_holds_the_verdicts_of_the_figures():
    readme = (promote.ROOT / "README.md").read_text(encoding="utf-8")
    assert promote.with_claims(readme, verdicts()) == readme
    assert {id.split()[0] for rows in verdicts().values() for id in rows} == set(claims.CLAIMS)
    for rows in verdicts().values():
        for row in rows.values():
            assert f"| {row['verdict']} |" in readme and row["measure"] in readme and row["dataset"] in readme


def test_another_verdict_is_another_readme():
    readme, changed = (promote.ROOT / "README.md").read_text(encoding="utf-8"), verdicts()
    row = next(iter(next(iter(changed.values())).values()))
    row["verdict"] = "a verdict that is not there"
    other = promote.with_claims(readme, changed)
    assert row["verdict"] in other and promote.with_claims(other, verdicts()) == readme
    with pytest.raises(ValueError, match="no place for the claims"):
        promote.with_claims(readme.replace(promote.CLAIMS_END, ""), changed)
