"""How good a denoiser a recipe makes: its loss on held-out windows, and the simulator's opinion of its samples.

python -m benchmarks.recipe [--denoiser shipped | --blocks 2 --optimiser adam --train-steps 16000 --data-steps 500000 ...]

What is not given is quick's; what is made is kept in runs/. The noise is none that a notebook draws. Of each sampler it prints
how far, in std, the samples' states are from those of the training data; the one-step error over the variance, the same of
predicting that nothing moves (the samples' motion), and their ratio with its 95% interval, for all samples and for those that
are no copies: half of *cloned* are copies of 25 demonstrations; how many end; and, for two rules, what guidance makes of both.

--posterior-above 10 answers from that noise level on as is exact for the training data, in the network's place, so that one
sees what the network lacks there. What guidance does is left out then.
"""

import argparse
import math
import time

import torch

from pgdlib import data, edm, fast, measures, sampler
from pgdlib.lab import load, models, parallel, study

GIVEN = {**parallel.GIVEN, "source": "local"}
GIVEN |= dict.fromkeys(("learning_rate", "p_mean", "p_std", "passes", "samples"))  # the scale's own
SEED = 1_000_003  # of windows and noise
LEVELS = (0.1, 0.3, 1.0, 5.0, 10.0, 20.0, 40.0)
SAMPLERS = (("heun", 32, 13.2), ("multistep", 24, 0.0), ("multistep", 24, 24.0), ("multistep", 16, 16.0))
GUIDED = {"explicit": (0.05, 0.1, 0.15), "annealed": (0.2, 0.35, 0.5)}  # λ around the on-policy one
COPY = 0.25  # root mean square of the distance to the nearest window of the training data, in their std, below which one is


class Posterior(torch.nn.Module):
    """A denoiser that from the noise level `above` on answers x [B, T, width] with the mean of the `windows` [n, T, width].

    Each is weighed by how likely it is to have become x: the optimum on a finite set (Karras et al. 2022, Appendix B.3).
    """

    def __init__(self, denoiser, windows, above):
        super().__init__()
        self.denoiser, self.windows, self.above = denoiser, windows.flatten(1), above
        self.half = self.windows.square().sum(1) / 2
        self.spec, self.normaliser, self.SIGMA_DATA = denoiser.spec, denoiser.normaliser, denoiser.SIGMA_DATA

    def forward(self, x, sigma):
        level = float(torch.as_tensor(sigma).flatten()[0])
        if level < self.above:
            return self.denoiser(x, sigma)
        parts = (((part @ self.windows.T - self.half) / level**2).softmax(1) @ self.windows for part in x.flatten(1).split(64))
        return torch.cat([*parts]).view_as(x)


def guided(lab, solver, steps, churn, noise):
    """Print what the sampler's guided trajectories come to."""
    vars(lab.p).update(solver=solver, steps=steps, churn=churn, warmup=round(steps * 5 / 32))
    for rule, lams in GUIDED.items():
        for lam in lams:
            values, _ = lab.judge(*lab.draw(rule, lam, lab.p.samples, units="natural", noise=noise))
            means = [measures.interval(values[name])[0] for name in ("log_likelihood", "normalised", "motion")]
            words = "log-likelihood {:.3f}, error {:.5f}, motion {:.5f}".format(*means)
            print(f"  {rule} λ = {lam}: {words}", flush=True)


def ends(x, lab):
    """The share of normalised trajectories that end."""
    return float((lab.normaliser.denormalise(x)[..., lab.spec.terminal] > 0.5).any(1).float().mean())


def main():
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--posterior-above", type=float, default=math.inf)
    given, rest = own.parse_known_args()
    p = parallel.parse(rest, GIVEN, __doc__)
    device = load.device_of(p.device)
    dataset, started = load.load_data(p.dataset, p.source, p.data_steps), time.monotonic()
    denoiser, losses, _ = models.load_denoiser(dataset, p, device)
    print(f"{sum(w.numel() for w in denoiser.net.parameters()):,} weights, {time.monotonic() - started:.0f} s")
    lab = study.Study(dataset, denoiser, load.load_guide()[0].to(device), p, device)
    train, held_out = (data.Windows(side, denoiser.normaliser, p.horizon, device) for side in (lab.train, lab.val))
    if math.isfinite(given.posterior_above):
        denoiser = Posterior(denoiser, train[torch.arange(0, len(train), 4, device=device)][0], given.posterior_above)
    found = [edm.validation_loss(denoiser, side, torch.tensor(LEVELS), 512, SEED) for side in (train, held_out)]
    print(f"loss, last tenth of the training {losses[-len(losses) // 10 :].mean():.3f}; at σ = {LEVELS}:")
    print(*(f"  {name}: {side.cpu().numpy().round(4)}" for name, side in zip(("training", "held out"), found)), sep="\n")
    some = train[torch.arange(0, len(train), max(1, len(train) // 20_000), device=device)][0][..., lab.spec.obs].flatten(1)
    for solver, steps, churn in SAMPLERS:
        noise, shape = fast.stream(device, "fresh", SEED), (p.samples, p.horizon, lab.spec.width)
        x, _ = sampler.draw(denoiser, shape, steps, churn, noise, solver=solver, most=p.samples)
        near = torch.cdist(x[..., lab.spec.obs].flatten(1), some).amin(1).cpu() / some.shape[1] ** 0.5
        values, _ = lab.judge(x)
        states = lab.normaliser.obs(x).cpu(), lab.normaliser.obs(lab.windows(lab.train, p.samples, SEED)[0]).cpu()
        away, *_, chance = measures.energy_distance(*states, lab.variance**0.5, torch.Generator().manual_seed(SEED), 100, 8)
        told = f"{float((near < COPY).float().mean()):.0%} copies, {ends(x, lab):.2%} end"
        print(f"{solver} {steps}, churn {churn:g}: {told}, {away:.3f} std from the data (chance: up to {chance:.3f})")
        for name, chosen in (("all", near >= 0), ("no copies", near >= COPY)):
            error, motion = (values[k][chosen.numpy()] for k in ("normalised", "motion"))
            middle, low, high = measures.bootstrap(measures.ratio_of_means, error, motion, paired=True)
            words = f"{name}: error {measures.interval(error)[0]:.5f}, motion {measures.interval(motion)[0]:.5f}, "
            print(f"  {words}ratio {middle:.3f} [{low:.3f}, {high:.3f}]", flush=True)
        if not math.isfinite(given.posterior_above):
            guided(lab, solver, steps, churn, noise)
    some = [ends(side[torch.arange(0, len(side), 4, device=device)][0], lab) for side in (train, held_out)]
    print("of the training data {:.2%} end, of the others {:.2%}".format(*some))
    print(f"data: error {lab.floor['normalised']:.1e}, motion {lab.floor['motion']:.5f}")


if __name__ == "__main__":
    main()
