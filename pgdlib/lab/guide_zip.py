"""Guides from Stable-Baselines3's zips: of its own MLP policy the weights, of anything else a refusal that names it."""

import io
import json
import re
import zipfile

import torch

from pgdlib.policies import GaussianPolicy

ACTIVATIONS = {"torch.nn.modules.activation.Tanh": "tanh", "torch.nn.modules.activation.ReLU": "relu"}
POLICY = "stable_baselines3.common.policies.ActorCriticPolicy"  # which MlpPolicy is another name of
PLAIN = "stable_baselines3.common.torch_layers.FlattenExtractor"
NORMALISED = "pgdlib.lab.guide_ppo.ObservationNormaliser"
OTHERWISE = (
    "In Python any object with `log_prob(obs, actions)` is a guide, and `load.save_guide` keeps a `GaussianPolicy` of your own"
)


class _Unfit(ValueError):
    """The reason why a policy cannot be a `GaussianPolicy`."""


def from_zip(path, obs_dim, action_dim):
    """The `GaussianPolicy` in a Stable-Baselines3 PPO zip with an MLP policy and a Box action space.

    Only weights (`policy.pth`) and plain JSON are read; nothing in the file is unpickled. Raises ValueError, naming the
    parameter `guide`, for a file that is no such zip, is damaged, was trained for other observations or actions, or holds
    a policy that is another function, or of a class that is not Stable-Baselines3's own.
    """
    guide = f"guide={str(path)!r}"
    try:
        with zipfile.ZipFile(path) as z:
            state = torch.load(io.BytesIO(z.read("policy.pth")), map_location="cpu", weights_only=True)
            config = json.loads(z.read("data"))
    except Exception as e:  # a damaged or foreign file breaks these in a dozen ways
        raise ValueError(f"{guide} is not a readable Stable-Baselines3 zip: {type(e).__name__}: {e}") from e
    try:
        return gaussian(state, *_checked(state, config, (obs_dim, action_dim)))
    except Exception as e:
        reason = str(e) if isinstance(e, _Unfit) else f"{type(e).__name__}: {e}"
        raise ValueError(
            f"{guide} holds no PPO MLP policy with continuous actions that fits here: {reason}. {OTHERWISE}"
        ) from e


def _checked(state, config, dims):
    """(activation, whether it normalises) of an SB3 policy's state dict and the JSON beside it; raises anything if odd."""

    def need(good, reason):
        if not good:
            raise _Unfit(reason)

    kwargs, layers = config["policy_kwargs"], _layers(state)
    policy, activation, extractor = (
        _class_name(kept)
        for kept in (
            config["policy_class"],
            kwargs.get("activation_fn", "torch.nn.modules.activation.Tanh"),
            kwargs.get("features_extractor_class", PLAIN),
        )
    )
    needed = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")] + ["log_std"]
    need("mlp_extractor.shared_net.0.weight" not in state, "policy and value share layers of it (mlp_extractor.shared_net)")
    need(not (missing := [k for k in needed if k not in state]), f"{', '.join(missing)} missing")
    need(policy == POLICY, f"its policy is a {policy}; a zip can hold only Stable-Baselines3's own MlpPolicy, {POLICY}")
    odd = [layer for layer in layers if state[f"{layer}.weight"].ndim != 2]
    need(not odd, f"{', '.join(odd)} is no linear layer, but a normalisation (such as LayerNorm) or another one")
    need(all(t.isfinite().all() for t in state.values()), "some values are not finite")
    found = state[f"{layers[0]}.weight"].shape[1], len(state["action_net.bias"])
    text = "it is of another environment, with {} observations and {} actions; needed are {} and {}"
    need(found == dims, text.format(*found, *dims))
    need(activation in ACTIVATIONS, f"its activation is {activation}; known are {', '.join(ACTIVATIONS)}")
    need(not config["use_sde"], "its exploration is state-dependent (use_sde)")
    more = kwargs.get("features_extractor_kwargs") or ""
    need(extractor in (PLAIN, NORMALISED) and not more, f"its features extractor is {extractor}({more})")
    return ACTIVATIONS[activation], extractor == NORMALISED


def _layers(state):
    """The names of the linear layers from observation to mean action in an SB3 policy's state dict, in order."""
    numbers = sorted({int(k.split(".")[2]) for k in state if k.startswith("mlp_extractor.policy_net.")})
    return [f"mlp_extractor.policy_net.{i}" for i in numbers] + ["action_net"]


def _class_name(kept):
    """The full name of a class in the JSON of SB3's zip: the text "<class 'a.b.Name'>", or its attributes as texts."""
    if isinstance(kept, dict):
        method = re.search(r"<function ([\w.<>]+)\.\w+ at ", str(kept))
        return f"{kept['__module__']}.{method[1] if method else '(a class without methods)'}"
    return str(kept).removeprefix("<class '").removesuffix("'>")


def gaussian(state, activation, normalised):
    """The `GaussianPolicy` of an SB3 policy's state dict; `normalised` if it has a `guide_ppo.ObservationNormaliser`."""
    layers = _layers(state)
    weights, biases = ([state[f"{layer}.{part}"] for layer in layers] for part in ("weight", "bias"))
    clip = 10.0 if normalised else torch.finfo(torch.float32).max  # none, in a number that JSON has
    policy = GaussianPolicy(weights[0].shape[1], len(biases[-1]), [len(b) for b in biases[:-1]], activation, clip)
    loaded = {"log_std": state["log_std"][None, None], "obs_mean": policy.obs_mean, "obs_std": policy.obs_std}
    loaded |= {f"net.weights.{i}": w.T[None] for i, w in enumerate(weights)}
    loaded |= {f"net.biases.{i}": b[None, None] for i, b in enumerate(biases)}
    if normalised:
        loaded["obs_mean"] = state["features_extractor.mean"]
        loaded["obs_std"] = (state["features_extractor.var"] + 1e-8).sqrt()
    policy.load_state_dict(loaded)  # checks every shape
    return policy
