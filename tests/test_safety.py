"""What a stranger could misuse: no data file is executed, no path in a parameter is written to, nobody else can connect."""

import ast
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import psutil
import pytest
import torch
from browser import answering, stop
from conftest import kept, replay, white
from inputs import PATHS, ROOT, no_writes, tried

from pgdlib.lab import artifacts, load, minari_files, models
from pgdlib.simulators import pen as adroit

UNPICKLE = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}  # modules
EXECUTE = {"eval", "exec", "compile", "__import__", "execfile"}  # Python's own functions
LOAD = {"read_pickle", "unsafe_load", "full_load", "jit.load", "hub.load", "yaml.load", "PPO.load", "VecNormalize.load"}
REASONED = {  # (file name, call): what is executed there is no data
    ("guide_zip.py", "pickle"): "its Unpickler makes numpy's arrays, and of all else objects that do nothing",
    ("parallel.py", "dist.broadcast_object_list"): "between the processes of one training, never from a file",
    ("plan.py", "compile"): "the first cells of the notebook that the user has named, as papermill will",
    ("plan.py", "exec"): "the same",
}


def suspects(source):
    """What in Python source can execute the content of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in UNPICKLE)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLE:
            yield node.module
        elif isinstance(node, ast.Call):
            name, named = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            risky = name in EXECUTE or any(name == one or name.endswith(f".{one}") for one in LOAD) or "_object" in name
            risky |= name.endswith("torch.load") and named.get("weights_only") != "True"
            if risky or named.get("allow_pickle", "False") != "False":
                yield name


def sources():
    """(name, Python) of every module and every notebook that we ship."""
    for folder in ("pgdlib", "tools", "benchmarks"):
        yield from ((str(p.relative_to(ROOT)), p.read_text()) for p in sorted((ROOT / folder).glob("**/*.py")))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        yield f"notebooks/{path.name}", "\n".join(re.sub(r"^\s*[%!].*$", "", cell, flags=re.MULTILINE) for cell in cells)


def test_no_source_of_ours_can_execute_a_data_file():
    found = {(Path(file).name, name) for file, source in sources() for name in suspects(source)}
    assert found == REASONED.keys()


RISKY = """import pickle
from joblib import load
torch.load(f)
torch.load(f, weights_only=False)
np.load(f, allow_pickle=True)
x = pd.read_pickle(f)
eval(f.read())
exec(compile(f.read(), 'a', 'exec'))
stable_baselines3.PPO.load(f)
yaml.load(f, Loader)"""


@pytest.mark.parametrize("source", RISKY.splitlines())
def test_the_search_finds_what_it_is_for(source):
    assert [*suspects(source)]
    assert not [*suspects("torch.load(f, weights_only=True); np.load(f); ast.literal_eval(s); json.load(f); re.compile(s)")]


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bombs(tmp_path):
    """The file that a bomb makes when it goes off, and files that hold one, of many forms."""
    trace, raw, saved = tmp_path / "executed", tmp_path / "raw", tmp_path / "saved"
    raw.write_bytes(pickle.dumps(Bomb(trace)))
    torch.save({"w": torch.zeros(2), "bomb": Bomb(trace)}, saved)
    for read in (lambda: pickle.loads(raw.read_bytes()), lambda: torch.load(saved, weights_only=False)):
        read()
        assert trace.exists()  # so it goes off where it is let in
        trace.unlink()
    inside = tmp_path / "inside"
    with zipfile.ZipFile(inside, "w") as z:
        z.writestr("policy.pth", saved.read_bytes())
        z.writestr("data", json.dumps({"policy_class": {":serialized:": raw.read_bytes().hex()}}))
    return trace, [p.read_bytes() for p in (raw, saved, inside)]


READERS = {"guide": load.load_guide, "denoiser": lambda path: models.load_denoiser(None, SimpleNamespace(denoiser=path), "cpu")}


def test_a_pickle_in_place_of_a_guide_or_a_denoiser_is_not_executed(bombs, tmp_path):
    trace, contents = bombs
    for content in contents:
        for name in ("bomb.zip", "bomb.safetensors", "bomb"):
            (tmp_path / name).write_bytes(content)
            for parameter, read in READERS.items():
                with pytest.raises(ValueError, match=rf"{parameter}=.*bomb"):
                    read(str(tmp_path / name))
            assert not trace.exists()


def test_a_pickle_in_place_of_a_dataset_or_an_artifact_is_not_executed(bombs, tmp_path):
    (trace, contents), rng = bombs, np.random.default_rng(0)
    episodes = [adroit.rollout(replay(white(rng, 2, 4)), 2, rng, 4)]
    for number, content in enumerate(contents):
        for file in ("data/main_data.hdf5", "data/metadata.json"):
            folder = minari_files.write_minari(tmp_path / f"{number}", f"standin/pen/{file[5:7]}-v0", episodes, "a toy")
            (folder / "sha256").unlink()
            (folder / file).write_bytes(content)
            with pytest.raises(artifacts.CorruptArtifact):
                minari_files.from_minari(folder, "toy")
        artifact = tmp_path / "one.safetensors"
        artifact.write_bytes(content)
        tensors, _ = artifacts.artifact(artifact, lambda: ({"made": torch.ones(1)}, {}))
        assert tensors["made"] == 1 and not trace.exists()


def test_a_path_in_a_parameter_is_read_and_never_written_to(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(path):
        with no_writes():
            for name, read in READERS.items():
                with pytest.raises(ValueError) as error:
                    read(path)
                assert f"{name}={path!r}" in str(error.value)
        return "refused"

    tried(refused, PATHS, examples=60)
    assert kept(tmp_path) == []


ALONE = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def sockets(process):
    """(address, port) of all that a process and those it started listen on, or take datagrams at."""
    found = []
    for each in [process, *process.children(recursive=True)]:
        for c in each.net_connections("inet"):
            if c.status == psutil.CONN_LISTEN or (c.type == 2 and not c.raddr):
                found.append((c.laddr.ip, c.laddr.port))
    return found


def only_here(process, at_least):
    """Waits for so many sockets; all are of this machine alone."""
    end = time.monotonic() + 90
    while len(found := sockets(psutil.Process(process.pid))) < at_least and time.monotonic() < end and process.poll() is None:
        time.sleep(0.2)
    assert len(found) >= at_least, found
    assert {ip for ip, _ in found} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found


@pytest.fixture
def of_its_own(tmp_path):
    """An environment without the user's Jupyter settings, and its folder of running servers."""
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "JPY_"))}
    return outer | own | {"IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_PREFER_ENV_PATH": "1"}, tmp_path / "RUNTIME"


