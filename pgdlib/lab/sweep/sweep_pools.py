"""Where the tasks of a sweep run: processes on this machine, or a Ray cluster.

A pool has `start(task)`, `free` (whether to start another), `ended()`, a list of (key, exit status, what to say of it) that are
over, and `stop()`. A negative status is a process that was lost: killed, or with its machine.
"""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pgdlib.lab import artifacts

PATIENCE = 10  # s that a task has to end its kernel when it is stopped
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
RAY = "--backend ray needs Ray: pip install -e '.[cluster]'"


class Unfit(Exception):
    """A backend that cannot run the sweep, and why."""


def environment(threads):
    """What a task's process gets beside the environment that is there; numbers of threads only where there are none yet."""
    path = os.pathsep.join(filter(None, (str(artifacts.PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    own = {"PGD_RUNS": str(artifacts.root()), "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    return {name: os.environ.get(name, str(threads)) for name in THREADS} | own


def run(folder, environment, cwd):
    """Start the task of `folder` as a child of this process, in a session of its own; its output goes to log.txt."""
    command = [sys.executable, "-m", "pgdlib.lab.sweep.sweep_task", folder, str(os.getpid())]
    with open(os.path.join(folder, "log.txt"), "w") as log:
        how = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        return subprocess.Popen(command, env={**os.environ, **environment}, cwd=cwd, **how)


class Local:
    """`workers` processes at once, each with its share of the cores that this process may use.

    By default there are as many as `points`, but no more than cores.
    """

    def __init__(self, workers=None, points=None):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
        workers = workers or min(len(cores), points or len(cores))
        self.threads = max(1, len(cores) // workers)
        self.slots = [{cores[(i * self.threads + j) % len(cores)] for j in range(self.threads)} for i in range(workers)]
        self.workers, self.children = workers, {}

    @property
    def free(self):
        return bool(self.slots)

    def start(self, task):
        child, cores = run(str(task.folder), environment(self.threads), None), self.slots.pop(0)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(child.pid, cores)
        self.children[task.key] = child, cores

    def ended(self):
        over = [(key, *each) for key, each in self.children.items() if each[0].poll() is not None]
        for key, _, cores in over:
            del self.children[key]
            self.slots.append(cores)
        lost = {key: signal.Signals(-c.returncode).name if c.returncode < 0 else "" for key, c, _ in over}
        return [(key, c.returncode, lost[key] and f"killed by {lost[key]}") for key, c, _ in over]

    def stop(self):
        end([child for child, _ in self.children.values()])


class Ray:
    """Tasks of a Ray cluster, each with `cpus` and `gpus` (which may be a part of one); Ray queues what does not fit.

    Without an address a cluster is started here, for so many `workers`, that listens on the loopback interface alone.
    """

    def __init__(self, workers=None, address=None, cpus=1.0, gpus=0.0):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:  # Ray listens on all interfaces unless it is told that this machine is all there is
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        try:
            import ray
        except ImportError as e:
            raise Unfit(RAY) from e

        self.ray, self.tasks, self.threads, self.most = ray, {}, max(1, int(cpus)), workers
        path = {"env_vars": {"PYTHONPATH": environment(1)["PYTHONPATH"]}}
        quiet = dict(logging_level="ERROR", log_to_driver=False, runtime_env=path)
        if address and (where := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)):  # Ray itself would try for minutes
            try:
                socket.create_connection((where[1], int(where[2])), timeout=10).close()
            except OSError as e:
                raise Unfit(f"Ray cannot be reached at {address}: {e}") from e
        cores = math.ceil(Local(workers).workers * cpus)  # 2.0 would stop Ray's node without a word
        own = dict(address="local", include_dashboard=False, num_cpus=cores)
        try:
            ray.init(**quiet, **({"address": address} if address else own))
        except Exception as e:  # Ray raises many kinds, and bare ones
            raise Unfit(f"Ray cannot be {f'reached at {address}' if address else 'started'}: {e}") from e
        asked = {name: n for name, n in (("CPU", cpus), ("GPU", gpus)) if n}
        there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(int(min(node.get(name, 0) / n for name, n in asked.items())) for node in there)
        if not room:
            wanted = " and ".join(f"{n:g} {name}" for name, n in asked.items())
            raise Unfit(f"no machine of the cluster has {wanted} for a point")
        self.workers = min(room, workers or room)
        self.remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(on_ray)

    @property
    def free(self):
        return self.most is None or len(self.tasks) < self.most

    def start(self, task):
        own = environment(self.threads)
        self.tasks[self.remote.remote(str(task.folder), own, os.getcwd())] = task.key

    def ended(self):
        over, _ = self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0) if self.tasks else ([], [])
        return [(self.tasks.pop(ref), *self._outcome(ref)) for ref in over]

    def _outcome(self, ref):
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayError as e:  # a worker, or its node, is gone
            return -1, f"lost: {type(e).__name__}"

    def stop(self):
        for ref in self.tasks:
            self.ray.cancel(ref)
        if self.tasks:
            self.ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=PATIENCE)
        self.ray.shutdown()


def on_ray(folder, environment, cwd):
    """What a worker of the cluster does: (exit status, what to say of it). Cancelled, it takes the task's process with it."""
    if not Path(folder).is_dir():
        shared = "PGD_RUNS must lie on a file system that all machines share"
        return 1, f"{socket.gethostname()} has no {folder}: {shared}"
    child = run(folder, environment, cwd if os.path.isdir(cwd) else folder)
    try:
        return child.wait(), ""
    finally:
        end([child])


def end(children):
    """End processes and what they have started, in good order if they take less than `PATIENCE`."""
    until = time.monotonic() + PATIENCE
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
