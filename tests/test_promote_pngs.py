"""Promotion makes a figure smaller, never different to look at. What Pillow reads back is held against the original."""

import base64
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tools import promote

FIGURES = sorted((promote.ROOT / "figures").glob("*.png"))  # those of the notebooks, finer, and never with a palette
NOTEBOOKS = sorted((promote.ROOT / "notebooks").glob("*.ipynb"))
GRID = np.array([(r, g, b) for r in range(0, 256, 36) for g in range(0, 256, 36) for b in range(0, 256, 85)])  # 256 colours


def encoded(image, **options):
    """The image, or the array [height, width, 3 or 4] of its channels, as the base64 text of a PNG."""
    file = BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, np.uint8))
    image.save(file, **{"format": "PNG", **options})
    return base64.b64encode(file.getvalue()).decode()


def decoded(text):
    return Image.open(BytesIO(base64.b64decode(text)))


def channels(text):
    """RGBA [height, width, 4]."""
    return np.array(decoded(text).convert("RGBA"))


def on_page(rgba):
    """The channels [..., 3] that a reader sees on a white page."""
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def on_white(text):
    return on_page(channels(text))


def before_and_after(old, new):
    """What readers see of two PNGs of one size: the pairs of colours [n, 2, 3] that pixels have, and how many have each [n]."""
    both = np.concatenate([channels(old), channels(new)], -1).view(np.uint64).ravel()
    pairs = pd.Series(both).value_counts()  # much faster than to go through all pixels
    return on_page(pairs.index.to_numpy().view(np.uint8).reshape(-1, 2, 4)), pairs.to_numpy()


def shuffled(colours):
    """An image [50, 100, 3] in which each of the `colours` occurs, about equally often."""
    rng = np.random.default_rng(0)
    return np.asarray(colours)[rng.permutation(np.arange(5000) % len(colours))].reshape(50, 100, 3)


def noise(side):
    """An image of almost as many colours as pixels, from a cube of the colours."""
    return np.random.default_rng(0).integers(0, side, (100, 100, 3))


def real(path):
    """The PNGs of a figure's file or of a notebook's cells."""
    if path.suffix == ".png":
        return [base64.b64encode(path.read_bytes()).decode()]
    outputs = [output for cell in promote.code_cells(promote.read(path)) for output in cell.outputs]
    return [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]


@pytest.mark.slow
@pytest.mark.parametrize("path", [*FIGURES, *NOTEBOOKS], ids=lambda p: p.name)
def test_real_figures_look_the_same_and_get_much_smaller(path):
    for text in real(path):
        new = promote.smaller_png(text)
        colours, pixels = before_and_after(text, new)
        seen, off = colours[:, 0], np.abs(colours[:, 1] - colours[:, 0])
        assert off.max() <= 24 and np.average(off, axis=0, weights=pixels).max() < 1
        # The page, the bands and the lines have the commonest colours, and an eye would see those change first.
        values, codes = np.unique((seen @ (65536, 256, 1)).astype(int), return_inverse=True)
        for i in np.argsort(-np.bincount(codes, pixels))[:20]:
            assert off[codes == i].max() <= (0 if values[i] == 0xFFFFFF else 4)
        assert decoded(new).size == decoded(text).size and decoded(new).info.get("dpi") == decoded(text).info.get("dpi")
        assert promote.smaller_png(new) == new
        assert len(new) < 0.5 * len(text) or path in NOTEBOOKS  # those were made smaller before


def test_there_are_real_figures():
    assert FIGURES and NOTEBOOKS


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 255, 256])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_few_colours_stay_exactly_as_they_are(n, mode):
    colours = np.random.default_rng(n).permutation(GRID)[:n]
    image = shuffled(colours)
    text = encoded(Image.fromarray(image.astype(np.uint8)).convert(mode))
    new = promote.smaller_png(text)
    assert decoded(new).mode == "P" and len(new) < len(text)
    assert np.array_equal(on_white(new), image)


