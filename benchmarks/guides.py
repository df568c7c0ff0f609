"""What guidance costs with guides of different origin, and whether anything makes it cheaper.

python -m benchmarks.guides [--guides ppo td3_bc iql] [--samples 192] [--mixed 25000] [--out runs/bench/guides]

On the *cloned* stand-in and the model that ships, with noise that no notebook draws. The guides: the PPO that ships; TD3+BC
of the expert stand-in; IQL of the human one, as an agent of notebook 05. For each the error of a network of the last two steps
(trained here on the same data) on data kept back, and on the guide's true rollouts; then, by rule and remedy, the error where
trajectories are on-policy and half-way there. The remedies:

    mended      below a noise level each denoised state goes a share of the way to what that network foretells of the two before
    resampled   after guidance the states are noised to σ and denoised again, unguided, the actions held
    distilled   the guide's actions in *noised* states, by a network of state and σ, in place of its actions in them as they are
    mixed       a model of so many steps of the shipped PPO's own episodes beside the data, and one of the same training without

All points go to a CSV file, which `--draw` draws: dynamics error and motion against likelihood, a column for each guide.

Half an hour on two cores, the training of the mixed models not counted.
"""

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from pgdlib import data, dynamics, fast, guidance, measures, sampler, worldmodel
from pgdlib.agents import iql, stack, td3_bc
from pgdlib.lab import fronts, load, models, settings, study
from pgdlib.lab.figures import style
from pgdlib.simulators import pen

SEED = 2_000_003  # of noise
HOW = dict(seed=0, transform="raw", units="natural", dataset="cloned", source="local", device="cpu")
GRIDS = {
    "explicit": [0.01, 0.02, 0.04, 0.08, 0.16, 0.32],
    "proximal": [0.01, 0.03, 0.06, 0.12, 0.25, 0.5],
    "smoothed": [0.1, 0.3, 1.0, 2.0, 5.0, 15.0],
    "annealed": [0.03, 0.06, 0.12, 0.25, 0.5, 0.8, 1.2],
}


def quiet(*_, **__):
    pass


def guides(names):
    """name -> policy"""
    made = {
        "ppo": lambda: load.load_guide()[0],
        "td3_bc": lambda: trained(td3_bc.TD3BC, "expert", 20_000, 3e-4),
        "iql": lambda: trained(iql.IQL, "human", 4_000, 1e-3, (128, 128), polyak=0.05),  # as in notebook 05
    }
    return {name: made[name]() for name in names}


def trained(kind, dataset, steps, rate, *how, **more):
    """The policy of an agent of a stand-in's data."""
    train, _ = load.train_val(load.load_data(dataset, "local", 100_000, say=quiet))
    agent = kind(train.spec, [0], train.obs.mean(0), train.obs.std(0).clamp_min(1e-3), *how, **more)
    for _ in stack.Learner(agent, [0], steps, 256, rate).train([train.transitions()]):
        pass
    return agent.policy.select([0])


def second_order(episodes):
    """`Trajectories` whose observations hold the change that led there, and whose actions the one before."""
    now = torch.nonzero(episodes.places()[0] > 0)[:, 0]
    pair = lambda obs, before: torch.cat([obs, obs - before], -1)  # noqa: E731
    return data.Trajectories(
        pair(episodes.obs[now], episodes.obs[now - 1]),
        torch.cat([episodes.actions[now], episodes.actions[now - 1]], -1),
        episodes.rewards[now],
        episodes.terminals[now],
        pair(episodes.next_obs[now], episodes.obs[now]),
        episodes.lengths[episodes.lengths > 1] - 1,
        episodes.name,
    )


def two_step_model(lab):
    """An ensemble of the last two steps: held-out error 0.6 of that of the world model's, of one step."""
    torch.manual_seed(0)
    ensemble = worldmodel.Ensemble(2 * lab.spec.obs_dim, 2 * lab.spec.action_dim, 2, 2, [512] * 4)
    recipe = worldmodel.Recipe(12_000, 256, 1e-3, 0)
    for _ in worldmodel.Training(ensemble, second_order(lab.train), second_order(lab.val), recipe):
        pass
    return ensemble.eval().requires_grad_(False)


