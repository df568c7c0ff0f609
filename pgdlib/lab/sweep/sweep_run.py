"""The run of a sweep: tasks are started in order as soon as what they need is there; how far it is; what is left."""

import contextlib
import json
import signal
import statistics
import time

from rich.live import Live
from rich.table import Table

from pgdlib.lab import artifacts
from pgdlib.lab.sweep import sweep_plan, sweep_task

TICK = 0.05  # s between two looks at what has ended
SHOWN = 6  # lines of the log of what failed


class History:
    """What earlier tasks took, and those of this run, to say what others will take."""

    def __init__(self, tasks):
        folder = artifacts.root() / sweep_plan.FOLDER
        paths = [path for source in {t.source for t in tasks} for path in (folder / source).glob("*/done.json")]
        self.records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def seconds(self, task):
        """The median of those most like `task`: of its kind and scale, with as many of its settings as any; or None."""
        alike, own = {}, (task.kind, task.source, task.settings.get("scale"))
        for r in self.records:
            if (r["kind"], r["source"], r["settings"].get("scale")) == own:
                same = sum(r["settings"].get(k, task) == v for k, v in task.settings.items())
                alike.setdefault(same, []).append(r["seconds"])
        return statistics.median(alike[max(alike)]) if alike else None

    def plan(self, tasks):
        """The lines of a dry run."""
        costs = [self.seconds(task) for task in tasks]
        for task, cost in zip(tasks, costs):
            yield f"  {task.name}: {'unknown' if cost is None else words(cost)}"
        known = [cost for cost in costs if cost is not None]
        unknown = f", and {len(costs) - len(known)} of unknown cost: nothing like them has run yet" * (len(known) < len(costs))
        yield f"{len(tasks)} to run: {words(sum(known))} on one worker{unknown}"


class Run:
    """The tasks of a sweep while they run. `say` prints a line."""

    def __init__(self, tasks, history, console, say):
        self.tasks, self.history, self.console, self.say = {task.key: task for task in tasks}, history, console, say
        self.waiting, self.begun, self.done, self.failed, self.lost = list(self.tasks), {}, set(), {}, {}
        self.workers = 1

    def go(self, make_pool, retries):
        """Run all on the pool that `make_pool` gives; key -> (task, why) of those that failed."""
        with contextlib.ExitStack() as stack:
            pool = make_pool()
            self.workers = pool.workers
            stack.callback(_stop, pool)
            live = stack.enter_context(Live(console=self.console, auto_refresh=False, transient=True))
            told = 0.0
            while self.waiting or self.begun:
                self._start(pool)
                for key, status, why in pool.ended():
                    self._ended(key, status, why, retries)
                if self.console.is_terminal and time.monotonic() - told > 0.5:
                    live.update(self.view(), refresh=True)
                    told = time.monotonic()
                time.sleep(TICK)
        return self.failed

    def _start(self, pool):
        for key in list(self.waiting):
            task = self.tasks[key]
            if broken := [n for n in task.needs if n in self.failed]:
                self.waiting.remove(key)
                self.failed[key] = task, f"  not run: {self.tasks[broken[0]].name} failed"
            elif pool.free and self.done.issuperset(task.needs):
                self.waiting.remove(key)
                task.prepare()
                pool.start(task)
                self.begun[key] = None
        for key in self.begun:
            if self.begun[key] is None and (self.tasks[key].folder / "log.txt").exists():  # else it queues in the pool
                self.begun[key] = time.monotonic()

    def _ended(self, key, status, why, retries):
        task, begun = self.tasks[key], self.begun.pop(key)
        took = f" after {words(time.monotonic() - begun)}" if begun else ""
        if status == 0:
            self.done.add(key)
            self.history.records.append(task.record)
            self.say(f"done    {task.name}{took}; {self.progress()}")
        elif (status < 0 or status == sweep_task.LOST) and self.lost.get(key, 0) < retries:
            self.lost[key] = self.lost.get(key, 0) + 1
            self.waiting.insert(0, key)
            self.say(f"again   {task.name}{took}: {why or 'its kernel died'}")
        else:
            log = task.folder / "log.txt"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
            lines = [line for line in lines if "[IPKernelApp]" not in line]  # its warnings, of every kernel
            self.failed[key] = task, "\n".join(f"  {line}" for line in [*lines[-SHOWN:], *([why] if why else [])])
            self.say(f"FAILED  {task.name}{took}")

    def progress(self):
        """How many are done, in words, and how long the rest will take, as far as one can know."""
        left = [self.history.seconds(self.tasks[k]) for k in (*self.waiting, *self.begun)]
        text = f"{len(self.done)} of {len(self.tasks)} done"
        if not left or None in left:
            return text
        gone = [0.0] * len(self.waiting) + [time.monotonic() - begun if begun else 0.0 for begun in self.begun.values()]
        left = [max(0.0, each - since) for each, since in zip(left, gone)]
        return f"{text}, about {words(max(max(left), sum(left) / self.workers))} left"

    def view(self):
        """The live table: what runs, and a line for the rest."""
        table = Table.grid(padding=(0, 2))
        for key, begun in self.begun.items():
            state = ("running", words(time.monotonic() - begun)) if begun else ("queued", "")
            table.add_row(state[0], self.tasks[key].name, state[1])
        table.add_row("", f"{self.progress()}; {len(self.begun)} started, {len(self.waiting)} wait, {len(self.failed)} failed")
        return table


def _stop(pool):
    """End what runs; a second Ctrl-C must not leave half of it behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool.stop()
    signal.signal(signal.SIGINT, before)


def words(seconds):
    """A time for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
