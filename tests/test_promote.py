"""The committed notebooks are well formed, clean, and carry the outputs of their own source; a promoted figure looks as it did.

Nothing is executed here, except a toy notebook that shows that what papermill really writes is promoted as it should be.
"""

import base64
import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from tools import promote

NOTEBOOKS = sorted((promote.ROOT / "notebooks").glob("*.ipynb"))
FIGURES = sorted((promote.ROOT / "figures").glob("*.png"))  # those of the notebooks, finer, and never with a palette
PARAMETERS = '# lam = 1 is an example\nscale = "quick"  # ci, quick or paper\nlam = 2.0\nguide = None'


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebook_is_clean_and_current(path):
    assert promote.problems(path) == []


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


def executed(*outputs):
    """The toy as papermill leaves it, its last cell having made `outputs` (by default, one printed line)."""
    run = toy()
    run.metadata["papermill"] = {"parameters": {}, "exception": None, "end_time": "2026-01-01T00:00:01Z", "duration": 1.0}
    run.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    run.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
    for count, cell in enumerate(run.cells):
        cell.metadata["papermill"] = {"duration": 0.1, "status": "completed"}
        cell.metadata.setdefault("tags", [])
        if count:
            cell.execution_count = count
    run.cells[-1].outputs = list(outputs) or [stream("2.0\n")]
    return run


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def write(folder, notebook):
    folder.mkdir(exist_ok=True)
    nbformat.write(nbformat.from_dict(notebook), folder / "toy.ipynb")
    return folder / "toy.ipynb"


def promote_toy(tmp_path, run):
    """The promoted notebook, read back, and its path."""
    path = write(tmp_path / "notebooks", toy())
    promote.promote(write(tmp_path / "runs", run), path)
    return promote.read(path), path


def test_promoted_notebook_has_no_problems_and_nothing_of_the_run_but_its_outputs(tmp_path):
    notebook, path = promote_toy(tmp_path, executed())
    assert promote.problems(path) == []
    assert [(c.id, c.source) for c in notebook.cells] == [(c.id, c.source) for c in toy().cells]
    assert [dict(c.metadata) for c in notebook.cells] == [{}, {"tags": ["parameters"]}, {}]
    assert set(notebook.metadata) == {"kernelspec", "language_info", "pgd"}
    assert [c.execution_count for c in notebook.cells[1:]] == [1, 2]
    assert notebook.cells[-1].outputs == [stream("2.0\n")]
    first = path.read_bytes()
    promote.promote(tmp_path / "runs/toy.ipynb", path)
    assert path.read_bytes() == first


def test_stderr_progress_bars_and_live_widgets_are_stripped(tmp_path):
    figure = {"image/png": "aGVsbG8=", "text/plain": "<Figure>"}
    run = executed(
        stream("before\n"),
        stream("a warning\n", "stderr"),
        stream(" 10%\r 50%\r100%\nafter\n"),
        new_output("display_data", {promote.WIDGET_VIEW: {"model_id": "1"}, "text/plain": "FloatSlider(value=2.0)"}),
        new_output("display_data", {promote.WIDGET_VIEW: {"model_id": "2"}, **figure}),
        new_output("execute_result", {"text/plain": "42"}, execution_count=2),
    )
    notebook, path = promote_toy(tmp_path, run)
    assert promote.problems(path) == []
    assert notebook.cells[-1].outputs == [
        stream("before\nafter\n"),
        new_output("display_data", figure),
        new_output("execute_result", {"text/plain": "42"}, execution_count=2),
    ]


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("interactive(children=(FloatSlider(value=2.0),\n Output()), _dom_classes=('widget-interact',))\n", False),
        ("What the slider (run the notebook to move it) shows at 2", True),
    ],
)
def test_the_still_picture_of_a_widget_is_kept_without_the_widget(tmp_path, text, stays):
    red = encoded(np.tile(noise(2) * (255, 0, 0), (3, 3, 1)))
    data = {promote.WIDGET_VIEW: {"model_id": "1"}, "image/png": red, "text/plain": text}
    notebook, path = promote_toy(tmp_path, executed(new_output("display_data", data)))
    (output,) = notebook.cells[-1].outputs
    assert output.data == {"image/png": promote.smaller_png(red), **({"text/plain": text} if stays else {})}
    assert decoded(output.data["image/png"]).mode == "P" and promote.problems(path) == []


def test_the_repr_of_what_is_no_widget_is_kept():
    data = {"text/plain": "Point(x=1)", "image/png": "aGVsbG8="}
    assert promote.clean_data(dict(data)) == data


