"""Notebook 04 in a real JupyterLab in a real Chromium: its panels answer the keyboard and the mouse, and nothing complains.

It runs once, at `ci` scale; each test begins and ends at the sweep of the explicit rule. $SCREENSHOTS names a folder for
pictures of every stage.
"""

import contextlib
import io
import json
import os
import re

import nbformat
import numpy as np
import pytest
from browser import find_chromium, lab, notebooks, wait_change
from conftest import kept
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from pgdlib.lab.figures.style import MODEL
from tools import promote

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium: install Debian's chromium, or name another in $CHROMIUM"),
]
CHANGES = {"scale": "ci", "dataset": "human", "lams": [0.1, 0.5, 1.0, 2.25]}
PANELS = ["04-slide", "04-player", "04-film"]  # the cells that show them
HANDLE, JOB = ".pgd-lam .noUi-handle", ".pgd-explorer .pgd-job"
FAILING = """
import ipywidgets, threading
callback, thread = ipywidgets.Button(), ipywidgets.Button()
callback.on_click(lambda _: 1 / 0)
thread.on_click(lambda _: threading.Thread(target=lambda: 1 / 0).start())
ipywidgets.VBox([callback, thread])
"""
# Every text that is seen in a panel, with its contrast as WCAG defines it.
CONTRASTS = """() => {
  const colour = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => rgb.slice(0, 3).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {for (; e; e = e.parentElement) {
    const c = colour(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0.5) return c}};
  return [...document.querySelectorAll('.pgd-explorer *, .pgd-player *, .pgd-slider *')].filter(e => e.checkVisibility()
    && e.tagName !== 'STYLE' && (e.tagName === 'INPUT' || e.tagName === 'SELECT'
    || [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))).map(e => {
      const [a, b] = [light(colour(getComputedStyle(e).color)), light(behind(e))];
      return [e.innerText || e.value, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]})}"""
# What is wider than its place: panels that can be scrolled, pictures and texts that stick out of the cell's output.
OVERFLOWS = """() => [...document.querySelectorAll('.pgd-explorer, .pgd-player, .pgd-slider')].flatMap(panel => {
  const output = panel.closest('.jp-OutputArea-output'), edge = output.getBoundingClientRect();
  const wide = [output, ...output.querySelectorAll('.widget-box')].filter(e => e.scrollWidth > e.clientWidth);
  const out = [...output.querySelectorAll('img, span, td, th, button, select, input')].filter(e => e.checkVisibility()
    && (e.getBoundingClientRect().right > edge.right + 0.5 || e.getBoundingClientRect().left < edge.left - 0.5));
  return [...wide, ...out].map(e => [e.tagName, e.className, e.innerText, e.scrollWidth, e.clientWidth])})"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A function that writes a notebook and opens it; and the folder that its artifacts go to."""
    folder, runs, groups = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("runs"), []
    with (
        lab(folder, {"PGD_RUNS": runs, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}) as server,
        notebooks(*server, os.environ.get("SCREENSHOTS")) as open_path,
    ):

        def open_notebook(name, notebook):
            nbformat.write(notebook, folder / name)
            one = open_path(name)
            groups.append(group_of(one))
            return one

        yield open_notebook, runs
    wait_until(lambda: not any(map(alive, groups)))


@pytest.fixture(scope="module")
def run(opened):
    """Notebook 04 after *Run all*."""
    notebook = promote.read(promote.ROOT / "notebooks/04_guidance.ipynb")
    (cell,) = promote.tagged(notebook, "parameters")
    for name, value in CHANGES.items():
        cell.source, n = re.subn(rf"^{name} = .*$", f"{name} = {json.dumps(value)}", cell.source, flags=re.MULTILINE)
        assert n == 1, name
    for cell in promote.code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    one = opened[0]("04.ipynb", notebook)
    one.run_all(300)
    one.page.set_default_timeout(30_000)
    return one


@pytest.fixture
def panel(run):
    """The notebook with its panels. Afterwards no error is new, no complaint, and no output of a cell."""
    outputs, errors = outputs_of(run), len(run.errors())
    choose(run, "dataset", "human")
    choose(run, "rule", "explicit")
    run.scroll_to(HANDLE)
    yield run
    assert run.errors()[errors:] == [] and run.complaints == []
    assert outputs_of(run) == outputs


def outputs_of(notebook):
    """cell id -> the types of its outputs."""
    return {c["id"]: [o["output_type"] for o in c["outputs"]] for c in notebook.cells() if c["cell_type"] == "code"}


def shown(notebook):
    """The bytes of both pictures and the numbers; None while a picture loads."""
    cloud, curve = (notebook.image(f".pgd-{name}") for name in ("cloud", "curve"))
    return cloud and curve and (cloud[0], curve[0], notebook.text(".pgd-numbers"))


