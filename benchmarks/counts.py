"""How many floating-point operations and bytes the paths need, as formulas; a multiplication and an addition are two."""

from pgdlib.simulators.pen import ACTION_DIM, OBS_DIM

CHANNELS = OBS_DIM + ACTION_DIM + 2  # observation, action, reward, terminal


def matmul(m, k, n):
    """[m, k] times [k, n]."""
    return 2 * m * k * n


def denoiser(batch, length, features, blocks=2, kernel=3, levels=None):
    """One evaluation of the U-Net on `batch` trajectories of `length` steps at `levels` noise levels (None: one for each)."""

    def block(i, o, t):
        convolutions = matmul(t, kernel * i, o) + matmul(t, kernel * o, o) + (matmul(t, i, o) if i != o else 0)
        return batch * convolutions + matmul(levels or batch, features, 2 * o)

    widths = [features * 2**level for level in range(blocks)]
    lengths = [length // 2**level for level in range(blocks)]
    embedding = matmul(levels or batch, _waves(features), features) + matmul(levels or batch, features, features)
    down = sum(block(i, o, t) for i, o, t in zip([features, *widths], widths, lengths))
    up = sum(batch * matmul(t // 2, 2 * w, w) + block(2 * w, w, t) for w, t in zip(widths[:-1], lengths))
    return embedding + down + up + batch * (matmul(length, CHANNELS, features) + matmul(length, features, CHANNELS))


def training(batch, length, features, blocks=2, kernel=3):
    """One training step: gradients by inputs, but for the first layers', and by weights cost an evaluation each."""
    first = batch * (matmul(length, CHANNELS, features) + matmul(1, _waves(features), features))
    return 3 * denoiser(batch, length, features, blocks, kernel) - first


def policy(rows, hidden):
    """One evaluation of a policy's network with `hidden` layers at `rows` observations."""
    return sum(_layers(rows, [OBS_DIM, *hidden, ACTION_DIM]))


def iql(seeds, batch, width):
    """One training step of IQL with two hidden layers; inputs need no gradient, targets and the next states' V none at all."""
    inner, both = [width, width], OBS_DIM + ACTION_DIM
    actor, q, v = (_layers(batch, [i, *inner, o]) for i, o in ((OBS_DIM, ACTION_DIM), (both, 1), (OBS_DIM, 1)))
    trained = sum(3 * sum(net) - net[0] for net in (actor, q, q, v))
    return seeds * (trained + 2 * sum(q) + sum(v))


def windows(batch, length):
    """Bytes of drawing `batch` windows: each value is read and written, in float32."""
    return 2 * 4 * batch * length * CHANNELS


def _waves(features):
    return 2 * max(features // 8, 4)


def _layers(rows, widths):
    return [matmul(rows, i, o) for i, o in zip(widths, widths[1:])]