def test_tables_of_equal_runs_are_equal():
    def ran(value):
        style = pd.DataFrame({"x": [value, 2.0]}).style.highlight_max(color="red")
        data = {"text/html": style.to_html(), "text/plain": repr(style)}
        return data, promote.clean_data(dict(data))

    (raw, one), (raw_2, two), (_, other) = ran(1.0), ran(1.0), ran(1.5)
    assert raw != raw_2 and one == two and one != other
    assert one["text/plain"] == "<pandas.io.formats.style.Styler>"
    (name,) = set(re.findall(r"T_[0-9a-f]+", one["text/html"]))
    assert f"#{name}_row1_col0" in one["text/html"] and f'id="{name}_row1_col0"' in one["text/html"]  # the style finds its cell
    assert name not in other["text/html"]


INJECTED = new_code_cell("lam = 3.0", id="injected", metadata={"tags": ["injected-parameters"]})
REFUSALS = {
    "injected parameters": lambda run: run.cells.insert(2, INJECTED),
    "failed": lambda run: run.cells[-1].update(outputs=[new_output("error", ename="E", evalue="lam", traceback=[])]),
    "did not run to its end": lambda run: run.metadata.papermill.update(end_time=None),
    "is stale": lambda run: run.cells[-1].update(source="print(lam + 1)"),
    "path of this machine": lambda run: run.cells[-1].update(outputs=[stream(f"saved {promote.ROOT}/runs/x.npz\n")]),
    "limit is 1,000,000": lambda run: run.cells[-1].update(outputs=[new_output("display_data", {"image/png": "A" * 10**6})]),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_promotion_is_refused_and_leaves_the_committed_notebook_as_it_was(tmp_path, reason):
    path, run = write(tmp_path / "notebooks", toy()), executed()
    before = path.read_bytes()
    REFUSALS[reason](run)
    with pytest.raises(ValueError, match=reason):
        promote.promote(write(tmp_path / "runs", run), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


PLACES = ["/home/someone/x", "/root/x", "/Users/someone/x", "/tmp/x", r"C:\Users\someone", str(Path.home())]


@pytest.mark.parametrize("place", PLACES)
def test_paths_of_a_machine_are_found_in_outputs_and_sources(tmp_path, place):
    html = new_output("display_data", {"text/html": f"<b>{place}</b>"})
    for notebook in (executed(stream(f"saved to {place}\n")), executed(html), toy(title=f"See {place}")):
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
        (PARAMETERS + "\nhalf = lam / 2", "not every line is `name = literal`"),
        (PARAMETERS + "\nprint(lam)", "not every line is `name = literal`"),
        (PARAMETERS.replace("quick", "ci"), 'needs `scale = "quick"`'),
    ],
)
def test_parameters_that_papermill_would_misread_are_found(tmp_path, source, reason):
    assert any(reason in wrong for wrong in promote.problems(write(tmp_path, toy(parameters=source))))
    assert promote.parameters(toy()) == {"scale": "quick", "lam": 2.0, "guide": None}


MALFORMED = {
    "not of notebook format 4.5": lambda raw: raw.update(nbformat_minor=4),
    "an id of its own": lambda raw: raw["cells"][0].update(id="body"),
    "with an id": lambda raw: raw["cells"][0].pop("id"),
    "not a valid notebook": lambda raw: raw["cells"][0].update(cell_type="prose"),
    "exactly one code cell tagged": lambda raw: raw["cells"][1].update(metadata={}),
    "over 40 lines": lambda raw: raw["cells"][2].update(source="lam\n" * 41),
    "error or stderr": lambda raw: raw["cells"][2].update(outputs=[stream("", "stderr")]),
    "a live widget": lambda raw: raw["cells"][2].update(outputs=[new_output("display_data", {promote.WIDGET_VIEW: {}})]),
    "needs the kernel": lambda raw: raw["metadata"].pop("kernelspec"),
    "what a run left behind": lambda raw: raw["metadata"].update(papermill={}),
    "outputs of another source": lambda raw: raw["cells"][2].update(outputs=[stream("2.0")]),
    "has no outputs": lambda raw: None,
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_notebooks_are_found(tmp_path, reason):
    path = write(tmp_path, toy())
    raw = json.loads(path.read_text())
    MALFORMED[reason](raw)
    path.write_text(json.dumps(raw))
    assert any(reason.replace("with an id", "with an id of its own") in wrong for wrong in promote.problems(path))


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
    assert printed == stream("quick 2.0\n") and decoded(figure.data["image/png"]).mode == "P"

    papermill_run("-p", "scale", "ci")  # the promoted notebook is itself a source
    with pytest.raises(ValueError, match="injected"):
        promote.promote(tmp_path / "runs/toy.ipynb", source)


# Figures


def encoded(image, **options):
    """The image, or the array [height, width, 3 or 4] of its channels, as the base64 text of a PNG."""
    file = BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8))
    image.save(file, **{"format": "PNG", **options})
    return base64.b64encode(file.getvalue()).decode()


