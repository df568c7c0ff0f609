"""Train the models and the runners' guides that ship in the package, and put them there: `make models`.

It says first what each took when it was last trained; one that is stopped goes on where it was.
"""

import argparse
import platform
import re
import sys
from pathlib import Path

import numpy as np
import torch

from pgdlib.lab import artifacts, guide_ppo, load, models, settings, tasks
from pgdlib.simulators import locomotion

LONG = dict(features=128, batch_size=128, passes=None)
RECIPES = {  # kind and data: what differs from quick's settings
    "denoiser_cloned": LONG | dict(train_steps=24_000),
    "denoiser_expert": LONG | dict(train_steps=12_000),  # what it is to learn is one policy's
    "denoiser_human": LONG | dict(batch_size=64, train_steps=500),  # more would only copy its 25 episodes
    "denoiser_hopper-medium": LONG | dict(batch_size=64, train_steps=10_000),
    "denoiser_walker2d-medium": LONG | dict(batch_size=64, train_steps=6_000),
    "denoiser_halfcheetah-medium": LONG | dict(batch_size=64, train_steps=6_000),
    "worldmodel_cloned": {},  # three times as many steps err no less on data kept back
}
SEEDS = dict(hopper=1)  # of PPO, where not 0
STAGES = 5  # of a guide's training, up to the medium one, which act in stand-ins
KNOWN = [*locomotion.RUNNERS, *RECIPES]  # data are made of the guides
LOADERS = {"denoiser": models.load_denoiser, "worldmodel": models.load_world_model}


def settings_of(name):
    """The settings with which the model `name` is trained."""
    return settings.defaults("quick", seed=0, transform="raw", denoiser="train", **RECIPES[name])


def machine():
    """The processor, by name, and how many threads of it are used here."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{found[1] if found else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def ship(name, network, losses, card, **more):
    """Write the model `name` into the package; what is large of its weights in half precision, for they are used in less."""
    tensors = {k: t.half() if t.numel() > 10_000 and t.is_floating_point() else t for k, t in network.state_dict().items()}
    artifacts.save(models.ASSETS / f"{name}.safetensors", {**tensors, "losses": losses}, {**card, **more})


def train_guide(name):
    """Train the guide of the runner `name`, and ship it and the stages of its training that act in stand-ins.

    Medium is the first stage whose returns, of the actions that it samples as it trains, come to a third of the last one's.
    """
    task, stages = tasks.by_name(name), []
    training = guide_ppo.Training(task.simulator, SEEDS.get(name, 0), 500_000, **guide_ppo.OF_TASK[name])
    for step in training:
        found = [episode["r"] for episode in training.model.ep_info_buffer or [dict(r=0.0)]]
        stages.append((step, float(np.mean(found)), training.policy()))
        print(f"{name}: {step:,} steps, return {stages[-1][1]:.0f}", flush=True)
    ship_guide(task, stages, training.card, training.curve)


def ship_guide(task, stages, parameters, curve):
    """Write the guide and the stages (steps, return, policy) of its training into the package.

    `curve` is of mean actions, the card's "training" of sampled ones, as it trained.
    """
    medium = next(i for i, (_, found, _) in enumerate(stages) if found >= stages[-1][1] / 3)
    taken = [stages[i] for i in np.linspace(0, medium, STAGES).round().astype(int)]
    policy, training = stages[-1][2], [[steps, round(found)] for steps, found, _ in stages[:: -(-len(stages) // 100)]]
    card = dict(kind="guide", parameters=parameters, curve=curve, training=training, machine=machine())
    load.save_guide(task.guide, policy, {**card, **guide_ppo.evaluation(task.simulator, policy)})
    tensors = {f"{i}.{k}": t for i, (*_, stage) in enumerate(taken) for k, t in stage.state_dict().items()}
    card |= dict(kind="stages", config=policy.config, steps=[s for s, *_ in taken], returns=[r for _, r, _ in taken])
    artifacts.save(tasks.ASSETS / f"stages_{task.name}.safetensors", tensors, card)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(KNOWN)}; all by default")
    names = parser.parse_args(argv).names or KNOWN
    if unknown := set(names) - {*KNOWN}:
        parser.error(f"model {min(unknown)!r} is not known; it must be one of {', '.join(KNOWN)}")
    for name in names:
        if (path := models.ASSETS / f"{name}.safetensors").exists():
            card = artifacts.load(path)[1]
            print(f"{name}: last time {card['seconds'] / 3600:.1f} hours on {card['machine']}", flush=True)
    for name in names:
        if name in locomotion.RUNNERS:
            train_guide(name)
            continue
        (kind, dataset), p = name.split("_"), settings_of(name)
        ds = load.load_data(dataset, "local", p.data_steps)
        network, losses, card = LOADERS[kind](ds, p, load.device_of("auto"))
        ship(name, network, losses, card, made=ds.made, machine=machine())
        print(f"{name}: the mean loss of the last tenth is {losses[-len(losses) // 10 :].mean():.4g}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
