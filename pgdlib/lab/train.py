"""Train the denoiser into runs/, where the notebooks find it, with one process or several.

python -m pgdlib.lab.train --dataset cloned --scale paper
torchrun --standalone --nproc-per-node 2 -m pgdlib.lab.train --dataset cloned --scale paper
"""

import argparse
import ast
import os
import sys
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from pgdlib import edm
from pgdlib.lab import load, params

PARAMETERS = dict(
    dataset=params.one_of(*params.DATASETS),
    scale=params.one_of(*params.SCALES),
    source=params.one_of(*params.SOURCES),
    seed=params.integer(0),
    device=params.one_of(*params.DEVICES),
    transform=params.one_of("raw", "arctanh"),
    **params.optional_settings("data_steps horizon features blocks train_steps batch_size"),
)  # as in notebook 02
GIVEN = dict(dataset="cloned", scale="quick", source="auto", seed=0, device="auto", transform="raw")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        flags = (a.option_strings[-1] for a in self._actions)
        raise ValueError(f"{message}; allowed are {', '.join(flags)}")


def parse(arguments, about=__doc__, rules=PARAMETERS, given=GIVEN):
    """The settings, as `params.check` gives them, by name -> rule and name -> default, None where there is none.

    Raises ValueError that names argument, value and what is allowed.
    """
    parser = _Parser(description=about, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    for name, (_, words) in rules.items():
        parser.add_argument(_flag(name), default=given.get(name), type=_value, metavar="", help=words)
    return params.check(vars(parser.parse_args(arguments)), **rules)


def main(arguments=None):
    """Train as the command line asks; prints the data, the estimate where it is long, and the last losses."""
    rank = int(os.environ.get("RANK", 0))
    try:
        _train(parse(arguments), rank)
    except (ValueError, FileNotFoundError) as reason:
        sys.exit(" ".join(str(reason).split()) if rank == 0 else 1)


def _train(p, rank):
    device, several = load.device_of(p.device), int(os.environ.get("WORLD_SIZE", 1)) > 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--nproc-per-node must be at most {torch.cuda.device_count()}, one process for each GPU")
        torch.cuda.set_device(device)
    if several:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        progress, say = partial(tqdm, disable=rank > 0), print if rank == 0 else lambda text: None
        dataset = load.load_data(p.dataset, p.source, p.data_steps, progress, say)
        _, losses = load.load_denoiser(dataset, p, device, progress, say)
        say(f"{len(losses):,} training steps, loss of the last tenth: {losses[-max(1, len(losses) // 10) :].mean():.4g}")
    finally:
        if several and edm.processes()[1] > 1:
            dist.destroy_process_group()


def _flag(name):
    return f"--{name.replace('_', '-')}"


def _value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