def foretold(ensemble, obs, actions):
    """What the two-step model says of obs[:, 2:] [B, T - 2, obs_dim], environment space."""
    state = torch.cat([obs[:, 1:-1], obs[:, 1:-1] - obs[:, :-2]], -1).flatten(0, 1)
    act = torch.cat([actions[:, 1:-1], actions[:, :-2]], -1).flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=fast.has_bfloat16(torch.device("cpu"))):
        following, *_ = ensemble.predict(state, act)
    return following[..., : obs.shape[-1]].mean(0).view_as(obs[:, 2:])


class Mended(nn.Module):
    """A denoiser whose states, below a noise level, go a `share` of the way to what the two-step model foretells."""

    def __init__(self, denoiser, ensemble, share, below):
        super().__init__()
        self.denoiser, self.ensemble, self.share, self.below = denoiser, ensemble, share, below
        self.normaliser, self.spec, self.config = denoiser.normaliser, denoiser.spec, denoiser.config

    def forward(self, x, sigma):
        denoised = self.denoiser(x, sigma)
        if float(sigma) < self.below:
            obs, actions = self.normaliser.obs(denoised), self.normaliser.actions(denoised)
            off = (foretold(self.ensemble, obs, actions) - obs[:, 2:]) / self.normaliser.std[self.spec.obs]
            denoised = denoised.clone()
            denoised[:, 2:, self.spec.obs] += self.share * off
        return denoised


def resampled(denoiser, x, sigma, steps=12):
    """The states of x, noised to sigma and denoised in so many Euler steps, the actions held."""
    ends = (level ** (1 / sampler.RHO) for level in (sigma, sampler.SIGMA_MIN))
    ramp = torch.linspace(*ends, steps, dtype=torch.float64) ** sampler.RHO
    noise, part, levels = torch.Generator().manual_seed(SEED), denoiser.spec.actions, [*ramp.tolist(), 0.0]
    kept, x = x[..., part], x + sigma * torch.randn(x.shape, generator=noise)
    for level, following in zip(levels, levels[1:]):
        x[..., part] = kept + level * torch.randn(kept.shape, generator=noise)
        denoised = denoiser(x, level)
        x = denoised + following / level * (x - denoised)
    x[..., part] = kept
    return x


