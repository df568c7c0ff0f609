"""The autoregressive baseline: an ensemble of probabilistic one-step models (MBPO, MOPO), and rollouts of a policy in it."""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pgdlib.edm import has_bfloat16, seeded
from pgdlib.lab import resumable
from pgdlib.simulators.pen import ACTION_DIM, FALL_HEIGHT, OBS_DIM, PEN_HEIGHT

INPUTS, OUTPUTS = OBS_DIM + ACTION_DIM, OBS_DIM + 1
IN, OUT = slice(0, INPUTS), slice(INPUTS, INPUTS + OUTPUTS)  # of a transition: obs, action; Δobs, reward
DIVERGED = 100.0  # an observation or reward this many std of the data away from its mean marks a rollout as diverged


class Ensemble(nn.Module):
    """M = `members` Gaussians over (Δobs, reward) given (obs, action), of which the `elites` best make rollouts.

    Initial weights come from torch's global generator. Statistics and the choice of elites are buffers.
    """

    def __init__(self, members=7, elites=5, hidden=(200, 200, 200, 200)):
        super().__init__()
        if not 1 <= elites <= members:
            raise ValueError(f"elites={elites} is not allowed; it must be 1 or more, and at most members={members}")
        self.config = dict(members=members, elites=elites, hidden=list(hidden))
        widths = [INPUTS, *hidden, 2 * OUTPUTS]
        self.weights = nn.ParameterList(torch.empty(members, i, o) for i, o in zip(widths, widths[1:]))
        self.biases = nn.ParameterList(torch.zeros(members, 1, o) for o in widths[1:])
        for weight in self.weights:
            std = 1 / (2 * math.sqrt(weight.shape[1]))
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        # MBPO's members share these bounds. Here each has its own, so that no member depends on another.
        self.max_log_var = nn.Parameter(torch.full((members, 1, OUTPUTS), 0.5))
        self.min_log_var = nn.Parameter(torch.full((members, 1, OUTPUTS), -10.0))
        self.register_buffer("mean", torch.zeros(INPUTS + OUTPUTS))
        self.register_buffer("std", torch.ones(INPUTS + OUTPUTS))
        self.register_buffer("elites", torch.arange(elites))

    def fit_normalisation(self, data):
        """Take mean and std of inputs and outputs from `Trajectories`. An input that never changes gets std 1."""
        x = _transitions(data).double()
        std = x.std(0, unbiased=False)
        std[IN] = torch.where(std[IN] < 1e-6, 1.0, std[IN])
        std[OUT] = std[OUT].clamp_min(1e-6)  # Δ of the target is always 0: with std 1 its noise would make it wander
        self.mean.copy_(x.mean(0))
        self.std.copy_(std)

    def pairs(self, data):
        """`Trajectories` as inputs [N, 69] and outputs [N, 46], in normalised space, on the ensemble's device."""
        x = (_transitions(data).to(self.mean) - self.mean) / self.std
        return x[:, IN], x[:, OUT]

    def inputs(self, obs, actions):
        """Normalised inputs [..., 69] of obs [..., 45], actions [..., 24] in environment space, clipped as in the simulator."""
        return (torch.cat([obs, actions.clamp(-1, 1)], -1) - self.mean[IN]) / self.std[IN]

    def forward(self, inputs):
        """Mean and log-variance of the outputs, [M, B, 46] each, at inputs [B, 69] or [M, B, 69]; normalised space."""
        x = inputs.expand(len(self.max_log_var), -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, F.silu(x) if i else x, weight)
        mean, log_var = x.chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def predict(self, obs, actions):
        """next_obs [M, B, 45], reward [M, B] and the std of both [M, B, 46], for obs [B, 45], actions [B, 24] (environment)."""
        mean, log_var = self(self.inputs(obs, actions))
        mean = mean * self.std[OUT] + self.mean[OUT]
        return obs + mean[..., :OBS_DIM], mean[..., OBS_DIM], (0.5 * log_var).exp() * self.std[OUT]


def _transitions(data):
    """[N, 115] of `Trajectories`, in environment space. Actions are clipped as the simulator did when the data was made."""
    return torch.cat([data.obs, data.actions.clamp(-1, 1), data.next_obs - data.obs, data.rewards[:, None]], -1)


def nll(mean, log_var, outputs):
    """Gaussian negative log-likelihood of each of `outputs`, in nats."""
    return 0.5 * ((outputs - mean).square() * (-log_var).exp() + log_var + math.log(2 * math.pi))


@torch.no_grad()
def validation_error(ensemble, data, chunk=4096):
    """The mean squared error [M, 46] of each member's mean on `Trajectories`, in normalised space."""
    parts = zip(*(x.split(chunk) for x in ensemble.pairs(data)))
    return sum((ensemble(x)[0] - y).double().square().sum(1) for x, y in parts) / len(data.rewards)


@dataclass
class Training:
    """How to train an ensemble; Adam, cosine schedule, an L2 penalty on the weights of each layer."""

    steps: int
    batch_size: int = 256  # for each member
    learning_rate: float = 3e-3  # MBPO has 1e-3; on Adroit Pen this is better after as many steps
    seed: int = 0
    weight_decay: tuple = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # of each layer, as published with MBPO

    def card(self):
        """All of it as JSON gives it back, for keys and cards."""
        return {**vars(self), "weight_decay": list(self.weight_decay)}


