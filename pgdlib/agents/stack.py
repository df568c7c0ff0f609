"""Offline agents in stacks: R runs (seeds, and everything else that shares shapes) trained as one batch, each as if alone.

Runs share nothing: weights, data and random draws are their own, so that one that diverges leaves the others untouched.
Shapes: R runs, B transitions a batch. Observations and actions are in environment space; networks see normalised ones.
"""

import copy
import math

import torch
from torch import nn

from pgdlib.edm import has_bfloat16, seeded
from pgdlib.simulators.pen import ACTION_DIM, OBS_DIM

OBS, ACTIONS, NEXT_OBS = slice(0, 45), slice(45, 69), slice(71, 116)  # of a packed transition
REWARD, TERMINAL, WIDTH = 69, 70, 116
DIVERGED = 1e6  # a mean value of states beyond it is no return of this task, which are 6,100 discounted at most
CHUNK = 64  # training steps whose batches are drawn together


def transitions(obs, actions, rewards, terminals, next_obs):
    """Packed transitions [N, 116] of tensors [N, ...] in environment space; actions clipped, as the simulator does."""
    return torch.cat([obs, actions.clamp(-1, 1), rewards[:, None], terminals[:, None], next_obs], -1)


def of_trajectories(data):
    """Packed transitions [N, 116] of `data.Trajectories`."""
    return transitions(data.obs, data.actions, data.rewards, data.terminals, data.next_obs)


class StackedMLP(nn.Module):
    """R independent MLPs with ReLU, initialised as torch's `Linear` is, each from its own generator."""

    def __init__(self, widths, generators):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in zip(widths, widths[1:]):
            drawn = [torch.rand(i + 1, o, generator=g) for g in generators]
            layer = (2 * torch.stack(drawn) - 1) / math.sqrt(i)
            self.weights.append(layer[:, :-1].clone())
            self.biases.append(layer[:, -1:].clone())

    def forward(self, x, frozen=False):
        """[R, B, o] at x [R, B, i]. frozen: no gradient reaches the weights.

        Hidden layers and all gradients are in bfloat16 where the device multiplies it; the last layer, which gives values and
        actions, is in float32.
        """
        low = torch.bfloat16 if has_bfloat16(x.device) and x.dtype != torch.float64 else self.weights[0].dtype
        layers = [(w.detach(), b.detach()) if frozen else (w, b) for w, b in zip(self.weights, self.biases)]
        x = x.to(low)
        for weight, bias in layers[:-1]:
            x = torch.baddbmm(bias.to(low), x, weight.to(low)).relu_()
        return _LastLayer.apply(x, *layers[-1])


class _LastLayer(torch.autograd.Function):
    """x w + b in the precision of w, with gradients in that of x, which autograd by itself would take in w's too."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        x = x.to(weight.dtype)
        if weight.shape[2] > 1:
            return torch.baddbmm(bias, x, weight)
        return torch.baddbmm(bias, weight.mT, x.mT).mT  # the same; CPUs are slow at products with one column

    @staticmethod
    def backward(ctx, slope):
        x, weight = ctx.saved_tensors
        low = slope.to(x.dtype)
        of_weight = torch.bmm(x.mT, low).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return torch.bmm(low, weight.to(x.dtype).mT), of_weight, slope.sum(1, keepdim=True)


class StackedPolicy(nn.Module):
    """R policies N(tanh μ(s), diag(std²)), with a std that does not depend on the state and their normalisation inside.

    As a target of guidance it is one policy for a batch whose blocks belong to the runs: the first B/R rows to the first.
    """

    is_gaussian = True

    def __init__(self, hidden, generators, obs_mean, obs_std, log_std=-1.0, learn_std=True):
        super().__init__()
        self.runs = len(generators)
        self.net = StackedMLP([OBS_DIM, *hidden, ACTION_DIM], generators)
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        self.log_std = nn.Parameter(torch.full((self.runs, 1, ACTION_DIM), float(log_std)), requires_grad=learn_std)

    def normalise(self, obs):
        """Observations as the networks see them: zero mean, unit variance, within ±10."""
        return ((obs - self.obs_mean) / self.obs_std).clamp(-10, 10)

    def forward(self, obs):
        """Mean and std, both [B, ..., 24], at obs [B, ..., 45], B a multiple of R."""
        if len(obs) % self.runs:
            raise ValueError(f"batch={len(obs)} is not allowed; it must be a multiple of the {self.runs} stacked policies")
        mean = self.net(self.normalise(obs).reshape(self.runs, -1, OBS_DIM)).tanh()
        std = self.log_std.clamp(-5, 2).exp().expand_as(mean)
        shape = (*obs.shape[:-1], ACTION_DIM)
        return mean.reshape(shape), std.reshape(shape)

    def log_prob(self, obs, actions):
        """log π(a|s) [B, ...] of each row under its own policy; differentiable in both."""
        mean, std = self(obs)
        return (-0.5 * ((actions - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self):
        """H(π) in nats of each run, [R]."""
        return (self.log_std.clamp(-5, 2) + 0.5 * math.log(2 * math.pi * math.e)).sum((1, 2)).detach()

    def sample(self, obs, generator=None):
        """One action [B, ..., 24] for every observation."""
        mean, std = self(obs)
        return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)

    @torch.no_grad()
    def act(self, obs):
        """The mean actions, on numpy arrays: [R n, 45] -> [R n, 24]."""
        return self(torch.as_tensor(obs, dtype=torch.float32, device=self.log_std.device))[0].cpu().numpy()

    def select(self, runs):
        """The policies of the `runs` (indices) as a stack of their own, a copy without gradients."""
        other = copy.deepcopy(self).requires_grad_(False)
        other.runs = len(runs)
        for parameter in other.parameters():
            parameter.data = parameter.data[list(runs)]
        return other


class BC(nn.Module):
    """Behaviour cloning: maximum likelihood of the data's actions."""

    def __init__(self, seeds, obs_mean, obs_std, hidden=(256, 256)):
        super().__init__()
        self.policy = StackedPolicy(hidden, generators(seeds), obs_mean, obs_std)

    def losses(self, batch, step, seeds):
        """The loss of each run [R], and the mean value that it gives to the states [R] or None."""
        return -self.policy.log_prob(batch[..., OBS], batch[..., ACTIONS]).mean(1), None

    def after_step(self):
        """What follows an optimiser's step: nothing here."""


