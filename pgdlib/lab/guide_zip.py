"""Guides from Stable-Baselines3's zips: of its own MLP policies the weights, of anything else a refusal that names it."""

import io
import json
import math
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from pgdlib.agents.squashed import SquashedGaussian
from pgdlib.policies import GaussianPolicy

ACTIVATIONS = {"torch.nn.modules.activation.Tanh": "tanh", "torch.nn.modules.activation.ReLU": "relu"}
PLAIN = "stable_baselines3.common.torch_layers.FlattenExtractor"
NORMALISED = "pgdlib.lab.guide_ppo.ObservationNormaliser"
MOMENTS = {f"stable_baselines3.common.{of}" for of in ("vec_env.vec_normalize.VecNormalize", "running_mean_std.RunningMeanStd")}
TD3_STD = 0.1  # of TD3's and DDPG's actions, which have none: the noise that TD3's authors explore with
OTHERWISE = "In Python any object with `log_prob(obs, actions)` is a guide, and `load.save_guide` keeps a `GaussianPolicy`"


@dataclass(frozen=True)
class Kind:
    """What Stable-Baselines3 keeps of a policy: its linear layers from observation to mean action, and the usual activation."""

    layers: str  # those with a number, in order
    last: tuple  # those that follow; all but the last of several give the mean, the last log σ
    activation: str


PPO = Kind("mlp_extractor.policy_net", ("action_net",), "tanh")
KINDS = {  # the full name of the class of which MlpPolicy is another name
    "stable_baselines3.common.policies.ActorCriticPolicy": PPO,  # of A2C, too
    "stable_baselines3.sac.policies.SACPolicy": Kind("actor.latent_pi", ("actor.mu", "actor.log_std"), "relu"),
    "stable_baselines3.td3.policies.TD3Policy": Kind("actor.mu", (), "relu"),  # of DDPG, too
}


class _Unfit(ValueError):
    """The reason why a policy cannot be a guide."""


def _need(good, reason):
    if not good:
        raise _Unfit(reason)


def from_zip(path, obs_dim, action_dim, say=print):
    """The policy in a Stable-Baselines3 zip with an MLP policy and a Box action space from -1 to 1.

    Of PPO and A2C a `GaussianPolicy`, of TD3 and DDPG one with the std `TD3_STD`, of SAC a `SquashedGaussian`. A `VecNormalize`
    that was saved beside it (`vecnormalize.pkl`, `<name>_vecnormalize.pkl`, or as SB3's checkpoints are called) normalises the
    observations; without one `say` says so. Only weights, numbers and plain JSON are read; nothing that a file asks for is run.
    Raises ValueError, naming the parameter `guide`, for a file that is no such zip, is damaged, was trained for other
    observations or actions, or holds a policy that is another function, or of a class that is not Stable-Baselines3's own.
    """
    path = Path(path)
    guide = f"guide={str(path)!r}"
    try:
        with zipfile.ZipFile(path) as z:
            state = torch.load(io.BytesIO(z.read("policy.pth")), map_location="cpu", weights_only=True)
            config = json.loads(z.read("data"))
    except Exception as e:  # a damaged or foreign file breaks these in a dozen ways
        raise ValueError(f"{guide} is not a readable Stable-Baselines3 zip: {type(e).__name__}: {e}") from e
    try:
        kind, activation, normalises = _checked(state, config, (obs_dim, action_dim))
        moments = _own_moments(state) if normalises else _saved_moments(path, obs_dim)
        if moments is None:
            say(f"{path.name}: no VecNormalize is saved beside it, so observations enter its network as they are")
        if len(kind.last) > 1:
            say(f"{path.name}: actions beyond ±1, which SAC never takes, are most unlikely; transform='arctanh' generates none")
        return _policy(state, kind, activation, moments)
    except Exception as e:
        reason = str(e) if isinstance(e, _Unfit) else f"{type(e).__name__}: {e}"
        raise ValueError(
            f"{guide} holds no MLP policy with continuous actions that fits here, of PPO, A2C, SAC, TD3 or DDPG: "
            f"{reason}. {OTHERWISE}"
        ) from e


def _checked(state, config, dims):
    """(kind, activation, whether it normalises) of an SB3 policy's state dict and the JSON beside it; raises if odd."""
    kwargs, policy = config["policy_kwargs"], _class_name(config["policy_class"])
    kind = KINDS.get(policy, PPO)  # what it is not is found below, and named
    layers, default = _layers(state, kind), {v: k for k, v in ACTIVATIONS.items()}[kind.activation]
    names = ("activation_fn", default), ("features_extractor_class", PLAIN)
    activation, extractor = (_class_name(kwargs.get(key, usual)) for key, usual in names)
    needed = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")] + ["log_std"] * (kind is PPO)
    _need("mlp_extractor.shared_net.0.weight" not in state, "policy and value share layers of it (mlp_extractor.shared_net)")
    _need(not config["use_sde"], "its exploration is state-dependent (use_sde)")
    _need(layers and not (missing := [k for k in needed if k not in state]), f"{', '.join(missing)} missing")
    known = ", ".join(KINDS)
    _need(policy in KINDS, f"its policy is a {policy}; a zip can hold only Stable-Baselines3's own MlpPolicy, {known}")
    odd = [layer for layer in layers if state[f"{layer}.weight"].ndim != 2]
    _need(not odd, f"{', '.join(odd)} is no linear layer, but a normalisation (such as LayerNorm) or another one")
    _need(all(t.isfinite().all() for t in state.values()), "some values are not finite")
    found = state[f"{layers[0]}.weight"].shape[1], len(state[f"{layers[-1]}.bias"])
    text = "it is of another environment, with {} observations and {} actions; needed are {} and {}"
    _need(found == dims, text.format(*found, *dims))
    seen = config["observation_space"].get("_shape")
    _need(seen == [dims[0]], f"its observations have the shape {seen}; needed is a Box of one dimension")  # else transformed
    low, high = ({*re.findall(r"-?\d[\d.e+-]*", str(config["action_space"].get(k, "")))} for k in ("low", "high"))
    _need(low <= {"-1.", "-1.0"} and high <= {"1.", "1.0"}, f"its actions go from {low} to {high}; needed are -1 to 1")
    _need(activation in ACTIVATIONS, f"its activation is {activation}; known are {', '.join(ACTIVATIONS)}")
    more = kwargs.get("features_extractor_kwargs") or ""
    _need(extractor in (PLAIN, NORMALISED) and not more, f"its features extractor is {extractor}({more})")
    return kind, ACTIVATIONS[activation], extractor == NORMALISED


