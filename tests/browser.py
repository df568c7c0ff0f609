"""A notebook in a real browser: JupyterLab started for a test, Chromium driven by Playwright, and what a person would do.

Nothing of the user's own settings is read, and the browser reaches no machine but this one.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import sync_playwright

SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, also far out of sight
    "docmanager-extension/plugin": {"autosave": False},  # a test decides what is written
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
}
PANEL = "window.jupyterapp.shell.currentWidget"  # the notebook, for scripts in the page
IDLE = f"{PANEL}?.sessionContext?.session?.kernel?.status === 'idle'"
SETTLED = "!document.getElementById('jupyterlab-splash')"  # it covers the page while JupyterLab starts or changes its theme
# Null too where there is another image meanwhile: ipywidgets revokes the address of the one before.
READ_IMAGE = """img => img.complete && img.naturalWidth ? fetch(img.src).then(answer => answer.arrayBuffer()).then(data =>
    [[...new Uint8Array(data)], [img.naturalWidth, img.naturalHeight], [img.width, img.height]], () => null) : null"""


def find_chromium():
    """The path of a Chromium, $CHROMIUM before all others; None where there is none."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


@contextlib.contextmanager
def lab(folder, env=None):
    """The (URL, token) of a JupyterLab that shows `folder`, with `env` beside the environment. It ends, and its kernels do,
    whatever happens; RuntimeError with its log where it does not start.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True) as base:
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "JPY_"))}
        own = {f"JUPYTER_{name}_DIR": f"{base}/{name}" for name in ("CONFIG", "DATA", "RUNTIME")}
        own |= {"IPYTHONDIR": f"{base}/ipython", "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_TOKEN": token}
        for plugin, settings in SETTINGS.items():
            file = Path(base, f"CONFIG/lab/user-settings/@jupyterlab/{plugin}.jupyterlab-settings")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings))
        options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={folder}"]
        options += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly", "--LabApp.news_url="]
        how = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
        how["env"] = outer | own | {k: str(v) for k, v in (env or {}).items()}
        for _ in range(3):  # the free port that a server has found can be taken before it takes it
            with Path(base, "log").open("w") as log:
                server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], stdout=log, **how)
            try:
                if url := answering(server, Path(base, "RUNTIME"), token):
                    yield url, token
                    return
            finally:
                stop(server)
        raise RuntimeError(f"JupyterLab does not start:\n{Path(base, 'log').read_text()[-3000:]}")


def answering(server, runtime, token, timeout=60):
    """The URL of a starting server, once it answers; None where it ends before, or does not answer in `timeout` s."""
    end = time.monotonic() + timeout
    while server.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):  # no file yet, half of one, or nobody listens yet
            url = json.loads((runtime / f"jpserver-{server.pid}.json").read_text())["url"]
            urllib.request.urlopen(f"{url}api/status?token={token}", timeout=5).close()
            return url
        time.sleep(0.1)
    return None


def stop(server):
    """End a server. Asked to, it ends its kernels first; killed, it leaves kernels that end when they miss it."""
    for number, patience in [(signal.SIGTERM, 20), (signal.SIGKILL, 5)]:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, number)
            server.wait(patience)


@contextlib.contextmanager
def notebooks(url, token, screenshots=None, size=(1280, 900)):
    """A function that opens a `Notebook` by its path in a `lab`; all in one headless Chromium, with windows of `size` px."""
    arguments = ["--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    arguments += ["--no-sandbox"] * (os.geteuid() == 0)  # Chromium has no sandbox for root
    viewport, address = dict(zip(("width", "height"), size)), f"{url}lab/tree/{{}}?token={token}&reset"
    how = dict(executable_path=find_chromium() or "chromium", args=arguments)
    with sync_playwright() as playwright, playwright.chromium.launch(**how) as browser:
        yield lambda path: Notebook(browser.new_page(viewport=viewport), address.format(path), screenshots)


@contextlib.contextmanager
def one_cell(source, env=None, size=(1280, 900), timeout=600):
    """The `Notebook` whose only cell is `source`, in a JupyterLab of its own, after it has run (`timeout` s at most)."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(new_notebook(cells=[new_code_cell(source)], metadata={"kernelspec": kernel}), Path(folder, "cell.ipynb"))
        with lab(folder, env) as server, notebooks(*server, size=size) as open_path:
            notebook = open_path("cell.ipynb")
            notebook.run_all(timeout)
            yield notebook


