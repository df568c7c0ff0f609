"""What the paths of pgdlib are measured against: the same sums, as plain as can be, which tests/test_baselines.py proves."""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pgdlib import fast
from pgdlib.simulators import pen, pen_states


def weights(net):
    """A copy of the weights of a `pgdlib.unet.UNet` by name, those of convolutions as torch's own have them."""
    state = {name: v.detach().transpose(1, 2) if v.ndim == 3 else v.detach() for name, v in net.state_dict().items()}
    return {name: v.clone(memory_format=torch.contiguous_format) for name, v in state.items()}


def unet(w, x, noise, groups=8):
    """`pgdlib.unet.UNet` in float32: its `weights` w, trajectories x [B, T, channels], noise [B] -> [B, T, channels]."""

    def conv(name, x):
        return F.conv1d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"])

    def block(name, x):
        scale, shift = linear(f"{name}.modulate", embedding)[:, :, None].chunk(2, 1)
        y = F.silu(norm(f"{name}.norm_1", conv(f"{name}.conv_1", x)) * (1 + scale) + shift)
        y = F.silu(norm(f"{name}.norm_2", conv(f"{name}.conv_2", y)))
        return y + (conv(f"{name}.skip", x) if f"{name}.skip.weight" in w else x)

    half = w["embed.layers.0.weight"].shape[1] // 2
    angles = noise[:, None] * torch.linspace(math.log(0.5), math.log(50.0), half, device=x.device).exp()
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    embedding = F.silu(linear("embed.layers.2", F.silu(linear("embed.layers.0", waves))))
    levels = sum(name.startswith("down") and name.endswith("conv_1.weight") for name in w)
    x, skips = conv("enter", x.transpose(1, 2)), []
    for level in range(levels):
        x = block(f"down.{level}", F.max_pool1d(x, 2) if level else x)
        skips.append(x)
    for up in range(levels - 1):
        x = F.interpolate(conv(f"narrow.{up}", x), scale_factor=2)
        x = block(f"up.{up}", torch.cat([x, skips[levels - 2 - up]], 1))
    return conv("leave", x).transpose(1, 2)


def denoise(w, x, sigma):
    """D(x; σ) of Karras et al., Eq. 7, for data of unit variance: x [B, T, width], sigma [B]."""
    s = sigma[:, None, None]
    out = unet(w, x / (s**2 + 1).sqrt(), sigma.log() / 4)
    return x / (s**2 + 1) + s / (s**2 + 1).sqrt() * out


class PlainTraining:
    """A denoiser in training: Adam and an average of the weights, one tensor after the other."""

    def __init__(self, w, rate):
        self.w = {name: v.detach().clone().requires_grad_() for name, v in w.items()}
        self.average = {name: v.detach().clone() for name, v in w.items()}
        self.optimiser = torch.optim.Adam(self.w.values(), rate, foreach=False)

    def step(self, x, mask, sigma, noise, decay):
        """One step on windows x [B, T, width] with mask [B, T], levels sigma [B] and noise like x; its loss."""
        error = (denoise(self.w, x + sigma[:, None, None] * noise, sigma) - x) ** 2
        counted = mask[:, :, None].repeat(1, 1, x.shape[2])
        counted[:, :, -1] = 1.0  # the terminal flag counts beyond an end too
        loss = ((sigma**2 + 1) / sigma**2 * (error * counted).sum((1, 2)) / counted.sum((1, 2))).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            for name, v in self.w.items():
                self.average[name] += (1 - decay) * (v - self.average[name])
        return loss.detach()


def train(w, windows, how):
    """What `edm.Training` does from the weights w, on its draws and schedules: `PlainTraining` and the losses [steps]."""
    plain, losses = PlainTraining(w, how.learning_rate), []
    for step in range(how.steps):
        generator = fast.generator(windows.steps.device, "training", how.seed, step)
        ids = torch.randint(len(windows), (how.batch_size,), generator=generator, device=windows.steps.device)
        x, mask = windows[ids]
        sigma = (how.p_mean + how.p_std * torch.randn(len(x), generator=generator, device=x.device)).exp()
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        warmup = max(1, how.steps // 10)
        fall = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, how.steps - warmup)))
        rate = 0.1 + 0.9 * step / warmup if step < warmup else fall
        plain.optimiser.param_groups[0]["lr"] = how.learning_rate * rate
        losses.append(plain.step(x, mask, sigma, noise, min(how.ema, (1 + step) / (10 + step))))
    return plain, torch.stack(losses)