def decoded(text):
    return Image.open(BytesIO(base64.b64decode(text)))


def on_white(text):
    """The channels [height, width, 3] that a reader sees on a white page."""
    rgba = np.array(decoded(text).convert("RGBA"))
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.slow
@pytest.mark.parametrize("path", FIGURES, ids=lambda p: p.name)
def test_real_figures_look_the_same_and_get_much_smaller(path):
    text = base64.b64encode(path.read_bytes()).decode()
    new = promote.smaller_png(text)
    seen, off = on_white(text).reshape(-1, 3), np.abs(on_white(new) - on_white(text)).reshape(-1, 3)
    assert off.max() <= 24 and off.mean(axis=0).max() < 1
    # The page, the bands and the lines have the commonest colours, and an eye would see those change first.
    values, codes, counts = np.unique((seen @ (65536, 256, 1)).astype(int), return_inverse=True, return_counts=True)
    for i in np.argsort(-counts)[:20]:
        assert off[codes == i].max() <= (0 if values[i] == 0xFFFFFF else 8)
    assert decoded(new).size == decoded(text).size and decoded(new).info.get("dpi") == decoded(text).info.get("dpi")
    assert promote.smaller_png(new) == new and len(new) < 0.5 * len(text)


def noise(colours):
    """An image [100, 100, 3] with so many levels of each channel."""
    return np.random.default_rng(0).integers(0, colours, (100, 100, 3))


@pytest.mark.parametrize("levels", [2, 6])
def test_few_colours_stay_exactly_as_they_are_and_what_is_transparent_becomes_white(levels):
    image = np.concatenate([noise(levels) * 40, np.full((100, 100, 1), 255)], -1)
    image[:10, :, 3] = 0
    text = encoded(image)
    new = promote.smaller_png(text)
    assert decoded(new).mode == "P" and "transparency" not in decoded(new).info and len(new) < len(text)
    assert np.array_equal(np.asarray(decoded(new).convert("RGB")), on_white(text))


UNTOUCHED = {
    "text": lambda: "aGVsbG8=",
    "not base64": lambda: "A",
    "cut off": lambda: encoded(noise(256))[:8000],
    "a JPEG": lambda: encoded(noise(4), format="JPEG"),
    "too colourful": lambda: encoded(noise(256)),
    "too small to gain": lambda: encoded(np.zeros((1, 1, 3))),
    "with a palette": lambda: encoded(Image.fromarray(noise(4).astype(np.uint8)).quantize(8)),
}


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_what_is_no_figure_or_cannot_gain_stays_as_it_was(kind):
    text = UNTOUCHED[kind]()
    assert promote.smaller_png(text) == text


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """The figures of a run in a repository of their own."""
    monkeypatch.setattr(promote, "ROOT", tmp_path)
    monkeypatch.setattr(promote.readme, "written", lambda text, figures: text + "\nwritten")
    (tmp_path / "README.md").write_text("A readme")
    folder = tmp_path / "runs/figures/quick"
    folder.mkdir(parents=True)
    return folder


def test_figures_animations_and_their_data_are_copied_whole_or_not_at_all(run_folder):
    files = {"a.png": b"png", "a.csv": b"1", "b.gif": b"gif", "c.0.png": bytes(2_000_000)}
    for name, content in {**files, "alone.csv": b"3", "large.png": b"4", "large.csv": bytes(2_000_001)}.items():
        (run_folder / name).write_bytes(content)
    (refused,) = promote.promote_figures()
    assert refused == "runs/figures/quick/large.csv has 2,000,001 bytes; the limit is 2,000,000"
    root = run_folder.parents[2]
    assert {path.name: path.read_bytes() for path in (root / "figures").iterdir()} == files
    assert (root / "README.md").read_text() == "A readme\nwritten"


def test_a_run_without_figures_is_an_error(run_folder):
    assert "make paper" in promote.promote_figures()[0]