class Notebook:
    """A notebook that is open in JupyterLab. `page` is Playwright's; `complaints` is what the browser's console was told."""

    def __init__(self, page, address, screenshots=None, timeout=60):
        """Open an address and wait for the kernel, `timeout` s at most; that is also Playwright's own patience from now on."""
        self.page, self.screenshots, self.complaints = page, screenshots, []
        page.set_default_timeout(1000 * timeout)
        page.on("console", lambda m: m.type == "error" and self.complaints.append(f"{m.text} ({m.location['url']})"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(address)
        self.wait_for(f"window.jupyterapp && {IDLE} && {SETTLED}", timeout)
        # Errors of callbacks and threads belong to no cell: only JupyterLab's log console has them, a thread's as stderr.
        page.evaluate(
            f"window.heard = []; {PANEL}.sessionContext.iopubMessage.connect((_, {{content}}) => {{"
            "const text = content.traceback?.join('\\n') ?? (content.name === 'stderr' ? content.text : '');"
            "if (text.includes('Traceback (most recent')) window.heard.push(text)})"
        )

    def wait_for(self, expression, timeout=20):
        """Wait until a JavaScript expression is true; Playwright's TimeoutError after `timeout` s."""
        self.page.wait_for_function(f"() => {expression}", timeout=1000 * timeout)

    def command(self, name, timeout=20, **arguments):
        """Carry out a command of JupyterLab, as its menus do, and wait for its end."""
        self._begin("window.jupyterapp.commands.execute(given.name, given.arguments)", name=name, arguments=arguments)
        self._end(name, timeout)

    def execute(self, code, timeout=20):
        """Run `code` in the kernel, in no cell, and wait for its end; what it has printed. `errors` tells if it fails."""
        self._begin(
            f"(future => {{window.printed = ''; future.onIOPub = ({{content}}) => {{if (content.name === 'stdout')"
            f"window.printed += content.text}}; return future.done}})({PANEL}.sessionContext.session.kernel.requestExecute("
            "{code: given.code, store_history: false}))",
            code=code,
        )
        self._end(code, timeout)
        return self.page.evaluate("window.printed")

    def restart(self, timeout=60):
        """Restart the kernel, as the menu does, and wait until it has."""
        self._begin("window.jupyterapp.commands.execute('notebook:restart-kernel')")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self._end("the restart", timeout)
        self.wait_for(IDLE, timeout)

    def _begin(self, promise, **given):
        self.page.evaluate(
            f"given => {{window.ended = null; {promise}.then(() => {{window.ended = 'well'}},"
            "error => {window.ended = String(error)}); return null}",
            given,
        )

    def _end(self, name, timeout):
        self.wait_for("window.ended !== null", timeout)
        assert (how := self.page.evaluate("window.ended")) == "well", f"{name}: {how}"

    def run_all(self, timeout=120):
        """Run all cells and wait for them and for the kernel; AssertionError with the traceback of a cell that fails."""
        self.command("notebook:run-all-cells", timeout)
        self.wait_for(IDLE, timeout)
        assert not (errors := self.errors()), "\n\n".join(errors)
        counts = [c["execution_count"] for c in self.cells() if c["cell_type"] == "code" and c["source"].strip()]
        assert all(counts), f"not every cell has run: {counts}"

    def cells(self):
        """All cells as they are now, outputs and all, in the form of a notebook file."""
        return self.page.evaluate(f"{PANEL}.content.model.toJSON().cells")

    def errors(self):
        """Tracebacks of all that failed in the kernel: of cells, and of callbacks and threads, which no cell shows."""
        return [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in self.page.evaluate("window.heard")]

    def set_theme(self, theme):
        """Change to a theme, such as "JupyterLab Dark"."""
        self.command("apputils:change-theme", theme=theme)
        self.wait_for(f"document.body.dataset.jpThemeName === {json.dumps(theme)} && {SETTLED}")

    def scroll_to(self, selector):
        """Bring the first match into view, once it is there."""
        self.page.locator(selector).first.scroll_into_view_if_needed()

    def screenshot(self, name):
        """What the window shows, as `name`.png; nothing where no folder of screenshots is given."""
        if self.screenshots:
            self.page.screenshot(path=Path(self.screenshots) / f"{name}.png")

    def text(self, selector):
        """The text of the one match, as it is seen."""
        return self.page.locator(selector).inner_text()

    def image(self, selector):
        """The bytes of the one matching <img>, its natural and its shown (width, height) in px; None while it loads."""
        found = self.page.locator(selector).evaluate(READ_IMAGE)
        return found and (bytes(found[0]), tuple(found[1]), tuple(found[2]))


def wait_change(look, before=None, timeout=30):
    """What `look()` returns once it is neither `before` nor None; AssertionError after `timeout` s."""
    end = time.monotonic() + timeout
    while (found := look()) is None or found == before:
        assert time.monotonic() < end, f"no change in {timeout} s"
        time.sleep(0.05)
    return found