class Distilled(nn.Module):
    """The mean of a policy's actions given a noised state, learnt from the data's states; std as the policy's."""

    is_gaussian = True

    def __init__(self, policy, lab, steps=6_000, width=384):
        super().__init__()
        self.policy, self.sigma, part = policy, 80.0, lab.spec.obs
        self.centre, self.scale = lab.normaliser.mean[part], lab.normaliser.std[part]
        torch.manual_seed(0)
        layers = nn.Linear(lab.spec.obs_dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        self.net = nn.Sequential(*layers, nn.Linear(width, lab.spec.action_dim))
        with torch.no_grad():
            aims = torch.cat([policy(obs)[0] for obs in lab.train.obs.split(50_000)])
        optimiser, states = torch.optim.Adam(self.net.parameters(), 1e-3), (lab.train.obs - self.centre) / self.scale
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
            ids, sigma = torch.randint(len(states), (512,)), (torch.randn(512, 1) * 1.6 - 0.8).exp()
            loss = (self.mean(states[ids] + sigma * torch.randn(512, states.shape[1]), sigma) - aims[ids]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.requires_grad_(False)

    def mean(self, states, sigma):
        return self.net(torch.cat([states / (1 + sigma**2).sqrt(), sigma.log() / 4], -1))

    def forward(self, obs, low=None):
        found = self.mean((obs - self.centre) / self.scale, torch.full((*obs.shape[:-1], 1), self.sigma))
        return found, self.policy.std.expand_as(found)


class Guide(guidance.Guide):
    """One that tells a distilled policy the noise level."""

    def __call__(self, x, denoised, sigma, step):
        self.policy.sigma = float(sigma)
        return super().__call__(x, denoised, sigma, step)


def mixed_model(dataset, steps):
    """A model of quick's own training on the data and so many steps of the expert stand-in, which the shipped PPO made."""
    if steps:
        expert, own = load.load_data("expert", "local", 100_000, say=quiet).data, dataset.data
        some = expert.episodes(torch.arange(int((expert.lengths.cumsum(0) <= steps).sum())))
        both = {k: torch.cat([getattr(side, k) for side in (own, some)]) for k in own.tensors() if "." not in k}
        dataset = replace(dataset, data=data.Trajectories(**both, name="mixed"), key=f"{dataset.key}-mixed-{steps}", made=None)
    p = settings.defaults("quick", **HOW | {"denoiser": "train"})
    return models.load_denoiser(dataset, p, torch.device("cpu"))[0]


def front(lab, rule, target=None, after=None, warmup=None):
    """λ -> measures, up to the first λ at which trajectories are on-policy."""
    found = {}
    for lam in (0.0, *GRIDS[rule]):
        noise = fast.stream(lab.device, "fresh", SEED)
        x, diverged = lab.draw(rule, lam, noise=noise, target=target, warmup=warmup)
        found[lam], _ = lab.judge(after(x) if after else x, diverged, ("reconstructed", "still"))
        if found[lam]["log_likelihood"].mean() > lab.on_policy:
            break
    return found


def at(points, measure, target):
    """A function of trajectory numbers -> the measure where the mean log-likelihood comes to `target`."""
    x, y = (np.stack([values[name] for values in points.values()]) for name in ("log_likelihood", measure))
    return lambda ids: fronts.error_at(x[:, ids], y[:, ids], target)


def keep(rows, guide, name, points, zero, lab):
    """Append to `rows` the points of a rule: error over the unguided one, motion over the data's, with their intervals."""
    ends = zero["log_likelihood"].mean(), lab.on_policy
    for lam, values in points.items():
        likelihood = values["log_likelihood"].mean()
        row = dict(guide=guide, rule=name, lam=lam, way=(likelihood - ends[0]) / (ends[1] - ends[0]))
        for measure, over in (("normalised", np.nanmean(zero["normalised"])), ("motion", lab.floor["motion"])):
            bounds = [bound / over for bound in measures.interval(values[measure])]
            row |= dict(zip((f"{measure}.mean", f"{measure}.low", f"{measure}.high"), bounds))
        rows.append(row | dict(log_likelihood=likelihood))


def draw(points):
    """Error and motion over the way from the unguided likelihood to the on-policy one: a column for each guide."""
    style.use_style()
    columns = points.groupby("guide", sort=False)
    fig, axes = style.figure("What guidance costs, by guide", 3.6 * columns.ngroups + 3.2, 6.6, 2, columns.ngroups, True, "row")
    looks, names = style.looks(points["rule"].unique()), ("error / unguided error", "motion / the data's")
    for column, (guide, own) in zip(axes.T, columns):
        for ax, measure in zip(column, ("normalised.mean", "motion.mean")):
            style.lines(ax, {rule: (part["way"], part[measure]) for rule, part in own.groupby("rule", sort=False)}, looks)
            ax.axhline(1, color="black", linewidth=1)
            ax.set_xlim(-0.04, 1.04)
        column[0].set(title=guide, yscale="log")
        column[1].set_xlabel("share of the way to the\non-policy likelihood")
    for ax, name in zip(axes[:, 0], names):
        ax.set_ylabel(name)
    return style.finished(fig)


def tell(name, points, plain, zero, lab):
    """One row of the table: errors over the unguided one and over annealed's at the same likelihood; motion over the data's."""
    start, n = zero["log_likelihood"].mean(), len(zero["motion"])
    half, cells = (start + lab.on_policy) / 2, []

    def ratio(own, other):
        if np.isfinite(own(np.arange(n)) / other(np.arange(n))):
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*fronts.bootstrap(lambda ids: own(ids) / other(ids), n)))
        else:
            cells.append("not reached")

    ratio(at(points, "normalised", lab.on_policy), lambda ids: np.nanmean(zero["normalised"][ids]))
    for level in (half, lab.on_policy):
        ratio(at(points, "normalised", level), at(plain, "normalised", level))
    moved = at(points, "motion", lab.on_policy)(np.arange(n)) / lab.floor["motion"]
    print(f"| {name} | {' | '.join(cells)} | {moved:.2f} |", flush=True)


def one_step_error(ensemble, obs, actions, alive, variance):
    """The two-step model's mean squared error over the variance, of steps [B, T, ...] that count."""
    off = (foretold(ensemble, obs, actions) - obs[:, 2:]).square()[alive[:, 2:] > 0]
    return float((off.mean(0) / torch.from_numpy(variance)).mean())