def changed(notebook, before):
    """What is shown once both pictures and the numbers are others than `before`."""
    return wait_change(lambda: ((now := shown(notebook)) and all(a != b for a, b in zip(now, before)) and now) or None)


def wait_until(condition, timeout=30):
    wait_change(lambda: condition() or None, timeout=timeout)


def stops(notebook):
    """How many stops the slider has."""
    return int(float(notebook.page.locator(HANDLE).get_attribute("aria-valuemax"))) + 1


def choose(notebook, name, value):
    """Choose in one of the explorer's lists: "dataset", "rule" or "error"."""
    notebook.page.locator(".pgd-explorer").get_by_label(name, exact=True).select_option(value)


@contextlib.contextmanager
def slowly(notebook):
    """The model takes a second for each evaluation, as a large one does, so that there is time to do something meanwhile."""
    notebook.execute(
        "import threading; hurry = threading.Event()\n"
        "hook = lab.denoiser.register_forward_pre_hook(lambda *_: None if hurry.wait(1) else None)"
    )
    try:
        yield
    finally:
        notebook.execute("hurry.set(); hook.remove()")


def group_of(notebook):
    """The process group of the kernel, in which all that it starts is too."""
    return int(notebook.execute("import os; print(os.getpgrp())"))


def alive(group):
    """Whether a process of this group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_fails_is_told(opened):
    cells = [new_code_cell(source) for source in (FAILING, "raise KeyError('a cell')")]
    toy = opened[0]("toy.ipynb", new_notebook(cells=cells, metadata=promote.METADATA))
    with pytest.raises(AssertionError, match="KeyError: 'a cell'"):
        toy.run_all()
    toy.page.locator(".jupyter-button").nth(0).click()
    assert "ZeroDivisionError" in wait_change(lambda: toy.errors()[1:], [])[0]
    toy.page.locator(".jupyter-button").nth(1).click()
    assert "Exception in thread" in wait_change(lambda: toy.errors()[2:], [])[0]
    toy.page.evaluate("console.error('so it is')")
    assert "so it is" in wait_change(lambda: toy.text("body") and toy.complaints, [])[0]
    assert toy.execute("print(6 * 7)") == "42\n"


def test_each_panel_is_one_output_with_a_picture_for_readers(panel):
    cells = {c["id"]: c for c in panel.cells()}
    outputs = {name: cells[name]["outputs"] for name in PANELS}
    for bundle, *_ in outputs.values():
        assert {"image/png", promote.WIDGET_VIEW} <= set(bundle["data"])
    (told,) = [output for of_one in outputs.values() for output in of_one[1:]]  # once: what to do where there is no slider
    assert "without a slider" in told["text"]


def test_the_slider_moves_both_pictures_and_the_numbers(panel):
    panel.screenshot("slide")
    text = panel.text(".pgd-explorer")
    assert "calibrated 0." in text and "limit 2" in text
    assert stops(panel) == len(CHANGES["lams"]) + 2  # and 0, and the calibrated one
    first = wait_change(lambda: shown(panel))
    panel.page.locator(HANDLE).press("ArrowRight")
    second = changed(panel, first)
    panel.page.locator(HANDLE).press("ArrowRight")
    changed(panel, second)
    panel.screenshot("slide_moved")
    for _ in range(2):
        panel.page.locator(HANDLE).press("ArrowLeft")
    wait_until(lambda: shown(panel) == first)
    choose(panel, "error", "Appendix B (the paper's)")
    wait_until(lambda: (now := shown(panel)) and now[0] != first[0] and now[1] != first[1] and now[2] == first[2])
    panel.screenshot("slide_appendix_b")
    choose(panel, "error", "state reconstructed (ours)")
    wait_until(lambda: shown(panel) == first)


def test_a_click_picks_a_point_of_the_cloud(panel):
    before, (width, height), (shown_width, shown_height) = wait_change(lambda: panel.image(".pgd-cloud"))
    orange = np.abs(rgb(before) - (255 * np.array(MODEL) + 255) / 2).max(-1) < 25  # the points of this λ are half transparent
    orange[: int(0.24 * height)] = orange[:, int(0.83 * width) :] = False  # the densities
    orange[:, : int(0.45 * width)] = False  # the legend
    ys, xs = np.nonzero(orange)
    near = np.hypot(xs - xs.min(), ys - ys[xs.argmin()]) < 8
    x, y = xs[near].mean(), ys[near].mean()  # the leftmost point

    def darkest(data):
        """The mean grey of the darkest ring around the point, or close to it."""
        angles, shifts = np.linspace(0, 2 * np.pi, 40), np.arange(-3, 4)
        radii, dx, dy = (v[..., None] for v in np.meshgrid(np.arange(6, 11), shifts, shifts))
        rows, columns = y + dy + radii * np.sin(angles), x + dx + radii * np.cos(angles)
        return rgb(data)[np.rint(rows).astype(int), np.rint(columns).astype(int)].mean((-2, -1)).min()

    panel.page.locator(".pgd-cloud").click(position={"x": x * shown_width / width, "y": y * shown_height / height})
    after = wait_change(lambda: panel.image(".pgd-cloud"), (before, (width, height), (shown_width, shown_height)))[0]
    panel.screenshot("picked")
    assert darkest(before) > 150 > 60 > darkest(after)
    number = panel.page.locator(".pgd-player").get_by_label("trajectory")
    picked = int(panel.execute("print(explorer.picked)"))
    wait_until(lambda: number.input_value() == str(picked))
    measures = json.loads(
        panel.execute("import json; print(json.dumps({k: v.tolist() for k, v in explorer.view.here.measures.items()}))")
    )
    likelihood = np.where(np.isfinite(measures["normalised"]), measures["log_likelihood"], np.inf)
    assert likelihood[picked] < likelihood.min() + 0.1  # the leftmost of those that have an error

    other = "1" if number.input_value() == "0" else "0"
    number.select_option(other)
    wait_until(lambda: (now := panel.image(".pgd-cloud")) and now[0] not in (before, after))
    assert panel.execute("print(explorer.picked)").strip() == other
    choose(panel, "rule", "annealed")  # its sweep is there; nothing is picked in it
    choose(panel, "rule", "explicit")
    wait_until(lambda: (now := panel.image(".pgd-cloud")) and now[0] == before)


def rgb(data):
    """The pixels of a picture [height, width, 3], from 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def test_a_sweep_that_is_not_there_is_offered_and_made(panel):
    first = wait_change(lambda: shown(panel))
    choose(panel, "rule", "proximal")
    offer = panel.page.locator(".pgd-explorer").get_by_role("button", name="Compute it")
    offer.wait_for()
    panel.screenshot("not_computed")
    assert "There is no sweep of the proximal rule on stand-in pen-human yet." in panel.text(".pgd-explorer")
    assert not panel.page.locator(".pgd-cloud").is_visible()
    for button in panel.page.locator(".pgd-player .widget-toggle-buttons button").all():  # the player has nothing to show
        button.click()
    offer.click()
    panel.page.locator(HANDLE).wait_for()
    second = changed(panel, first)
    panel.screenshot("computed")
    assert not offer.is_visible() and "no sweep" not in panel.text(".pgd-explorer") and panel.text(JOB) == ""
    choose(panel, "rule", "explicit")
    changed(panel, second)
    choose(panel, "rule", "proximal")  # now it is there at once
    wait_until(lambda: shown(panel) == second)
    choose(panel, "rule", "explicit")
    wait_until(lambda: shown(panel) == first)