def status(url, token=None, body=None):
    """(HTTP status, address after redirects) of a request."""
    headers = {"Authorization": f"token {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
            return answer.status, answer.url
    except urllib.error.HTTPError as e:
        return e.code, url


@pytest.mark.notebook
def test_make_lab_listens_here_alone_and_asks_for_its_token(of_its_own):
    (recipe,) = re.findall(r"^lab:.*\n\t(.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    program, *rest = recipe.split()
    command = [program.replace("$(BIN)", str(Path(sys.executable).parent)), *rest, "--no-browser", "--port=0"]
    command += ["--allow-root"] * (os.geteuid() == 0)
    environment, runtime = of_its_own
    server = subprocess.Popen(command, cwd=ROOT, env=environment, **ALONE)
    try:
        end = time.monotonic() + 90
        told = runtime / f"jpserver-{server.pid}.json"  # for a moment it is there and empty
        while not (told.exists() and told.read_text().endswith("}")) and time.monotonic() < end:
            time.sleep(0.1)
        token = json.loads(told.read_text())["token"]
        assert len(token) >= 32
        url = answering(server, runtime, token)
        assert status(f"{url}api/contents", token)[0] == 200
        assert status(f"{url}api/kernels", token, b"{}")[0] == 201  # its sockets count too
        for path in ("api/contents", "api/kernels", "api/terminals", "files/01_data.ipynb"):
            for wrong in (None, "0" * len(token)):
                code, where = status(url + path, wrong, b"{}" if path == "api/kernels" else None)
                assert code == 403 or "/login" in where, (path, code, where)
        assert "/login" in status(f"{url}lab")[1]
        only_here(server, 6)  # the server's own, and five of the kernel
    finally:
        stop(server)


@pytest.mark.notebook
def test_a_papermill_kernel_listens_here_alone(of_its_own, tmp_path):
    cell = nbformat.v4.new_code_cell("import time; time.sleep(120)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "waits.ipynb")
    command = [sys.executable, "-m", "papermill", "-k", "python3", tmp_path / "waits.ipynb", tmp_path / "out.ipynb"]
    process = subprocess.Popen(command, env=of_its_own[0], **ALONE)
    try:
        only_here(process, 5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