def generators(seeds):
    """A generator for the initial weights of each run; runs of one seed start alike."""
    return [seeded("cpu", seed, 0) for seed in seeds]


class Learner:
    """An agent in training: Adam, its step, and which runs have diverged; it goes on exactly from a saved state.

    The learning rate of the policy falls along a cosine to zero at `steps`, the others stay (as in the code of IQL).
    """

    def __init__(self, agent, seeds, steps, batch_size=512, learning_rate=3e-4):
        self.agent, self.seeds, self.steps, self.batch_size = agent, list(seeds), steps, batch_size
        self.learning_rate, self.step = learning_rate, 0
        actor = list(agent.policy.parameters())
        known = {id(p) for p in actor}
        critic = [p for p in agent.parameters() if id(p) not in known]
        groups = [dict(params=[p for p in group if p.requires_grad]) for group in (actor, critic)]
        self.optimiser = torch.optim.Adam(groups, learning_rate, fused=True)
        for p in (p for group in groups for p in group["params"]):  # what Adam would make in its first step
            self.optimiser.state[p] = dict(step=p.new_zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        self.diverged_at = torch.full((len(self.seeds),), -1, device=agent.policy.log_std.device)

    def train(self, data, until, report=lambda step: None):
        """Go on to step `until` on `data`, packed transitions [N, 116] for each run (the runs may share tensors)."""
        ids = None
        while self.step < until:
            if ids is None or self.step % CHUNK == 0:
                ids = self._draw([len(d) for d in data])
            self._step(torch.stack([d.index_select(0, i[self.step % CHUNK]) for d, i in zip(data, ids, strict=True)]))
            report(self.step)

    def _draw(self, counts):
        """Transitions for the CHUNK steps around the present one, [CHUNK, B] for each run, by its seed and the step alone."""
        device, chunk = self.diverged_at.device, 1 + self.step // CHUNK
        ids = []
        for seed, count in zip(self.seeds, counts, strict=True):
            u = torch.rand(CHUNK, self.batch_size, generator=seeded(device, seed, chunk), device=device)
            ids.append((u * count).long().clamp_max(count - 1))
        return ids

    def _step(self, batch):
        self.optimiser.param_groups[0]["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.optimiser.zero_grad()
        loss, value = self.agent.losses(batch, self.step, self.seeds)
        loss.sum().backward()
        self.optimiser.step()
        self.agent.after_step()
        self.step += 1
        bad = ~loss.isfinite() if value is None else ~(loss.isfinite() & (value.abs() < DIVERGED))
        self.diverged_at = torch.where(bad.detach() & (self.diverged_at < 0), self.step, self.diverged_at)

    def state(self):
        """(tensors, card) of everything that the next step depends on, but for the data."""
        tensors = {f"agent.{k}": v for k, v in self.agent.state_dict().items()}
        for i, state in enumerate(self.optimiser.state.values()):
            tensors.update({f"adam.{i}.{k}": v for k, v in state.items()})
        return {**tensors, "diverged_at": self.diverged_at}, dict(step=self.step)

    def load_state(self, tensors, card):
        """Go back to what `state` gave."""
        own, _ = self.state()
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.step = card["step"]
