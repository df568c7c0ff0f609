"""One task of a sweep, in a process of its own: `python -m pgdlib.lab.sweep.sweep_task FOLDER PARENT`.

FOLDER holds task.json. What the task writes goes there, and done.json comes last, when all else is whole.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import papermill
from nbclient.exceptions import DeadKernelError

from pgdlib.lab import artifacts
from pgdlib.lab.sweep import sweep_plan

# What all points share, in the folder of all runs; everything else that a notebook writes is its point's own.
COMMON = ("agents", "checkpoints", "data", "denoisers", "guides", "minari", "sweeps", "worldmodels")
LOST = 75  # the exit status of a task that may do better if it is run again


def main(folder, parent):
    """Run the task of a folder unless it is done; others that are asked for the same wait, and find it done."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that kernels are ended on the way out
    threading.Thread(target=_follow, args=(int(parent),), daemon=True).start()
    folder = Path(folder)
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    with artifacts.lock(folder / "done.json"):
        if (folder / "done.json").exists() and task["kind"] == "point":
            return
        differs = [k for k, v in sweep_plan.identity(task["rooms"]).items() if v != task["identity"][k]]
        if differs:
            sys.exit(f"{' and '.join(differs)} differ from those that the sweep was planned with: start it again")
        begun, clock = time.time(), time.monotonic()
        (_point if task["kind"] == "point" else _make)(task, folder)
        card = dict(begun=begun, seconds=time.monotonic() - clock, threads=int(os.environ.get("OMP_NUM_THREADS", 0)))
        if (folder / "done.json").exists():  # what was made before was found again, in no time
            return
        with artifacts.replacing(folder / "done.json") as partial:
            partial.write_text(json.dumps({**task, **card, "versions": artifacts.versions()}, indent=1), encoding="utf-8")


def _follow(parent):
    """End this process when the one that started it is gone: no point goes on behind a sweep that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)


def _point(task, folder):
    root = artifacts.root()
    for left in (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        shutil.rmtree(left)  # of an attempt that was stopped
    for name in COMMON:
        (root / name).mkdir(exist_ok=True)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(os.path.relpath(root / name, folder))
    os.environ["PGD_RUNS"] = str(folder)  # of the kernel
    source, output = folder.parent / f"{task['identity']['cells']}.ipynb", folder / "notebook.ipynb"
    try:
        papermill.execute_notebook(source, output, task["given"], kernel_name="python3", progress_bar=False)
    except papermill.PapermillExecutionError as e:
        sys.exit(f"cell {e.exec_count}: {e.ename}: {e.evalue}")
    except DeadKernelError:
        print("its kernel died: killed by the system, perhaps for want of memory", file=sys.stderr)
        sys.exit(LOST)
    finally:
        os.environ["PGD_RUNS"] = str(root)


def _make(task, folder):
    from pgdlib.lab import load

    p = SimpleNamespace(**task["settings"])
    dataset = load.load_data(p.dataset, p.source, p.data_steps)
    if task["kind"] == "denoiser":
        load.load_denoiser(dataset, p, load.device_of(p.device))
    elif task["kind"] == "world model":
        load.load_world_model(dataset, p, load.device_of(p.device))


if __name__ == "__main__":
    main(*sys.argv[1:])
