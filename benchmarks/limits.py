"""What the machine can do at best: matrix products in float32 and bfloat16, a wide convolution, copies.

Every other measurement runs beside an anchor, a small product or copy, and is given as a share of the best rate found here:
both are measured against the anchor in their own rounds, so that a machine that slows down slows both.
"""

import torch

from benchmarks import counts, timing

ANCHOR = 1024  # the anchor multiplies square matrices of this size
SQUARES = 2048, 4096
COPIED = 2**26  # float32 values, 256 MiB


class Limits:
    """The anchors, and how much faster than its anchor the best of each kind is (`best`, kind -> factor)."""

    def __init__(self, device, seconds):
        self.device, self.seconds, self.best, self.rows = device, seconds, {}, []
        self._anchors, self._work = {}, {}
        for kind in ("float32", "bfloat16"):
            a, b = self._random(kind, ANCHOR, ANCHOR), self._random(kind, ANCHOR, ANCHOR)
            self._anchors[kind], self._work[kind] = (lambda a=a, b=b: a @ b), counts.matmul(ANCHOR, ANCHOR, ANCHOR)
            self._measure(kind)
        source = torch.ones(COPIED // 16, device=device)
        target = torch.empty_like(source)
        self._anchors["copy"], self._work["copy"] = (lambda: target.copy_(source)), 8 * len(source)
        large = torch.ones(COPIED, device=device)
        other = torch.empty_like(large)
        self.best["copy"] = 1.0  # of the large copy, which counts; the anchor may lie in a cache
        self._one("copy", f"{COPIED * 4 // 2**20} MiB", lambda: other.copy_(large), 8 * COPIED, keep=True)

    def anchor(self, kind):
        """A call to be timed in the same rounds as what is to be a share of the limit `kind`."""
        return self._anchors[kind]

    def share(self, kind, taken, name, work):
        """Quartiles of the share of the best rate at which `name` did its `work` (FLOPs or bytes); "anchor" ran beside it."""
        return timing.ratio(taken, "anchor", name, work / self._work[kind] / self.best[kind])

    def _random(self, kind, *shape):
        return torch.randn(*shape, device=self.device).to(getattr(torch, kind))

    def _measure(self, kind):
        self.best[kind] = 1.0
        for n in SQUARES:
            self._product(kind, n, n, n)
        self._product(kind, 512, 256, 256)  # a layer of IQL at the paper's sizes
        x, w, bias = (self._random(kind, *shape) for shape in ((5, 512, 256), (5, 256, 256), (5, 1, 256)))
        self._one(kind, "baddbmm 5 x 512x256x256", lambda: torch.baddbmm(bias, x, w), 5 * counts.matmul(512, 256, 256))
        self._product(kind, 256 * 64, 3 * 64, 64)  # a convolution of the sampler, unfolded
        self._product(kind, 16 * 128, 3 * 1024, 1024)  # and of the paper's denoiser, the same as the next
        y, kernel = self._random(kind, 16, 1024, 128), self._random(kind, 1024, 1024, 3)
        work = counts.matmul(16 * 128, 3 * 1024, 1024)
        self._one(kind, "conv1d 1024, 16 x 128 steps", lambda: torch.conv1d(y, kernel, padding=1), work)

    def _product(self, kind, m, k, n):
        a, b = self._random(kind, m, k), self._random(kind, k, n)
        self._one(kind, f"{m}x{k}x{n}", lambda: a @ b, counts.matmul(m, k, n))

    def _one(self, kind, size, call, work, keep=False):
        """Measure a call beside its anchor and take it as the best if it is, or, to `keep` it, in any case."""
        taken = timing.alternate({"ours": call, "anchor": self._anchors[kind]}, self.seconds, self.device)
        factor = timing.ratio(taken, "anchor", "ours", work / self._work[kind])
        self.best[kind] = factor[0] if keep else max(self.best[kind], factor[0])
        unit, rates = "GB/s" if kind == "copy" else "GFLOP/s", {}
        rates["ours"], rates["other"] = (
            timing.rate(taken, name, n / 1e9) for name, n in (("ours", work), ("anchor", self._work[kind]))
        )
        against = f"copy of {COPIED // 4 // 2**20} MiB" if kind == "copy" else f"matmul {ANCHOR}²"
        rounds = len(taken["ours"])
        self.rows.append(timing.Row(f"limit {kind}", size, against, factor, **rates, unit=unit, rounds=rounds))
