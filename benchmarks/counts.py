"""How many floating-point operations and bytes the paths need, as formulas; a multiplication and an addition are two."""

from pgdlib.data import Spec
from pgdlib.simulators.pen import PEN

SPEC = Spec(PEN.obs_dim, PEN.action_dim)


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
    return embedding + down + up + batch * (matmul(length, SPEC.width, features) + matmul(length, features, SPEC.width))


def training(batch, length, features, blocks=2, kernel=3):
    """One training step: gradients by inputs, but for the first layers', and by weights cost an evaluation each."""
    first = batch * (matmul(length, SPEC.width, features) + matmul(1, _waves(features), features))
    return 3 * denoiser(batch, length, features, blocks, kernel) - first


def policy(rows, hidden):
    """One evaluation of a policy's network with `hidden` layers at `rows` observations."""
    return sum(_layers(rows, [SPEC.obs_dim, *hidden, SPEC.action_dim]))


def iql(seeds, batch, width):
    """One training step of IQL with two hidden layers; inputs need no gradient, targets and the next states' V none at all."""
    inner, both = [width, width], SPEC.obs_dim + SPEC.action_dim
    actor, q, v = (_layers(batch, [i, *inner, o]) for i, o in ((SPEC.obs_dim, SPEC.action_dim), (both, 1), (SPEC.obs_dim, 1)))
    trained = sum(3 * sum(net) - net[0] for net in (actor, q, q, v))
    return seeds * (trained + 2 * sum(q) + sum(v))


def windows(batch, length):
    """Bytes of drawing `batch` windows: each value is read and written, in float32."""
    return 2 * 4 * batch * length * SPEC.width


def _waves(features):
    return 2 * max(features // 8, 4)


def _layers(rows, widths):
    return [matmul(rows, i, o) for i, o in zip(widths, widths[1:])]
