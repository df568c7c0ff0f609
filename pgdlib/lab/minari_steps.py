"""The steps of a Minari dataset of whatever environment: Boxes of observations joined, actions scaled, all of it checked."""

import functools

import numpy as np
from gymnasium import spaces


def boxes(space):
    """Where each Box of an observation space stands in the joined observation: names in it -> slice, in sorted order.

    The only Box of a space has the name (). Raises ValueError for a space of anything else.
    """
    sizes, found = [], [((), space)]
    for keys, part in found:  # which grows
        if isinstance(part, spaces.Dict):
            found += [((*keys, key), part[key]) for key in part]
        elif isinstance(part, spaces.Box) and len(part.shape) < 2:
            sizes.append((keys, int(np.prod(part.shape))))
        else:
            raise ValueError(f"its observation{''.join(f'[{k!r}]' for k in keys)} is {part}; needed are Boxes of one dimension")
    ends = np.cumsum([size for _, size in sorted(sizes)])
    return {keys: slice(int(end) - size, int(end)) for (keys, size), end in zip(sorted(sizes), ends)}


def limits(space):
    """The lower and the upper bounds of the actions [action_dim]. Raises ValueError for a space that is no bounded Box."""
    if not isinstance(space, spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
        raise ValueError(f"its action is {space}; needed is a Box of one dimension with bounds")
    return space.low.astype(float), space.high.astype(float)


def steps(e, joined, low, high):
    """The episode `e` of a Minari dataset as arrays by name. Raises ValueError if they are not of the same steps, or spaces."""
    n, where = np.shape(e.rewards)[0], f"episode {e.id}: "

    def checked(of, value, *shape):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" or array.shape != shape:
            raise ValueError(f"{where}{of} is {array.dtype} {array.shape}; needed are real numbers {shape}")
        return array

    seen = []
    for keys, of in joined.items():
        value, size = functools.reduce(lambda part, key: part[key], keys, e.observations), of.stop - of.start
        value = np.asarray(value)[:, None] if np.ndim(value) == 1 and size == 1 else value
        seen.append(checked("observations" + "".join(f"[{k!r}]" for k in keys), value, n + 1, size))
    obs = np.concatenate(seen, 1)
    acted = checked("actions", e.actions, n, len(low)).astype(float)
    if (beyond := (acted < low - 1e-6 * (high - low)) | (acted > high + 1e-6 * (high - low))).any():
        step, i = np.argwhere(beyond)[0]
        raise ValueError(f"{where}action {i} of step {step} is {acted[step, i]:g}, outside its Box, [{low[i]:g}, {high[i]:g}]")
    rewards, ended = checked("rewards", e.rewards, n), checked("terminations", e.terminations, n)
    scaled = acted if (low == -1).all() and (high == 1).all() else 2 * (acted - low) / (high - low) - 1
    return dict(obs=obs[:-1], actions=scaled, rewards=rewards, terminals=ended, next_obs=obs[1:], infos=e.infos or {})
