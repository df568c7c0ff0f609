"""What runs side by side: processes of this machine, or tasks of a Ray cluster, and the loop that waits for both.

The future of a process has (its exit status, what to say of it); a status below 0 is a process that was lost.
"""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from datetime import timedelta

from pgdlib.lab import artifacts
from pgdlib.lab.sweep.plan import BadSweep
from pgdlib.lab.sweep.point import LOST

PATIENCE = 10  # s that a process has to end its kernel when it is stopped
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def side_by_side(waiting, start, most, tell, every):
    """Start all of the deque `waiting` in order, at most `most` at once; yield (item, its future) whenever one is over.

    `start(item)` gives a future. Who iterates may put an item back. `tell(items)` hears every so many seconds what runs.
    """
    running, told = {}, time.monotonic()
    while waiting or running:
        while waiting and len(running) < most:
            item = waiting.popleft()
            running[start(item)] = item
        for future in wait(running, every, FIRST_COMPLETED).done:
            yield running.pop(future), future
        if time.monotonic() - told > every:
            told = time.monotonic()
            tell(list(running.values()))


class Processes:
    """Children of this process, at most `most` at once; those that still run at the end of the block are ended."""

    def __init__(self, most):
        self.threads, self.children = ThreadPoolExecutor(most), {}

    def start(self, command, log, environment):
        """The future of a process whose output goes to the file `log`."""
        with open(log, "w") as f:
            how = dict(stdin=subprocess.DEVNULL, stdout=f, stderr=f, start_new_session=True)
            child = subprocess.Popen(command, env={**os.environ, **environment}, **how)
        future = self.threads.submit(self._over, child)
        self.children[future] = child
        return future

    @staticmethod
    def _over(child):
        status = child.wait()
        return status, f"killed by {signal.Signals(-status).name}" if status < 0 else ""

    def point(self, text, folder, environment):
        """The same of a `plan.Point`, given as JSON."""
        command = [sys.executable, "-m", "pgdlib.lab.sweep.point", text, str(os.getpid())]
        return self.start(command, f"{folder}/log.txt", environment)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with _undisturbed():
            for child in self.children.values():
                child.terminate()
            wait(self.children, PATIENCE)
            for child in self.children.values():
                child.kill()


@contextlib.contextmanager
def _undisturbed():
    """A second Ctrl-C must not leave half of what is being ended behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def environment(threads):
    """What a process gets beside the environment that is there; the user's OMP_NUM_THREADS holds for every library."""
    path = os.pathsep.join(filter(None, (str(artifacts.PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    own = {"PGD_RUNS": str(artifacts.root()), "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    return {name: os.environ.get(name) or os.environ.get("OMP_NUM_THREADS") or str(threads) for name in THREADS} | own


@contextlib.contextmanager
def here(workers, points):
    """(what starts a point, how many at once) on this machine: by default as many as `points`, but no more than cores."""
    most = workers or min(CORES, points)
    with Processes(most) as processes:
        yield lambda *point: processes.point(*point, environment(max(1, CORES // most))), most


@contextlib.contextmanager
def on_ray(workers, address, cpus, gpus):
    """The same on a Ray cluster, where each point has `cpus` and `gpus` (which may be a part of one); Ray queues the rest.

    Without an address a cluster is started here, for so many `workers`, that listens on the loopback interface alone.
    """
    ray = _connected(address, math.ceil((workers or CORES) * cpus))
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(at_worker)
    started = []

    def start(*point):
        started.append(remote.remote(*point, environment(max(1, int(cpus))), os.getcwd()))
        return started[-1].future()

    try:
        asked = {name: n for name, n in (("CPU", cpus), ("GPU", gpus)) if n}
        if not any(all(node["Resources"].get(k, 0) >= n for k, n in asked.items()) for node in ray.nodes() if node["Alive"]):
            raise BadSweep(f"no machine of the cluster has {' and '.join(f'{n:g} {k}' for k, n in asked.items())} for a point")
        yield start, workers or math.inf
    finally:
        with _undisturbed():
            for ref in started:
                ray.cancel(ref)
            if started:
                ray.wait(started, num_returns=len(started), timeout=PATIENCE)
            ray.shutdown()


def _connected(address, cores):
    """Ray, with the cluster at the address, or with one of so many cores on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:  # Ray listens on all interfaces unless it is told that this machine is all there is
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray

        if address and (where := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)):  # Ray itself would try for minutes
            socket.create_connection((where[1], int(where[2])), timeout=10).close()
        where = {"address": address} if address else dict(address="local", include_dashboard=False, num_cpus=cores)
        path = {"env_vars": {"PYTHONPATH": environment(1)["PYTHONPATH"]}}
        ray.init(logging_level="ERROR", log_to_driver=False, runtime_env=path, **where)
    except ImportError as e:
        raise BadSweep("--backend ray needs Ray: pip install -e '.[cluster]'") from e
    except Exception as e:  # Ray raises many kinds, and bare ones
        raise BadSweep(f"Ray cannot be {f'reached at {address}' if address else 'started'}: {e}") from e
    return ray


def at_worker(text, folder, environment, cwd):
    """What a worker of the cluster does: what a future has. Cancelled, it takes the point's process with it."""
    if not os.path.isdir(folder):
        return 1, f"{socket.gethostname()} has no {folder}: PGD_RUNS must lie on a file system that all machines share"
    with contextlib.chdir(cwd if os.path.isdir(cwd) else folder), Processes(1) as processes:
        future = processes.point(text, folder, environment)
        while wait([future], 0.5).not_done:  # it is between two waits that Ray can cancel
            pass
    return future.result()


def sweep(points, backend, retries, say):
    """Run the points on the `backend`, a context as `here`; key -> (point, why) of those that failed. `say` prints a line."""
    waiting, failed, lost, done, begun = deque(points), {}, Counter(), 0, time.monotonic()

    def begin(point):
        point.folder.mkdir(parents=True, exist_ok=True)
        return start(json.dumps(asdict(point)), str(point.folder))

    def tell(running):
        say(f"running {', '.join(point.name for point in running[:8])}; {len(running)} run or queue, {len(waiting)} wait")

    with backend as (start, most):
        for point, future in side_by_side(waiting, begin, most, tell, every=120):
            status, why = (-1, f"lost: {type(e).__name__}") if (e := future.exception()) else future.result()
            if status == 0:
                done += 1
                left = timedelta(seconds=round((time.monotonic() - begun) / done * (len(points) - done - len(failed))))
                say(f"done    {point.name}; {done} of {len(points)} done, about {left} left")
            elif (status < 0 or status == LOST) and lost[point.key] < retries:
                lost[point.key] += 1
                waiting.appendleft(point)
                say(f"again   {point.name}: {why or 'its kernel died'}")
            else:
                failed[point.key] = point, "\n".join(f"  {line}" for line in [*tail(point.folder / "log.txt"), why] if line)
                say(f"FAILED  {point.name}")
    return failed


def tail(log, lines=6):
    """The last lines of a log, but for the warnings that every kernel gives."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return [line for line in re.split(r"[\r\n]+", text.strip()) if "[IPKernelApp]" not in line][-lines:]