def _layers(state, kind):
    """The names of the linear layers from observation to mean action in an SB3 policy's state dict, in order."""
    numbers = sorted({int(k[len(kind.layers) + 1 :].split(".")[0]) for k in state if k.startswith(f"{kind.layers}.")})
    return [f"{kind.layers}.{i}" for i in numbers] + list(kind.last)


def _class_name(kept):
    """The full name of a class in the JSON of SB3's zip: the text "<class 'a.b.Name'>", or its attributes as texts."""
    if isinstance(kept, dict):
        method = re.search(r"<function ([\w.<>]+)\.\w+ at ", str(kept))
        return f"{kept['__module__']}.{method[1] if method else '(a class without methods)'}"
    return str(kept).removeprefix("<class '").removesuffix("'>")


def _own_moments(state):
    """(mean, std, clip) of the observations, of a `guide_ppo.ObservationNormaliser`."""
    return state["features_extractor.mean"], (state["features_extractor.var"] + 1e-8).sqrt(), 10.0


class _Attributes:
    """Stands for any object of a pickle: its attributes alone."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        vars(self).update(state if isinstance(state, dict) else {})


class _Inert(pickle.Unpickler):
    """Reads a pickle and runs nothing that it asks for: numpy's arrays become arrays, all else `_Attributes`."""

    def find_class(self, module, name):
        arrays = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")
        if module.split(".")[0] == "numpy" and name in arrays:
            return super().find_class(module, name)
        return type(name, (_Attributes,), {"__module__": module})


def _saved_moments(path, obs_dim):
    """(mean, std, clip) of the observations, of a `VecNormalize` beside the zip; None if there is none, or it leaves them."""
    names = [f"{path.stem}_vecnormalize", re.sub(r"(_\d+_steps)$", r"_vecnormalize\1", path.stem), "vecnormalize"]
    file = next((f for name in names if (f := path.with_name(f"{name}.pkl")).is_file()), None)
    if file is None:
        return None
    try:
        loaded = _Inert(io.BytesIO(file.read_bytes())).load()
        kept, parts = vars(loaded), [loaded, *filter(None, [vars(loaded).get("obs_rms")])]
        odd = {f"{type(part).__module__}.{type(part).__name__}" for part in parts} - MOMENTS
        if odd:
            raise TypeError(f"it holds a {', '.join(odd)}; known are only {', '.join(sorted(MOMENTS))}")
        if not kept["norm_obs"]:
            return torch.zeros(obs_dim), torch.ones(obs_dim), math.inf
        mean, var = (torch.as_tensor(getattr(kept["obs_rms"], of), dtype=torch.float64) for of in ("mean", "var"))
        std, clip = (var + float(kept["epsilon"])).sqrt(), float(kept["clip_obs"])
    except Exception as e:  # a damaged or foreign file breaks these in a dozen ways
        raise _Unfit(f"the VecNormalize beside it, {file.name}, cannot be used: {type(e).__name__}: {e}") from e
    good = mean.shape == std.shape == (obs_dim,) and mean.isfinite().all() and std.isfinite().all() and clip > 0
    _need(good, f"the VecNormalize beside it, {file.name}, is of {len(mean)} observations, or not finite")
    return mean.float(), std.float(), clip


def _policy(state, kind, activation, moments):
    """The policy of an SB3 policy's state dict, with `moments` (mean, std, clip) of the observations, or None."""
    layers, squashed = _layers(state, kind), len(kind.last) > 1
    weights, biases = ([state[f"{layer}.{part}"] for layer in layers] for part in ("weight", "bias"))
    sizes = weights[0].shape[1], len(biases[-1]), [len(b) for b in biases[: -2 if squashed else -1]]
    clip = min(moments[2] if moments else math.inf, torch.finfo(torch.float32).max)  # none, in a number that JSON has
    if squashed:
        weights[-2:], biases[-2:] = [torch.cat(weights[-2:])], [torch.cat(biases[-2:])]
        policy = SquashedGaussian(*sizes, activation, clip)
    else:
        policy = GaussianPolicy(*sizes, activation, clip, squash=kind is not PPO)
    loaded = {} if squashed else {"log_std": state.get("log_std", torch.full((sizes[1],), math.log(TD3_STD)))[None, None]}
    loaded |= dict(zip(("obs_mean", "obs_std"), moments or (policy.obs_mean, policy.obs_std)))
    loaded |= {f"net.weights.{i}": w.T[None] for i, w in enumerate(weights)}
    loaded |= {f"net.biases.{i}": b[None, None] for i, b in enumerate(biases)}
    policy.load_state_dict(loaded)  # checks every shape
    return policy


def of_ppo(state):
    """The `GaussianPolicy` of the state dict of an SB3 PPO with a `guide_ppo.ObservationNormaliser` and tanh."""
    return _policy(state, PPO, "tanh", _own_moments(state))