def test_a_dataset_that_is_not_made_says_so(panel, opened):
    first, files = wait_change(lambda: shown(panel)), kept(opened[1])
    choose(panel, "dataset", "cloned")
    panel.page.locator(".pgd-explorer").get_by_text("cloned is not ready yet").wait_for()
    panel.screenshot("not_made")
    assert panel.page.locator(".pgd-explorer").get_by_role("button", name="Compute").is_visible()
    assert panel.page.locator(".pgd-sample").is_disabled()
    choose(panel, "dataset", "human")
    wait_until(lambda: shown(panel) == first)
    assert kept(opened[1]) == files


def test_fresh_trajectories_at_any_lam(panel):
    first, n = wait_change(lambda: shown(panel)), stops(panel)
    number, cancel = panel.page.locator(".pgd-explorer input[type=number]"), panel.page.locator(JOB).get_by_text("Cancel")

    def sample(lam):
        wait_until(lambda: number.input_value() == panel.execute("print(explorer.stop[0])").strip())  # the last thing to move
        number.fill(lam)
        panel.page.locator(".pgd-sample").click()

    sample("-1")
    wait_until(lambda: "not allowed" in panel.text(JOB))
    with slowly(panel):
        number.fill("0.7")
        panel.page.locator(".pgd-sample").click()
        cancel.click()
        wait_until(lambda: panel.text(JOB) == "cancelled")
        assert stops(panel) == n and shown(panel) == first
        panel.page.locator(HANDLE).press("ArrowRight")
        second = changed(panel, first)

        sample("0.35")
        panel.wait_for(f"parseFloat(document.querySelector('{JOB} .progress-bar').style.width) > 0")
        panel.screenshot("sampling")
        assert "sampling at λ = 0.35" in panel.text(JOB)
        panel.page.locator(HANDLE).press("ArrowLeft")  # meanwhile all the rest goes on
        wait_until(lambda: shown(panel) == first)
    wait_until(lambda: "8 fresh trajectories at λ = 0.35" in panel.text(JOB))
    panel.screenshot("fresh")
    fresh = changed(panel, first)
    assert fresh[0] != second[0] and "λ = 0.35" in panel.text(".pgd-numbers") and stops(panel) == n + 1
    assert "λ = 0.35 (fresh)" in panel.text(".pgd-player")
    panel.page.locator(HANDLE).press("ArrowLeft")
    changed(panel, fresh)