def judge_guide(name, policy, lab, ensemble, denoisers, rows):
    """Print the lines of one guide, and append its points to `rows`."""
    x, alive = lab.windows(lab.val, 384, SEED)
    obs, actions = (lab.normaliser.denormalise(x)[..., part] for part in (lab.spec.obs, lab.spec.actions))
    noise = torch.Generator().manual_seed(0)
    true = dynamics.rollout_from(pen.PEN, obs.numpy(), actions.numpy(), lambda o: policy.act(o, noise), lab.p.horizon)
    usable = np.isfinite(true[0]).all((1, 2))
    true = [torch.from_numpy(v[usable]).float() for v in true]
    sides = (obs, actions, alive), (*true, torch.ones(true[0].shape[:2]))
    errors = [one_step_error(ensemble, *side, lab.variance) for side in sides]
    plain = front(lab, "annealed")
    zero = plain[0.0]
    print(f"\n{name}: std {float(policy.std.mean()):.2f}, on-policy log-likelihood {lab.on_policy:.2f}, unguided", end=" ")
    print(f"{zero['log_likelihood'].mean():.2f}. The two-step network errs {errors[0]:.4f} on data kept back,", end=" ")
    print(f"{errors[1]:.4f} on this guide's true rollouts; unguided samples have {np.nanmean(zero['normalised']):.4f}.\n")
    print("| rule | on-policy, over unguided | half-way, over annealed | on-policy, over annealed | motion over the data's |")
    print("|---|---|---|---|---|")

    def row(rule, points):
        keep(rows, name, rule, points, zero, lab)
        tell(rule, points, plain, zero, lab)

    row("annealed", plain)
    for rule in ("explicit", "proximal", "smoothed"):
        row(rule, front(lab, rule))
    for share, below in ((0.2, 0.3), (0.4, 3.0)):
        own = study.Study(lab.dataset, Mended(lab.denoiser, ensemble, share, below), policy, lab.p)
        row(f"annealed, mended: {share}, σ < {below:g}", front(own, "annealed"))
    for sigma in (0.1, 0.3, 1.0):
        row(
            f"annealed, resampled from σ = {sigma}", front(lab, "annealed", after=partial(resampled, lab.denoiser, sigma=sigma))
        )
    distilled = Distilled(policy, lab)
    for rule in ("annealed", "explicit"):
        row(f"{rule}, distilled", front(lab, rule, target=distilled, warmup=0))
    for words, denoiser in denoisers.items():
        own = study.Study(lab.dataset, denoiser, policy, lab.p)
        points = front(own, "annealed")
        tell(f"annealed, {words}; both ratios over its own", points, points, points[0.0], own)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guides", nargs="+", default=["ppo", "td3_bc", "iql"], choices=["ppo", "td3_bc", "iql"])
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--mixed", type=int, default=0, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/guides"), help="of the CSV file and the figure, no suffix")
    parser.add_argument("--draw", action="store_true", help="only the figure, of the CSV file")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.draw:
        draw(pd.read_csv(f"{given.out}.csv")).savefig(f"{given.out}.png")
        return
    guidance.Guide = Guide
    p = settings.defaults("quick", **HOW | {"samples": given.samples})
    dataset, device = load.load_data("cloned", "local", p.data_steps, say=quiet), torch.device("cpu")
    denoiser, *_ = models.load_denoiser(dataset, p, device)
    labs = {name: study.Study(dataset, denoiser, policy, p) for name, policy in guides(given.guides).items()}
    lab = next(iter(labs.values()))
    ensemble, denoisers = two_step_model(lab), {}
    if given.mixed:
        for steps in (0, given.mixed):
            denoisers[f"a model of quick's training with {steps:,} steps of PPO's"] = mixed_model(dataset, steps)
    rows = []
    for name, lab in labs.items():
        judge_guide(name, lab.policy, lab, ensemble, denoisers, rows)
        pd.DataFrame(rows).to_csv(f"{given.out}.csv", index=False, float_format="%.5g")
    draw(pd.DataFrame(rows)).savefig(f"{given.out}.png")


if __name__ == "__main__":
    main()
