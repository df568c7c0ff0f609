"""One point of a sweep, in a process of its own: `python -m pgdlib.lab.sweep.point POINT PARENT`.

POINT is a `plan.Point` as JSON. What the point writes goes into its folder, and done.json comes last, when all else is whole.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time

import papermill
from nbclient.exceptions import DeadKernelError

from pgdlib.lab import artifacts, inventory
from pgdlib.lab.sweep import plan
from pgdlib.simulators import default_threads

# What all points share, in the folder of all runs; everything else that a notebook writes is its point's own.
COMMON = (*inventory.KINDS, "minari")
LOST = 75  # the exit status of a point that may do better if it is run again


def main(text, parent):
    """Run the point unless it is done; other processes that are asked for the same wait, and find it done."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that kernels are ended on the way out
    threading.Thread(target=_follow, args=(int(parent),), daemon=True).start()
    point = plan.Point(**json.loads(text))
    with artifacts.lock(point.folder / "done.json"):
        if point.record:
            return
        differs = [k for k, v in plan.identity(point.modules).items() if v != point.identity[k]]
        if differs:
            sys.exit(f"{' and '.join(differs)} differ from those that the sweep was planned with: start it again")
        begun, clock = time.time(), time.monotonic()
        _run(point)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the rest is written whole: it takes less time than stopping may
        card = dict(vars(point), begun=begun, seconds=time.monotonic() - clock, threads=default_threads())
        with artifacts.replacing(point.folder / "done.json") as partial:
            partial.write_text(json.dumps({**card, "versions": artifacts.versions()}, indent=1), encoding="utf-8")


def _follow(parent):
    """End this process when the one that started it is gone: no point goes on behind a sweep that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)


def _run(point):
    root, folder = artifacts.root(), point.folder
    for left in (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
        shutil.rmtree(left)  # of an attempt that was stopped
    for name in COMMON:
        (root / name).mkdir(exist_ok=True)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(os.path.relpath(root / name, folder))
    os.environ["PGD_RUNS"] = str(folder)  # of the kernel
    source, output = folder.parent / f"{point.identity['cells']}.ipynb", folder / "notebook.ipynb"
    try:
        papermill.execute_notebook(source, output, point.given, kernel_name="python3", progress_bar=False)
    except papermill.PapermillExecutionError as e:
        sys.exit(f"cell {e.exec_count}: {e.ename}: {e.evalue}")
    except DeadKernelError:
        print("its kernel died: killed by the system, perhaps for want of memory", file=sys.stderr)
        sys.exit(LOST)
    finally:
        os.environ["PGD_RUNS"] = str(root)


if __name__ == "__main__":
    main(*sys.argv[1:])