def test_many_colours_become_256_of_their_own_each_the_nearest():
    image = shuffled([(x, y, 200 - (x + y) // 2) for x in range(0, 40) for y in range(0, 50)])  # 2,000 colours on a plane
    text = encoded(image)
    new = promote.smaller_png(text)
    seen, own = on_white(new), np.unique(image.reshape(-1, 3), axis=0)
    chosen = np.unique(seen.reshape(-1, 3), axis=0)
    assert len(chosen) == 256 and {*map(tuple, chosen)} <= {*map(tuple, own)}
    nearest = ((image[:, :, None] - chosen) ** 2).sum(axis=-1).min(axis=-1)
    assert np.array_equal(((image - seen) ** 2).sum(axis=-1), nearest)
    assert promote.smaller_png(text) == new  # the same each time


def test_what_is_transparent_becomes_white():
    image = np.zeros((50, 50, 4))
    image[10:] = (255, 0, 0, 255)
    image[20:] = (0, 0, 255, 102)
    text = encoded(image)
    new = promote.smaller_png(text)
    assert decoded(new).mode == "P" and "transparency" not in decoded(new).info
    assert np.asarray(decoded(new).convert("RGB"))[[0, 10, 20], 0].tolist() == [[255, 255, 255], [255, 0, 0], [153, 153, 255]]
    assert np.array_equal(on_white(new), on_white(text))


@pytest.mark.parametrize(("off", "stays"), [(20, False), (24, False), (25, True), (40, True)])
def test_one_pixel_that_would_change_too_much_leaves_a_figure_as_it_was(off, stays):
    image = np.tile(shuffled(GRID), (10, 1, 1))
    image[0, 0] = (0, 0, off)  # a 257th colour, the rarest; the nearest is black
    text = encoded(image)
    assert (promote.smaller_png(text) == text) == stays


def test_too_much_change_on_average_leaves_a_figure_as_it_was(monkeypatch):
    text = encoded(noise(side=60))
    assert promote.smaller_png(text) == text
    monkeypatch.setattr(promote, "MAX_MEAN_OFF", 24)
    assert np.abs(on_white(promote.smaller_png(text)) - on_white(text)).mean(axis=(0, 1)).max() > 1


def animated():
    frames = [Image.fromarray(shuffled(colours).astype(np.uint8)) for colours in (GRID[:3], GRID[9:12])]
    return encoded(frames[0], save_all=True, append_images=frames[1:])


def broken(break_it):
    """A PNG with its bytes put through `break_it`."""
    return base64.b64encode(break_it(base64.b64decode(encoded(np.tile(noise(256), (3, 3, 1)))))).decode()


UNTOUCHED = {
    "text": lambda: "aGVsbG8=",
    "not base64": lambda: "A",
    "nothing": lambda: "",
    "cut off": lambda: broken(lambda png: png[:2000]),
    "broken inside": lambda: broken(lambda png: png[:2000] + png[2001:]),
    "broken header": lambda: broken(lambda png: png[:20] + png[21:]),
    "broken name": lambda: broken(lambda png: b"\xc9DAT".join(png.rsplit(b"IDAT", 1))),  # of the last part
    "a JPEG": lambda: encoded(shuffled(GRID), format="JPEG"),
    "animated": animated,
    "too colourful": lambda: encoded(noise(side=256)),
    "too small to gain": lambda: encoded(np.zeros((1, 1, 3))),
    "grey": lambda: encoded(Image.fromarray(shuffled(GRID).astype(np.uint8)).convert("L")),
    "with a palette": lambda: encoded(Image.fromarray(shuffled(GRID).astype(np.uint8)).quantize(8)),
}


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_what_is_no_figure_or_cannot_gain_stays_as_it_was(kind):
    text = UNTOUCHED[kind]()
    assert promote.smaller_png(text) == text


def test_line_breaks_in_the_base64_do_not_matter():
    text = encoded(shuffled(GRID[:9]))
    broken_up = base64.encodebytes(base64.b64decode(text)).decode()
    assert "\n" in broken_up.strip()
    assert promote.smaller_png(broken_up) == promote.smaller_png(text) != text


# The files of figures/


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """The figures of a run in a repository of their own."""
    monkeypatch.setattr(promote, "ROOT", tmp_path)
    folder = tmp_path / "runs/figures/quick"
    folder.mkdir(parents=True)
    return folder


def promoted(run_folder):
    return {path.name: path.read_bytes() for path in (run_folder.parents[2] / "figures").iterdir()}


def test_figures_animations_and_their_data_are_copied_as_they_are(run_folder):
    files = {"a.png": b"png", "a.csv": b"1", "b.gif": b"gif", "b.csv": b"2", "c.png": b"x", "c.gif": b"y", "d.0.gif": b"z"}
    for name, content in {**files, "alone.csv": b"3", "note.txt": b"4"}.items():
        (run_folder / name).write_bytes(content)
    assert promote.promote_figures() == []
    assert promoted(run_folder) == files


@pytest.mark.parametrize("suffix", ["png", "gif", "csv"])
def test_a_figure_with_too_large_a_file_is_refused_with_all_its_files_and_the_others_are_copied(run_folder, suffix):
    for name in ("large", "limit"):
        for each in ("png", "gif", "csv"):
            (run_folder / f"{name}.{each}").write_bytes(b"small")
    (run_folder / f"limit.{suffix}").write_bytes(bytes(2_000_000))
    (run_folder / f"large.{suffix}").write_bytes(bytes(2_000_001))
    (refused,) = promote.promote_figures()
    assert refused == f"runs/figures/quick/large.{suffix} has 2,000,001 bytes; the limit is 2,000,000"
    assert promoted(run_folder).keys() == {"limit.png", "limit.gif", "limit.csv"}


def test_a_run_without_figures_is_an_error(run_folder):
    (run_folder / "alone.csv").write_text("3")
    assert "make paper" in promote.promote_figures()[0]
