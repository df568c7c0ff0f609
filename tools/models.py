"""Train the models that ship in the package, of the stand-ins' data, and put them there: `make models`.

It says first what each took when it was last trained; one that is stopped goes on where it was.
"""

import argparse
import platform
import re
import sys
from pathlib import Path

import torch

from pgdlib.lab import artifacts, load, models, settings

LONG = dict(features=128, batch_size=128, passes=None)
RECIPES = {  # kind and data: what differs from quick's settings
    "denoiser_cloned": LONG | dict(train_steps=24_000),
    "denoiser_human": LONG | dict(batch_size=64, train_steps=500),  # more would only copy its 25 episodes
    "worldmodel_cloned": {},  # three times as many steps err no less on data kept back
}
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}; all by default")
    names = parser.parse_args(argv).names or [*RECIPES]
    if unknown := set(names) - {*RECIPES}:
        parser.error(f"model {min(unknown)!r} is not known; it must be one of {', '.join(RECIPES)}")
    for name in names:
        if (path := models.ASSETS / f"{name}.safetensors").exists():
            card = artifacts.load(path)[1]
            print(f"{name}: last time {card['seconds'] / 3600:.1f} hours on {card['machine']}", flush=True)
    for name in names:
        (kind, dataset), p = name.split("_"), settings_of(name)
        ds = load.load_data(dataset, "local", p.data_steps)
        network, losses, card = LOADERS[kind](ds, p, load.device_of("auto"))
        ship(name, network, losses, card, made=ds.made, machine=machine())
        print(f"{name}: the mean loss of the last tenth is {losses[-len(losses) // 10 :].mean():.4g}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
