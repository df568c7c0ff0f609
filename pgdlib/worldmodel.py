"""The autoregressive baseline: an ensemble of probabilistic one-step models (MBPO, MOPO), and rollouts of a policy in it."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgdlib import measures
from pgdlib.data import Trajectories
from pgdlib.fast import adam, generator, has_bfloat16, optimiser_state

DIVERGED = 100.0  # an observation or reward this many std of the data away from its mean marks a rollout as diverged


class Ensemble(nn.Module):
    """M = `members` Gaussians over (Δobs, reward) given (obs, action), of which the `elites` best make rollouts.

    Initial weights come from torch's global generator. Statistics and the choice of elites are buffers.
    """

    def __init__(
        self, obs_dim: int, action_dim: int, members: int = 7, elites: int = 5, hidden: tuple | list = (200, 200, 200, 200)
    ):
        super().__init__()
        if not 1 <= elites <= members:
            raise ValueError(f"elites={elites} is not allowed; it must be 1 or more, and at most members={members}")
        self.config = dict(obs_dim=obs_dim, action_dim=action_dim, members=members, elites=elites, hidden=list(hidden))
        self.obs_dim, inputs, outputs = obs_dim, obs_dim + action_dim, obs_dim + 1
        # Of `mean` and `std`: obs, action; Δobs, reward.
        self.into, self.out = slice(0, inputs), slice(inputs, inputs + outputs)
        widths = [inputs, *hidden, 2 * outputs]
        self.weights = nn.ParameterList(torch.empty(members, i, o) for i, o in zip(widths, widths[1:]))
        self.biases = nn.ParameterList(torch.zeros(members, 1, o) for o in widths[1:])
        for weight in self.weights:
            std = 1 / (2 * math.sqrt(weight.shape[1]))
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        # MBPO's members share these bounds. Here each has its own, so that no member depends on another.
        self.max_log_var = nn.Parameter(torch.full((members, 1, outputs), 0.5))
        self.min_log_var = nn.Parameter(torch.full((members, 1, outputs), -10.0))
        self.register_buffer("mean", torch.zeros(inputs + outputs))
        self.register_buffer("std", torch.ones(inputs + outputs))
        self.register_buffer("elites", torch.arange(elites))

    def fit_normalisation(self, data: Trajectories) -> None:
        """Take mean and std of inputs and outputs from `Trajectories`. An input that never changes gets std 1."""
        x = _transitions(data).double()
        std = x.std(0, unbiased=False)
        std[self.into] = torch.where(std[self.into] < 1e-6, 1.0, std[self.into])
        std[self.out] = std[self.out].clamp_min(1e-6)  # Δ of what never changes is 0: with std 1 its noise would make it wander
        self.mean.copy_(x.mean(0))
        self.std.copy_(std)

    def pairs(self, data: Trajectories) -> tuple[Tensor, Tensor]:
        """`Trajectories` as inputs [N, I] and outputs [N, O], in normalised space, on the ensemble's device."""
        x = (_transitions(data).to(self.mean) - self.mean) / self.std
        return x[:, self.into], x[:, self.out]

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the outputs, [M, B, O] each, at inputs [B, I] or [M, B, I]; normalised space."""
        x = inputs.expand(len(self.max_log_var), -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, F.silu(x) if i else x, weight)
        mean, log_var = x.chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def predict(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """next_obs [M, B, obs_dim], reward [M, B] and the std of both [M, B, obs_dim + 1], at obs, actions [B, ...].

        All in environment space; actions are clipped, as in the simulator.
        """
        pairs = torch.cat([obs, actions.clamp(-1, 1)], -1)
        mean, log_var = self((pairs - self.mean[self.into]) / self.std[self.into])
        mean = mean * self.std[self.out] + self.mean[self.out]
        return obs + mean[..., :-1], mean[..., -1], (0.5 * log_var).exp() * self.std[self.out]


def _transitions(data):
    """[N, I + O] of `Trajectories`, in environment space. Actions are clipped as the simulator did when the data was made."""
    return torch.cat([data.obs, data.actions.clamp(-1, 1), data.next_obs - data.obs, data.rewards[:, None]], -1)


def nll(mean: Tensor, log_var: Tensor, outputs: Tensor) -> Tensor:
    """Gaussian negative log-likelihood of each of `outputs`, in nats."""
    return 0.5 * ((outputs - mean).square() * (-log_var).exp() + log_var + math.log(2 * math.pi))


@torch.no_grad()
def validation_error(ensemble: Ensemble, data: Trajectories, chunk: int = 4096) -> Tensor:
    """The mean squared error [M, O] of each member's mean on `Trajectories`, in normalised space."""
    parts = zip(*(x.split(chunk) for x in ensemble.pairs(data)))
    return sum((ensemble(x)[0] - y).double().square().sum(1) for x, y in parts) / len(data.rewards)


@dataclass
class Recipe:
    """How to train an ensemble; Adam, cosine schedule, an L2 penalty on the weights of each layer."""

    steps: int
    batch_size: int = 256  # for each member
    learning_rate: float = 3e-3  # MBPO has 1e-3; on Adroit Pen this is better after as many steps
    seed: int = 0
    weight_decay: tuple = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # of each layer, as published with MBPO


