"""The book: README, the executed notebooks and the library's reference as one static site, runs/book/html/index.html.

python -m tools.book    as `make book` does

The notebooks stand as they are committed: nothing is run. Pages are staged in runs/book/source, where links to code lead to its
reference, and each claim of README's table to the cells that judge it. The site reads nothing from the network: formulas are
MathML, which browsers draw themselves. This module is also the Sphinx extension with which it is built.
"""

import ast
import pkgutil
import re
import shutil
import sys
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

from tools import promote

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STYLE = """
html[data-theme="dark"] .cell_output caption { color: black; }  /* the theme puts tables on a light ground */
.indextable { table-layout: fixed; width: 100%; overflow-wrap: anywhere; }
"""
CODE = re.compile(r"\]\((?:\.\./)?(pgdlib(?:/\w+)*?)(?:/__init__)?(?:\.py)?\)")  # links to files and folders of the library
CONTENTS = "\n\n```{{toctree}}\n:hidden:\n:caption: {}\n{}\n```\n"
PLACES = {"Reference: the core": "pgdlib", "Reference: the study": "pgdlib.lab"}
OPTIONS = {
    "extensions": ["myst_nb", "sphinx.ext.autodoc", "tools.book"],
    "project": "Policy-Guided Diffusion, step by step",
    "html_title": "Policy-Guided Diffusion, step by step",
    "copyright": "The pgdlib authors, MIT licence",
    "html_theme": "sphinx_book_theme",
    "html_math_renderer": "mathml",
    "html_copy_source": False,
    "html_show_sourcelink": False,
    "html_theme_options": {
        "use_download_button": False,
        "use_fullscreen_button": False,
        "show_toc_level": 2,
        "navbar_persistent": [],  # the search field stands in the sidebar
    },
    "html_context": {"default_mode": "auto"},  # light or dark
    "html_css_files": ["book.css"],
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},  # or pages would ask the network for them; each widget has a picture beside it
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 4,
    "default_role": "code",
    "highlight_language": "text",  # where a block of README names none
    "autodoc_member_order": "bysource",
    "autodoc_preserve_defaults": True,
}


def judges():
    """claim, such as "C1" -> links to the cells of notebooks that judge it, by its rule in `claims.py`."""
    body = ast.parse((ROOT / "pgdlib/lab/claims.py").read_text("utf-8")).body
    functions = [f for f in body if isinstance(f, ast.FunctionDef)]
    rules = {f.name: found[0] for f in functions if (found := re.match(r"C\d+", ast.get_docstring(f) or ""))}
    links = {}
    for path in NOTEBOOKS:
        for cell in promote.code_cells(nbformat.read(path, as_version=4)):
            for name in rules.keys() & re.findall(r"claims\.(\w+)\(", cell.source):
                links.setdefault(rules[name], []).append(f"[{path.stem[:2]}](notebooks/{path.name}#{cell.id})")
    return links


def linked(text, up=""):
    """Markdown in which links to code lead to its page in the reference."""
    return CODE.sub(lambda match: f"]({up}reference/{match[1].replace('/', '.')}.rst)", text)


def modules(package):
    """All public modules of `package`, itself first, without the lab where it is not of the lab."""
    path = ROOT / package.replace(".", "/")
    names = [package, *(m.name for m in pkgutil.walk_packages([str(path)], f"{package}."))]
    return [n for n in names if not re.search(r"\._", n) and (package == "pgdlib.lab" or not n.startswith("pgdlib.lab"))]


def stage(source):
    """Write all pages into the folder `source`."""
    shutil.rmtree(source, ignore_errors=True)
    for folder in ("notebooks", "reference", "benchmarks"):
        (source / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "figures", source / "figures", ignore=shutil.ignore_patterns("*.parquet", "*.json"))
    (source / "static").mkdir()
    (source / "static/book.css").write_text(STYLE)
    shutil.copyfile(ROOT / "CITATION.cff", source / "CITATION.cff")
    front = linked((ROOT / "README.md").read_text("utf-8"))
    for claim, links in judges().items():
        front = re.sub(rf"^\| {claim} \|", f"| {claim}: {', '.join(links)} |", front, flags=re.MULTILINE)
    front += CONTENTS.format("Notebooks", "\n".join(f"notebooks/{path.stem}" for path in NOTEBOOKS))
    for caption, package in PLACES.items():
        names = modules(package)
        front += CONTENTS.format(caption, "\n".join(f"reference/{name}" for name in names))
        for name in names:
            page = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n"
            (source / f"reference/{name}.rst").write_text(page, "utf-8")
    (source / "index.md").write_text(front + CONTENTS.format("What was measured and tried", "benchmarks/NOTES"), "utf-8")
    shutil.copyfile(ROOT / "benchmarks/NOTES.md", source / "benchmarks/NOTES.md")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":  # JupyterLab's anchors have capitals, Sphinx's have none
                cell.source = re.sub(r"\]\(#[^)]+\)", lambda match: match[0].lower(), linked(cell.source, "../"))
        nbformat.write(notebook, source / "notebooks" / path.name)


def name_cells(app, doctree):
    """Each code cell of a notebook can be linked to by its id."""
    if (path := Path(app.srcdir, f"{app.env.docname}.ipynb")).exists():
        cells = nbformat.read(path, as_version=4).cells
        for node in doctree.findall(nodes.container):
            if "cell_index" in node:
                name = cells[node["cell_index"]].id
                node["ids"].append(name)
                app.env.metadata[app.env.docname].setdefault("myst_slugs", {})[name] = (node.line, name, name)


def plain(app, what, name, obj, options, lines):
    """Docstrings as they are meant: |, * and _ are mathematics and names, and what stands in two columns is a list."""
    row = re.compile(r"(\S+(?: \S+)*?)  +(\S.*)")
    mark = re.compile(r"`[^`]*`|[|*]|_(?!\w)")  # but not in code
    listed = False
    for i, line in enumerate(lines):
        line = mark.sub(lambda m: m[0] if m[0][0] == "`" else f"\\{m[0]}", line)
        if found := row.fullmatch(line):
            lines[i] = f"{found[1]}\n    {found[2]}"
        else:
            lines[i] = f"    {line.strip()}" if listed and line.startswith(" ") else line
        listed = bool(found) or (listed and line.startswith(" "))
    lines[:] = "\n".join(lines).splitlines()


def setup(app):
    """Sphinx calls this of an extension."""

    def formula(self, node, as_block):
        self.body.append(tex2mathml(node.astext(), as_block=as_block))
        raise nodes.SkipNode

    inline, block = ((lambda self, node, b=b: formula(self, node, b), None) for b in (False, True))
    app.add_html_math_renderer("mathml", inline, block)
    app.connect("doctree-read", name_cells)
    app.connect("autodoc-process-docstring", plain)
    return {"parallel_read_safe": True}


def build(folder):
    """Build the book in `folder`: the path of its first page, and how many warnings there were."""
    source = folder / "source"
    stage(source)
    options = OPTIONS | {"html_static_path": [str(source / "static")]}
    app = Sphinx(source, None, folder / "html", folder / "doctrees", "html", confoverrides=options, freshenv=True)
    app.build()
    return folder / "html/index.html", app._warncount


if __name__ == "__main__":
    page, warnings = build(ROOT / "runs/book")
    print(page)
    sys.exit(warnings > 0)