def train(ensemble, train_data, val_data, how, checkpoint=None, save_every=120.0, report=lambda step, losses: None):
    """Train `ensemble` in place and choose its elites; returns the members' mean NLL of every step (nats), a tensor [steps].

    Statistics come from `train_data`, batches too, other ones for each member; elites have the least `validation_error`.
    With a `checkpoint` path, the state is written there every `save_every` seconds, and a run that finds it goes on from it
    to the same weights that an uninterrupted run has: each step's randomness depends only on the seed and the step. One that is
    damaged, or of another training, is set aside.
    """
    if len(how.weight_decay) != (layers := len(ensemble.weights)):
        raise ValueError(f"weight_decay={how.weight_decay} is not allowed; it must hold {layers} numbers, one for each layer")
    ensemble.fit_normalisation(train_data)
    inputs, outputs = ensemble.pairs(train_data)
    device, shape = inputs.device, (len(ensemble.max_log_var), how.batch_size)
    groups = [dict(params=[weight], weight_decay=decay) for weight, decay in zip(ensemble.weights, how.weight_decay)]
    groups.append(dict(params=[*ensemble.biases, ensemble.max_log_var, ensemble.min_log_var]))
    optimiser = torch.optim.Adam(groups, how.learning_rate, fused=True)
    first, losses, saved = 0, torch.zeros(how.steps), time.monotonic()
    state = {**ensemble.state_dict(), "losses": losses}
    for i, p in enumerate(ensemble.parameters()):  # what Adam would make in its first step, for a checkpoint to fill
        optimiser.state[p] = dict(step=p.new_zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state.update({f"adam.{i}.{k}": v for k, v in optimiser.state[p].items()})
    card = dict(config=ensemble.config, how=how.card())
    if checkpoint is not None:
        first = resumable.restore(checkpoint, state, card)
    for step in range(first, how.steps):
        for group in optimiser.param_groups:
            group["lr"] = how.learning_rate * 0.5 * (1 + math.cos(math.pi * step / how.steps))
        generator = seeded(device, how.seed, step)
        ids = torch.randint(len(inputs), shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            mean, log_var = ensemble(inputs[ids])
        value = nll(mean, log_var, outputs[ids]).mean((1, 2))
        bounds = (ensemble.max_log_var - ensemble.min_log_var).sum((1, 2))
        optimiser.zero_grad()
        # MBPO's loss: twice the NLL, summed over members; the bounds, which its members share, count once.
        (2 * value.sum() + 0.01 * bounds.mean()).backward()
        optimiser.step()
        losses[step] = value.detach().mean()
        report(step + 1, losses)
        if checkpoint is not None and time.monotonic() - saved > save_every:
            resumable.save(checkpoint, state, {**card, "step": step + 1})
            saved = time.monotonic()
    ensemble.elites.copy_(validation_error(ensemble, val_data).mean(1).argsort()[: len(ensemble.elites)])
    return losses


@dataclass
class Rollout:
    """B trajectories of T steps in the model, environment space; finite everywhere, without meaning after their end."""

    obs: torch.Tensor  # [B, T, 45]
    actions: torch.Tensor  # [B, T, 24], as the policy gave them (the model clips, as the simulator does)
    rewards: torch.Tensor  # [B, T]
    next_obs: torch.Tensor  # [B, T, 45]
    uncertainty: torch.Tensor  # [B, T]: MOPO's penalty
    alive: torch.Tensor  # [B, T]: 1 up to and including the step that leads to a fall, then 0
    diverged: torch.Tensor  # [B]: whether a value beyond `DIVERGED` came up while alive


@torch.no_grad()
def rollout(ensemble, policy, obs, horizon, generator):
    """`horizon` steps in the model from obs [B, 45] (environment space), with actions drawn from `policy`, as a `Rollout`.

    Each step of each trajectory is drawn from the Gaussian of an elite chosen at random (MBPO, Alg. 2). The uncertainty is
    the largest norm of a member's std, over all members and all 46 normalised outputs (MOPO, Sec. 4.3). A trajectory ends
    when its pen falls. Values beyond `DIVERGED` std are clamped, so that a model that explodes is counted, not fatal.
    """
    if horizon < 1:
        raise ValueError(f"horizon={horizon} is not allowed; it must be 1 or more")
    if obs.ndim != 2 or obs.shape[1] != OBS_DIM:
        raise ValueError(f"obs of shape {tuple(obs.shape)} is not allowed; it must be (B, {OBS_DIM})")
    channels = [*range(OBS_DIM), INPUTS + OBS_DIM]  # observation and reward
    centre, reach = ensemble.mean[channels], DIVERGED * ensemble.std[channels]
    alive, diverged = torch.ones_like(obs[:, 0]), torch.zeros_like(obs[:, 0], dtype=torch.bool)
    rows, steps = torch.arange(len(obs), device=obs.device), []
    for _ in range(horizon):
        actions = policy.sample(obs, generator)
        next_obs, reward, std = ensemble.predict(obs, actions)
        member = ensemble.elites[torch.randint(len(ensemble.elites), rows.shape, generator=generator, device=obs.device)]
        noise = torch.randn(std.shape[1:], generator=generator, device=obs.device)
        new = torch.cat([next_obs, reward[..., None]], -1)[member, rows] + std[member, rows] * noise
        diverged |= ~((new - centre).abs() <= reach).all(-1) & (alive > 0)
        new = torch.where(new.isnan(), centre, new).clamp(centre - reach, centre + reach)
        uncertainty = (std / ensemble.std[OUT]).norm(dim=-1).amax(0).nan_to_num(nan=DIVERGED)
        steps.append((obs, actions, new[:, OBS_DIM], new[:, :OBS_DIM], uncertainty, alive))
        obs = new[:, :OBS_DIM]
        alive = alive * (obs[:, PEN_HEIGHT] >= FALL_HEIGHT)
    return Rollout(*(torch.stack(x, 1) for x in zip(*steps)), diverged)
