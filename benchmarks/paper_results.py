"""What `paper_scale.py` brings home of a slice: the figures of training, Figure 1 and fronts, the claims, and Table 1.

Every function takes the slice, `part`, to save by and to be stopped by, and the `Study` lab.
"""

import shutil

import numpy as np
import torch

from pgdlib import data, dynamics, edm, measures, pgd, sampler, synthetic
from pgdlib.agents import iql
from pgdlib.agents import stack as agents
from pgdlib.lab import budget, claims, figures, store, study, table1
from pgdlib.lab import seeds as seedstats
from pgdlib.simulators import pen as adroit


def show_training(part, lab, losses):
    """The losses of training, and by noise level on both sides of the data."""
    sigmas = torch.logspace(-2.3, 1.5, 10)
    sides = [data.Windows(side, lab.normaliser, lab.p.horizon, lab.device) for side in (lab.train, lab.val)]
    curves = [edm.validation_loss(lab.denoiser, w, sigmas, 128, lab.p.seed).cpu().numpy() for w in sides]
    fig = figures.data.training(losses, sigmas.numpy(), *curves, f"denoiser on {lab.dataset.label}, scale {lab.p.scale}")
    part.save("training", fig, {"sigma": sigmas.numpy(), "training": curves[0], "validation": curves[1]})
    thinned = np.array_split(losses, min(len(losses), 1000))
    part.save("losses", table={"step": np.cumsum([len(v) for v in thinned]), "loss": [v.mean() for v in thinned]})


def show_figure_1(part, lab, sweep):
    """Figure 1 of the paper's rule, with the clouds of λ = 0 and of the calibrated λ, before that of the likeliest one."""
    frame = study.summary(sweep)
    best = part.card["calibrated"].get("explicit", float(frame.lam[frame["log_likelihood.mean"].idxmax()]))
    clouds = {lam: sweep[lam].measures for lam in sorted({0.0, best}) if lam in sweep}
    title = f"Figure 1 on {lab.dataset.label}: explicit rule, scale {lab.p.scale}"
    floors = {e: lab.floor[e] for e in ("normalised", "appendix_b")}
    part.save("figure1", figures.guidance.figure_1(clouds, frame, floors, lab.on_policy, title, lab.limit))


def show_fronts(part, lab, points):
    """Error against likelihood of the rules of which points are there, if there are two."""
    names = ("log_likelihood.mean", "normalised.mean", "normalised.low", "normalised.high")
    frames = {rule: study.summary(each) for rule, each in points.items() if len(each) > 1}
    if len(frames) < 2:
        return
    curves = {rule: tuple(f[c].to_numpy()[1:] for c in names) for rule, f in frames.items()}
    zero = tuple(frames["explicit"].loc[0, list(names[:2])])
    ours = lab.p.rule if lab.p.rule in curves else "explicit"
    title = f"Fronts of the rules on {lab.dataset.label}: {lab.p.samples} trajectories a point, scale {lab.p.scale}"
    part.save("fronts", figures.guidance.fronts(curves, zero, lab.on_policy, ours, title))


def judge(part, lab, sweep):
    """The claims C1 to C3, C5 and C7, as notebook 04 judges them."""
    p, weights = lab.p, part.card["calibrated"]
    zero, at, own = (
        lab.point(*key, part.check).measures
        for key in (("explicit", 0.0), ("explicit", weights["explicit"]), (p.rule, weights[p.rule]))
    )
    sweep = {lam: lab.point("explicit", lam, part.check) for lam in sorted({*sweep, weights["explicit"]})}
    frame = study.summary(sweep)
    part.save("sweep_explicit", table=frame)
    show_figure_1(part, lab, sweep)
    parts = store.root() / "checkpoints" / f"no-warmup-{store.key(**part.card['settings'])}"
    pair = [
        lab.judge(*lab.draw("explicit", weights["explicit"], warmup=n, watch=part.check, parts=parts / str(n)))
        for n in (p.warmup, 0)
    ]
    shutil.rmtree(parts, ignore_errors=True)
    noise = np.random.default_rng(p.seed)
    returns = adroit.rollout(lab.policy.act(), 200, noise, adroit.D4RL_HORIZON).d4rl_returns
    raised = claims.likelihood_raised(zero["log_likelihood"], at["log_likelihood"], lab.on_policy)
    kept = claims.error_not_raised(zero["normalised"], at["normalised"], "the paper's rule, state reconstructed")
    measured = [[point.measures[k] for point in sweep.values()] for k in ("log_likelihood", "normalised")]
    return [
        raised,
        kept,
        claims.error_not_raised(zero["appendix_b"], at["appendix_b"], "the paper's rule, Appendix B"),
        claims.error_not_raised(zero["normalised"], own["normalised"], f"{p.rule} rule, state reconstructed"),
        claims.threshold(list(sweep), *measured, [point.counts["diverged"] / p.samples for point in sweep.values()]),
        claims.warmup_cures(*(v["normalised"] for v, _ in pair), [counts["diverged"] / p.samples for _, counts in pair]),
        claims.better_guide(returns, lab.dataset.data.returns().numpy(), raised, kept),
    ]


