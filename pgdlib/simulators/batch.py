"""Simulations of a MuJoCo model side by side: what the batches of all domains share."""

import numpy as np

from pgdlib.simulators import default_threads, import_mujoco


class Batch:
    """`n` simulations of `model` in closed loop, on `threads` threads; `substeps` physics steps for each action.

    Actions [n, action_dim] are clipped to [-1, 1]; controls are centre + reach * action. A domain adds its `_observe`.

    MuJoCo puts a simulation that it cannot step (not finite, or too fast) back to the start and goes on. Here its
    observations are NaN from then until it is placed anew; the others are untouched.
    """

    def __init__(self, model, n: int, threads: int | None, substeps: int, centre: np.ndarray, reach: np.ndarray):
        warnings = import_mujoco().mjtWarning
        from mujoco import batch

        self.model, self.n, self._substeps, self._centre, self._reach = model, n, substeps, centre, reach
        self._batch = batch.Batch(model, n, threads or default_threads())
        self._warnings = self._batch.warning[..., 1]
        self._fatal = [int(getattr(warnings, f"mjWARN_BAD{of}")) for of in ("QPOS", "QVEL", "QACC", "CTRL")]
        self._broken = np.zeros(n, dtype=bool)
        names = ("qpos", "qvel", "ctrl", "qacc_warmstart")
        self._qpos, self._qvel, self._ctrl, self._warmstart = (self._batch.bind(name) for name in names)

    def observe(self) -> np.ndarray:
        """The observations [n, obs_dim] of the gym environment."""
        obs = self._observe()
        obs[self._broken] = np.nan
        return obs

    def _observe(self):
        raise NotImplementedError

    def set_state(self, *state: np.ndarray) -> np.ndarray:
        """Put every simulation into the state qpos, qvel [n, ...] (rad, m, s), ...; the observations [n, obs_dim]."""
        self.place(*state)
        return self._observe_after(self._batch.forward)

    def begin(self, *state: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
        """Start episodes at `state` (k rows, as `Simulator.start`) in simulations `ids` (sorted; all); their observations."""
        ids = np.arange(self.n) if ids is None else np.asarray(ids)
        self._batch.reset(ids.astype(np.int32))
        self._broken[ids] = False
        self._qpos[ids], self._qvel[ids] = state
        return self.observe()[ids]

    def place(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """`set_state` without the observations, which take time."""
        self._qpos[:], self._qvel[:], self._warmstart[:] = qpos, qvel, 0.0
        self._broken[:] = False

    def state(self) -> tuple[np.ndarray, ...]:
        """Copies of qpos and qvel [n, ...], and of what else a domain's state has."""
        return self._qpos.copy(), self._qvel.copy()

    def step(self, actions: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
        """One control step of simulations `ids` (sorted; all) with `actions` [n, action_dim]; the observations [n, obs_dim]."""
        finite = np.isfinite(actions).all(-1)  # MuJoCo prints and logs a warning for each other one, each step anew
        self._broken |= ~finite
        actions = np.where(finite[:, None], np.clip(actions, -1.0, 1.0), 0.0)
        self._ctrl[:] = self._centre + actions * self._reach
        return self._observe_after(self._batch.step, ids=ids if ids is None else ids.astype(np.int32), nstep=self._substeps)

    def _observe_after(self, call, **kwargs):
        self._warnings[:] = 0
        call(**kwargs)
        self._broken |= self._warnings[:, self._fatal].any(1)
        return self.observe()