class Training:
    """The training of an ensemble: iterate it, and the number of steps that are done comes after each of them.

    `ensemble` is trained in place, its elites chosen at the end by the least `validation_error`. Statistics come from
    `train_data`, batches too, other ones for each member. `losses` [steps] are the members' mean NLL of every step, nats. What
    is said of the state of `edm.Training` holds here.
    """

    def __init__(self, ensemble: Ensemble, train_data: Trajectories, val_data: Trajectories, recipe: Recipe):
        if len(recipe.weight_decay) != (layers := len(ensemble.weights)):
            found = f"weight_decay={recipe.weight_decay} is not allowed"
            raise ValueError(f"{found}; it must hold {layers} numbers, one for each layer")
        self.ensemble, self.val_data, self.recipe = ensemble, val_data, recipe
        ensemble.fit_normalisation(train_data)
        self.inputs, self.outputs = ensemble.pairs(train_data)
        groups = [dict(params=[weight], weight_decay=d) for weight, d in zip(ensemble.weights, recipe.weight_decay)]
        groups.append(dict(params=[*ensemble.biases, ensemble.max_log_var, ensemble.min_log_var]))
        self.optimiser = adam(groups, recipe.learning_rate)
        self.step, self.steps, self.losses = 0, recipe.steps, torch.zeros(recipe.steps, device=self.inputs.device)
        self.card = dict(config=ensemble.config, recipe={**vars(recipe), "weight_decay": list(recipe.weight_decay)})

    def __iter__(self) -> Iterator[int]:
        while self.step < self.steps:
            self.advance()
            yield self.step
        error = validation_error(self.ensemble, self.val_data).mean(1)
        self.ensemble.elites.copy_(error.argsort()[: len(self.ensemble.elites)])
        self.losses = self.losses.cpu()

    def advance(self) -> None:
        """One step."""
        recipe, ensemble, device = self.recipe, self.ensemble, self.inputs.device
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        draw, shape = generator(device, "training", recipe.seed, self.step), (len(ensemble.max_log_var), recipe.batch_size)
        ids = torch.randint(len(self.inputs), shape, generator=draw, device=device)
        with torch.autocast(device.type, torch.bfloat16) if has_bfloat16(device) else nullcontext():
            mean, log_var = ensemble(self.inputs[ids])
        value = nll(mean, log_var, self.outputs[ids]).mean((1, 2))
        bounds = (ensemble.max_log_var - ensemble.min_log_var).sum((1, 2))
        self.optimiser.zero_grad()
        # MBPO's loss: twice the NLL, summed over members; the bounds, which its members share, count once.
        (2 * value.sum() + 0.01 * bounds.mean()).backward()
        self.optimiser.step()
        self.losses[self.step] = value.detach().mean()
        self.step += 1

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on beside `step` and the data, live: name -> tensor, to save or to copy into."""
        return {**self.ensemble.state_dict(), **optimiser_state(self.optimiser), "losses": self.losses}


@dataclass
class Rollout:
    """B trajectories of T steps in the model, environment space; finite everywhere, without meaning after their end."""

    obs: Tensor  # [B, T, obs_dim]
    actions: Tensor  # [B, T, action_dim], as the policy gave them (the model clips, as the simulator does)
    rewards: Tensor  # [B, T]
    next_obs: Tensor  # [B, T, obs_dim]
    uncertainty: Tensor  # [B, T]: MOPO's penalty
    alive: Tensor  # [B, T]: 1 up to and including the step that ends the trajectory, then 0
    diverged: Tensor  # [B]: whether a value beyond `DIVERGED` came up while alive


@torch.no_grad()
def rollout(
    ensemble: Ensemble, policy: nn.Module, obs: Tensor, horizon: int, noise: torch.Generator, ended: Callable | None = None
) -> Rollout:
    """`horizon` steps in the model from obs [B, obs_dim] (environment space), with actions drawn from `policy`, as a `Rollout`.

    Each step of each trajectory is drawn from the Gaussian of an elite chosen at random (MBPO, Alg. 2). The uncertainty is
    the largest norm of a member's std, over all members and normalised outputs (MOPO, Sec. 4.3). A trajectory ends where
    `ended(next_obs)` [B, T] says so. Values beyond `DIVERGED` std are clamped: a model that explodes is counted, not fatal.
    """
    if horizon < 1:
        raise ValueError(f"horizon={horizon} is not allowed; it must be 1 or more")
    if obs.ndim != 2 or obs.shape[1] != ensemble.obs_dim:
        raise ValueError(f"obs of shape {tuple(obs.shape)} is not allowed; it must be (B, {ensemble.obs_dim})")
    centre, spread = (torch.cat([v[: ensemble.obs_dim], v[-1:]]) for v in (ensemble.mean, ensemble.std))  # of obs and reward
    reach = DIVERGED * spread
    rows, steps = torch.arange(len(obs), device=obs.device), []
    for _ in range(horizon):
        actions = policy.sample(obs, noise)
        next_obs, reward, std = ensemble.predict(obs, actions)
        member = ensemble.elites[torch.randint(len(ensemble.elites), rows.shape, generator=noise, device=obs.device)]
        drawn = std[member, rows] * torch.randn(std.shape[1:], generator=noise, device=obs.device)
        new = torch.cat([next_obs, reward[..., None]], -1)[member, rows] + drawn
        out_of_range = ~((new - centre).abs() <= reach).all(-1)
        new = torch.where(new.isnan(), centre, new).clamp(centre - reach, centre + reach)
        uncertainty = (std / ensemble.std[ensemble.out]).norm(dim=-1).amax(0).nan_to_num(nan=DIVERGED)
        steps.append((obs, actions, new[:, -1], new[:, :-1], uncertainty, out_of_range))
        obs = new[:, :-1]
    *made, out_of_range = (torch.stack(x, 1) for x in zip(*steps))
    # Asked once, of all steps: a simulator answers on the CPU, and a GPU would wait for it in each of them.
    alive = measures.alive(torch.zeros_like(out_of_range) if ended is None else ended(made[3])).to(obs)
    return Rollout(*made, alive, (out_of_range & (alive > 0)).any(1))