def test_the_player_plays(panel):
    if "cannot draw" in (text := panel.text(".pgd-player")):
        pytest.skip(f"NOTHING IS DRAWN IN THIS TEST: {text}")
    panel.scroll_to(".pgd-player")

    def frame():
        return (now := panel.image(".pgd-film")) and now[0]

    choice, play = panel.page.locator(".pgd-player .widget-toggle-buttons button"), panel.page.locator(".widget-play button")
    seen = []

    def at_rest():
        seen.append(frame())
        return len(seen) > 20 and seen[-1] is not None and len(set(seen[-20:])) == 1

    wait_until(at_rest, 60)  # the hand may still have to follow the test before
    guided = frame()
    choice.nth(0).click()
    unguided = wait_change(frame, guided, 60)
    choice.nth(1).click()
    wait_until(lambda: frame() == guided)
    panel.screenshot("film")
    play.nth(0).click()
    second = wait_change(frame, guided)
    wait_until(lambda: frame() not in (None, guided, second))
    play.nth(1).click()
    wait_until(lambda: frame() == guided)
    panel.page.locator(".pgd-player .noUi-handle").press("End")
    last = wait_change(frame, guided)
    panel.screenshot("film_end")
    choice.nth(0).click()
    assert wait_change(frame, last) != unguided  # the other film, at the same time
    choice.nth(1).click()
    wait_until(lambda: frame() == last)
    panel.page.locator(".pgd-player .noUi-handle").press("Home")
    wait_until(lambda: frame() == guided)


def test_the_film_of_noise_moves(panel):
    panel.scroll_to(".pgd-slider")
    first = wait_change(lambda: panel.image(".pgd-picture"))
    for _ in range(5):
        panel.page.locator(".pgd-slider .noUi-handle").press("ArrowRight")
    wait_change(lambda: panel.image(".pgd-picture"), first)
    panel.screenshot("noise")
    panel.page.locator(".pgd-slider .noUi-handle").press("Home")
    wait_until(lambda: panel.image(".pgd-picture") == first)


@pytest.mark.parametrize("size", [(1280, 900), (1000, 900), (700, 900)])
def test_nothing_is_wider_than_the_notebook(panel, size):
    panel.page.set_viewport_size(dict(zip(("width", "height"), size)))
    panel.wait_for(f"window.innerWidth === {size[0]}")
    panel.scroll_to(".pgd-cloud")
    panel.screenshot(f"{size[0]}_wide")
    panel.scroll_to(".pgd-player")
    panel.screenshot(f"{size[0]}_wide_player")
    found = panel.page.evaluate(OVERFLOWS)
    panel.page.set_viewport_size({"width": 1280, "height": 900})
    assert found == []


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_every_text_has_contrast(panel, theme):
    panel.set_theme(theme)
    panel.scroll_to(".pgd-explorer")
    panel.screenshot(theme.replace(" ", "_"))
    contrasts = panel.page.evaluate(CONTRASTS)
    assert len(contrasts) > 30
    assert [each for each in contrasts if each[1] < 4.5] == []


def test_a_restart_amid_sampling_leaves_nothing(run, opened):
    """The last: the panels have no kernel afterwards."""
    group = group_of(run)
    assert alive(group) and group != os.getpgrp()
    choose(run, "rule", "smoothed")
    offer = run.page.locator(".pgd-explorer").get_by_role("button", name="Compute it")
    offer.wait_for()
    before = kept(opened[1])
    run.execute("import time; lab.denoiser.register_forward_pre_hook(lambda *_: time.sleep(1))")
    offer.click()
    run.wait_for(f"parseFloat(document.querySelector('{JOB} .progress-bar').style.width) > 0")
    run.screenshot("before_restart")
    run.restart()
    wait_until(lambda: not alive(group))
    assert kept(opened[1]) == before
    assert run.execute("print('lab' in globals())") == "False\n"
    late = "Comm not found"  # what the killed kernel's panels had sent just before, which JupyterLab no longer has a place for
    assert run.errors() == [words for words in run.complaints if late not in words] == []