def likely(lab, point):
    """The claim C8 of the unguided `Point`, as notebook 02 judges it."""
    noise, levels = torch.Generator(lab.device).manual_seed(lab.p.seed), torch.logspace(-1.5, 0.5, 8, device=lab.device)
    alive = measures.alive(lab.normaliser.denormalise(point.x)[..., data.TERMINAL])
    with torch.no_grad():
        each = [edm.loss(lab.denoiser, point.x, alive, s.expand(len(alive)), noise) for s in levels]
    usable = np.isfinite(point.measures["normalised"])
    losses = torch.stack(each).log().mean(0).exp().cpu().numpy()
    return claims.likely_is_real(losses[usable], point.measures["normalised"][usable])


def states(part, lab):
    """The claim C9 for the calibrated λ of `p.rule`, as notebook 04 judges it: do guided states move toward the policy's?"""
    p, weight = lab.p, part.card["calibrated"][lab.p.rule]
    scale = np.sqrt(np.where(lab.variance > 1e-12, lab.variance, 1.0))
    noise = torch.Generator(lab.device).manual_seed(p.seed)
    real = lab.normaliser.denormalise(lab.windows(lab.train, p.samples, p.seed + 1)[0]).cpu()
    start = real[..., data.OBS], real[..., data.ACTIONS]
    played = dynamics.rollout_from(*start, lab.policy.act(noise), p.horizon)[0]
    played = played[np.isfinite(played).all((1, 2))]
    parts = store.root() / "checkpoints" / f"states-{store.key(**part.card['settings'])}"

    def drawn(lam, seed):
        x, _ = lab.draw(p.rule, lam, seed=seed, watch=part.check, parts=parts / f"{lam!r}-{seed}")
        return lab.normaliser.obs(x).cpu().numpy()

    def distance(a, b):
        return measures.energy_distance(a, b, scale, torch.Generator().manual_seed(p.seed), 200, 16)

    unguided, guided = drawn(0.0, p.seed + 1), drawn(weight, p.seed + 1)
    claim = claims.states_shift(distance(unguided, drawn(weight, p.seed)), distance(played, unguided), distance(played, guided))
    shutil.rmtree(parts, ignore_errors=True)
    return claim


def table_1(part, lab):
    """The claims C4 of agents on real, unguided and guided data, as notebook 05 judges them; their table and figure."""
    p, real = part.p, agents.of_trajectories(lab.train).to(lab.device)
    rows = [
        pgd.Row("IQL, real data", "real"),
        pgd.Row("IQL, unguided (λ = 0)", "diffusion", "explicit", 0.0),
        pgd.Row("IQL, explicit rule, λ = 1.5", "diffusion", "explicit", 1.5),
        pgd.Row(f"IQL, {p.rule} rule, calibrated λ", "diffusion", p.rule, "calibrated"),
    ]
    asked = sampler.evaluations(p.draw_solver, p.draw_steps)
    chunk = min(512, budget.most(lab.denoiser, 512, p.horizon, asked, lab.device))
    diffusion = synthetic.Diffusion(lab.denoiser, p.draw_solver, p.draw_steps, p.draw_churn, p.draw_warmup, chunk)
    seeds = [1_000 * p.seed + i for i in range(p.seeds)]
    sources = pgd.Sources(real, diffusion, None, None, p.windows, 0.0, seeds)
    norm = lab.normaliser.mean[data.OBS], lab.normaliser.std[data.OBS]

    def make(seeds):
        return iql.IQL(seeds, *norm, (p.hidden, p.hidden), polyak=p.polyak)

    if not part.card["seconds"].get("Table 1"):
        table1.announce(make, rows, seeds, sources, p, lab.device)
    inputs = dict(model=store.digest(lab.denoiser.state_dict(), lab.denoiser.config))
    result = table1.train("iql", make, rows, seeds, sources, p, lab.device, inputs, part.bar)
    returns, behaviour = result.by_row(result.means), seedstats.mean_se(lab.dataset.data.returns().numpy())
    paper = {f"paper, λ = {lam}": v for lam, v in zip((0, 2), seedstats.PAPER_TABLE_1[p.dataset])}
    title = f"{p.seeds} seeds, {p.test_episodes} episodes each ({lab.dataset.label})"
    table = table1.per_seed(result, lab.dataset.label)
    part.save("table1", figures.table1.table1(returns, behaviour, paper, title), table)
    guided = [
        (row, f"{row.rule} rule, {'calibrated λ' if row.lam == 'calibrated' else f'λ = {row.lam:g}'}") for row in rows[2:]
    ]
    return [claims.returns_raised({p.dataset: (returns[rows[1].name], returns[row.name])}, words) for row, words in guided]


def publish(part, lab, verdicts):
    """Add what is judged to the run's own results and to `out`; claims of the same id are replaced."""
    claims.record(verdicts, lab.dataset.label, lab.dataset.slug, lab.p.scale)
    new = [{"id": c.id, "measure": c.measure, "effect": claims.effect(c), "verdict": c.verdict} for c in verdicts]
    part.card["claims"] = list({row["id"]: row for row in [*part.card.get("claims", []), *new]}.values())
    part.save("claims", table=part.card["claims"])
