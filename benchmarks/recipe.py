"""How good a denoiser a recipe makes: its loss on held-out windows, and the simulator's opinion of its samples.

python -m benchmarks.recipe [--denoiser shipped | --blocks 2 --optimiser adam --train-steps 16000 --data-steps 500000 ...]

What is not given is quick's; what is made is kept in runs/. The noise is none that a notebook draws. Of each sampler it prints
how far, in std, the samples' states are from those of the training data; the one-step error over the variance, the same of
predicting that nothing moves (the samples' motion), and their ratio with its 95% interval, for all samples and for those that
are no copies: half of *cloned* are copies of 25 demonstrations. Then, for two rules, what guidance makes of both.
"""

import time

import torch

from pgdlib import data, edm, fast, measures, sampler
from pgdlib.lab import load, models, parallel, study

GIVEN = {**parallel.GIVEN, "source": "local"}
GIVEN |= dict.fromkeys(("learning_rate", "p_mean", "p_std", "passes", "samples"))  # the scale's own
SEED = 1_000_003  # of windows and noise
LEVELS = (0.1, 0.3, 1.0, 5.0)
SAMPLERS = (("heun", 32, 13.2), ("multistep", 24, 0.0), ("multistep", 24, 24.0), ("multistep", 16, 16.0))
GUIDED = {"explicit": (0.05, 0.1, 0.15), "annealed": (0.2, 0.35, 0.5)}  # λ around the on-policy one
COPY = 0.25  # root mean square of the distance to the nearest window of the training data, in their std, below which one is


def guided(lab, solver, steps, churn, noise):
    """Print what the sampler's guided trajectories come to."""
    vars(lab.p).update(solver=solver, steps=steps, churn=churn, warmup=round(steps * 5 / 32))
    for rule, lams in GUIDED.items():
        for lam in lams:
            values, _ = lab.judge(*lab.draw(rule, lam, lab.p.samples, units="natural", noise=noise))
            means = [measures.interval(values[name])[0] for name in ("log_likelihood", "normalised", "motion")]
            words = "log-likelihood {:.3f}, error {:.5f}, motion {:.5f}".format(*means)
            print(f"  {rule} λ = {lam}: {words}", flush=True)


def main():
    p = parallel.parse(None, GIVEN, __doc__)
    device = load.device_of(p.device)
    dataset, started = load.load_data(p.dataset, p.source, p.data_steps), time.monotonic()
    denoiser, losses, _ = models.load_denoiser(dataset, p, device)
    print(f"{sum(w.numel() for w in denoiser.net.parameters()):,} weights, {time.monotonic() - started:.0f} s")
    lab = study.Study(dataset, denoiser, load.load_guide()[0].to(device), p, device)
    train, held_out = (data.Windows(side, denoiser.normaliser, p.horizon, device) for side in (lab.train, lab.val))
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
        copies = f"{float((near < COPY).float().mean()):.0%} copies"
        print(f"{solver} {steps}, churn {churn:g}: {copies}, {away:.3f} std from the data (chance: up to {chance:.3f})")
        for name, chosen in (("all", near >= 0), ("no copies", near >= COPY)):
            error, motion = (values[k][chosen.numpy()] for k in ("normalised", "motion"))
            middle, low, high = measures.bootstrap(measures.ratio_of_means, error, motion, paired=True)
            words = f"{name}: error {measures.interval(error)[0]:.5f}, motion {measures.interval(motion)[0]:.5f}, "
            print(f"  {words}ratio {middle:.3f} [{low:.3f}, {high:.3f}]", flush=True)
        guided(lab, solver, steps, churn, noise)
    print(f"data: error {lab.floor['normalised']:.1e}, motion {lab.floor['motion']:.5f}")


if __name__ == "__main__":
    main()