@torch.no_grad()
def sample(w, normaliser, policy, shape, steps, churn, warmup, lam, generator, device="cpu"):
    """Algorithm 2 of Karras et al. with the paper's guidance, λ (μ - a) before each step past the warm-up: x of `shape`."""
    rho, start, end = 7.0, 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    sigmas = [(start + i / (steps - 1) * (end - start)) ** rho for i in range(steps)] + [0.0]
    mean, std, spec = normaliser.mean, normaliser.std, normaliser.spec
    x = sigmas[0] * torch.randn(shape, generator=generator, device=device)
    ones = torch.ones(len(x), device=device)
    for i in range(steps):
        if i >= warmup:
            obs = x[:, :, spec.obs] * std[spec.obs] + mean[spec.obs]
            aim = (mean_action(policy, obs) - mean[spec.actions]) / std[spec.actions]
            x = x.clone()
            x[:, :, spec.actions] += lam * (aim - x[:, :, spec.actions])
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        gamma = min(churn / steps, math.sqrt(2) - 1) if 0.05 <= sigma <= 50.0 else 0.0
        sigma_hat = sigma + gamma * sigma
        if gamma > 0:
            noise = 1.003 * torch.randn(shape, generator=generator, device=device)
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * noise
        slope = (x - denoise(w, x, sigma_hat * ones)) / sigma_hat
        x_next = x + (sigma_next - sigma_hat) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoise(w, x_next, sigma_next * ones)) / sigma_next
            x_next = x + (sigma_next - sigma_hat) * (slope + slope_next) / 2
        x = x_next
    return x


def mean_action(policy, obs):
    """The mean of a `pgdlib.policies.GaussianPolicy` with tanh, actions at observations, with torch's own layers."""
    x = ((obs - policy.obs_mean) / policy.obs_std).clamp(-policy.obs_clip, policy.obs_clip)
    *hidden, last = ((w[0].T, b[0, 0]) for w, b in zip(policy.net.weights, policy.net.biases))
    for layer in hidden:
        x = F.linear(x, *layer).tanh()
    return F.linear(x, *last)


class PlainIQL:
    """IQL of one seed with torch's own layers, in float32, from the weights of run `run` of a `pgdlib.agents.iql.IQL`."""

    def __init__(self, agent, run, steps, rate=3e-4):
        self.made, self.steps, self.rate, self.step_number = agent, steps, rate, 0
        self.policy, self.v = network(agent.policy.net, run), network(agent.v, run)
        self.q1, self.q2 = network(agent.q, run), network(agent.q, run + agent.policy.runs)
        self.slow1, self.slow2 = copy.deepcopy(self.q1), copy.deepcopy(self.q2)
        self.log_std = nn.Parameter(agent.policy.log_std[run, 0].detach().clone())
        critic = [p for net in (self.v, self.q1, self.q2) for p in net.parameters()]
        self.actor_adam = torch.optim.Adam([self.log_std, *self.policy.parameters()], rate, foreach=False)
        self.critic_adam = torch.optim.Adam(critic, rate, foreach=False)

    def train(self, rows, batch_size, steps, generator):
        """`steps` steps on batches drawn from `rows`, packed transitions."""
        for _ in range(steps):
            self.step(rows[torch.randint(len(rows), (batch_size,), generator=generator, device=rows.device)])

    def step(self, batch):
        """One step on a batch of packed transitions (environment space): the sum of the three losses."""
        made, spec, normalise = self.made, self.made.spec, self.made.policy.normalise
        obs, next_obs, actions = normalise(batch[:, spec.obs]), normalise(batch[:, spec.next_obs]), batch[:, spec.actions]
        pair = torch.cat([obs, actions], 1)
        with torch.no_grad():
            slow = torch.minimum(self.slow1(pair), self.slow2(pair))[:, 0]
            follows = 1 - batch[:, spec.terminal]
            aim = batch[:, spec.reward] + made.discount * follows * self.v(next_obs)[:, 0]
        advantage = slow - self.v(obs)[:, 0]
        side = torch.where(advantage.detach() < 0, 1 - made.expectile, made.expectile)
        q_loss = ((self.q1(pair)[:, 0] - aim) ** 2).mean() + ((self.q2(pair)[:, 0] - aim) ** 2).mean()
        weight = (made.temperature * advantage.detach()).exp().clamp(max=made.max_weight)
        log_std = self.log_std.clamp(-5, 2)
        law = torch.distributions.Normal(self.policy(obs).tanh(), log_std.exp(), validate_args=False)
        loss = (side * advantage**2).mean() + q_loss - (weight * law.log_prob(actions).sum(1)).mean()
        falling = 0.5 * (1 + math.cos(math.pi * self.step_number / self.steps))
        self.actor_adam.param_groups[0]["lr"] = self.rate * falling
        self.actor_adam.zero_grad()
        self.critic_adam.zero_grad()
        loss.backward()
        self.actor_adam.step()
        self.critic_adam.step()
        with torch.no_grad():
            for slow_q, fast_q in ((self.slow1, self.q1), (self.slow2, self.q2)):
                for slow_p, p in zip(slow_q.parameters(), fast_q.parameters()):
                    slow_p += made.polyak * (p - slow_p)
        self.step_number += 1
        return loss.detach()


def network(stack, i):
    """Network `i` of a `pgdlib.fast.StackedMLP` as torch's own layers."""
    layers = []
    for weight, bias in zip(stack.weights, stack.biases):
        linear = nn.Linear(*weight.shape[1:], device=weight.device)
        linear.load_state_dict(dict(weight=weight[i].detach().T, bias=bias[i, 0].detach()))
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def play(env, targets, actions):
    """Gym episodes, one after the other: targets [n, 4], actions [n, T, 24] -> observations [n, T + 1, 45], rewards [n, T]."""
    sim, obs, rewards = env.unwrapped, [], []
    for target, row in zip(targets, actions):
        start = dict(qpos=sim.init_qpos, qvel=sim.init_qvel, desired_orien=target)
        obs.append([env.reset(seed=0, options=dict(initial_state_dict=start))[0]])
        rewards.append([])
        for action in row:
            seen, reward, *_ = env.step(action)
            obs[-1].append(seen)
            rewards[-1].append(reward)
    return np.array(obs), np.array(rewards)


def dynamics_error(env, obs, actions, variance):
    """[B]: the dynamics error of obs [B, T, 45], actions [B, T, 24], one transition at a time in a gym environment.

    The states are those of `pen.reconstructed`, for all at once; a trajectory outside the simulator's reach is not looked for.
    """
    qpos, qvel = pen.reconstructed(obs, actions)
    sim, errors = env.unwrapped, np.zeros(len(obs))
    env.reset(seed=0)
    for b in range(len(obs)):
        for t in range(obs.shape[1] - 1):
            sim.data.qacc_warmstart[:] = 0.0  # the solver starts from what it did before, elsewhere
            sim.set_state(qpos[b, t], qvel[b, t])
            after = sim.step(actions[b, t])[0]
            after[36:39] = obs[b, t, 36:39]
            after[42:45] = after[33:36] - after[36:39]
            errors[b] += ((after - obs[b, t + 1]) ** 2 / variance).mean()
    return errors / (obs.shape[1] - 1)


class PlainWindows:
    """`data.Windows` as lists: each window cut out beforehand, [horizon, width] and its mask [horizon]."""

    def __init__(self, trajectories, normaliser, horizon):
        self.x, self.mask = [], []
        steps, first = trajectories.packed(), 0
        for length in trajectories.lengths.tolist():
            episode = normaliser.normalise(steps[first : first + length])
            fell = bool(trajectories.terminals[first + length - 1])
            for start in range(max(1, length - horizon + 1 + fell * (horizon // 2))):
                real = episode[start : start + horizon]
                missing = horizon - len(real)
                self.x.append(torch.cat([real, episode[-1:].repeat(missing, 1)]))
                self.mask.append(torch.cat([torch.ones(len(real)), torch.zeros(missing)]))
            first += length

    def __getitem__(self, ids):
        """Windows `ids` [B]: [B, horizon, width] and [B, horizon]."""
        return torch.stack([self.x[i] for i in ids]), torch.stack([self.mask[i] for i in ids])


def gym_env():
    """The gym environment with 200 steps, as `play` and `dynamics_error` take it."""
    return make_env("native").env


def make_env(scale: str = "d4rl", **kwargs):
    """The gym environment: `native` (200 steps, never ends) or `d4rl` (100 steps, ends on the fall)."""
    import gymnasium

    class EndOnFall(gymnasium.Wrapper):
        def step(self, action):
            obs, reward, _, truncated, info = self.env.step(action)
            return obs, reward, bool(obs[pen_states.PEN_HEIGHT] < pen_states.FALL_HEIGHT), truncated, info

    horizons = {"d4rl": pen.D4RL_HORIZON, "native": pen.NATIVE_HORIZON}
    if scale not in horizons:
        raise ValueError(f"scale must be one of {', '.join(horizons)}; got {scale!r}")
    env = type(pen._gym_env())(**kwargs)
    env = EndOnFall(env) if scale == "d4rl" else env
    return gymnasium.wrappers.TimeLimit(env, horizons[scale])
