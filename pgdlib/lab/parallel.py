"""Train the denoiser into runs/, where the notebooks find it, with several processes, each on a GPU of its own if there are.

torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m pgdlib.lab.parallel --dataset cloned --scale paper

The first process trains as one alone does. Of each batch the others compute a share of the gradients, by its weights and with
its noise; they have no data and keep nothing.
"""

import argparse
import copy
import os
import sys

import torch
import torch.distributed as dist
import yaml

from pgdlib import edm
from pgdlib.lab import load, models, settings

GIVEN = dict(dataset="cloned", scale="quick", source="auto", seed=0, device="auto", transform="raw", denoiser="train")
SIZES = ("data_steps", "horizon", "features", "blocks", "train_steps", "batch_size", "optimiser")
GIVEN |= dict.fromkeys(SIZES)  # the scale's own


class Shared(edm.Training):
    """A training whose batches all processes share; the first one iterates it while the others `serve`."""

    def gradients(self, x, mask, sigma, noise):
        _say(self.denoiser.config, noise.get_state(), x.cpu(), mask.cpu(), sigma.cpu())
        return _share(self.denoiser, x, mask, sigma, noise)


def serve(device):
    """Compute a share of the gradients of each batch, until the first process says nothing."""
    denoiser, noise = None, torch.Generator(device)
    while said := _say():
        config, state, *batch = said
        batch = [tensor.to(device) for tensor in batch]
        denoiser = denoiser or edm.Denoiser(**config).to(batch[0])
        _share(denoiser, *batch, noise.set_state(state))


def _say(*what):
    said = [what]  # by the first process, to all
    dist.broadcast_object_list(said)
    return said[0]


def _share(denoiser, x, mask, sigma, noise):
    """As `edm.Training.gradients`, by all processes together, with the weights of the first."""
    rank, world, weights = dist.get_rank(), dist.get_world_size(), list(denoiser.net.parameters())
    for w in weights:
        dist.broadcast(w.data, 0)
        w.grad = None
    a, b = rank * len(x) // world, (rank + 1) * len(x) // world
    part = copy.copy(denoiser)  # it denoises a share, but `edm.loss` draws the noise of the whole batch
    part.forward = lambda x, sigma: torch.cat([x[:a], denoiser(x[a:b], sigma[a:b]), x[b:]])
    value = edm.loss(part, x, mask, sigma, noise)[a:b].sum() / len(x)
    value.backward()
    for total in (value := value.detach(), *(w.grad for w in weights)):
        dist.all_reduce(total)
    return value


def parse(arguments, given=GIVEN, text=__doc__):
    """The settings of a command line that takes those of `given`, name -> default, checked; `text` is its help."""
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in given.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, type=yaml.safe_load, metavar="")
    return settings.check(vars(parser.parse_args(arguments)))


def main(arguments=None):
    """Train as the command line asks; prints the data, the estimate where it is long, and the last losses."""
    p, world = parse(arguments), int(os.environ.get("WORLD_SIZE", 1))
    device = load.device_of(p.device)
    if device.type == "cuda":
        torch.cuda.set_device(device := torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank():
            serve(device)
            return _leave()
    dataset = load.load_data(p.dataset, p.source, p.data_steps)
    _, losses, _ = models.load_denoiser(dataset, p, device, training=Shared if world > 1 else edm.Training)
    print(f"{len(losses):,} training steps, loss of the last tenth: {losses[-max(1, len(losses) // 10) :].mean():.4g}")
    if world > 1:
        _say()
        _leave()
    return 0


def _leave():
    dist.barrier()  # a process that ends while another still talks to it may abort
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, yaml.YAMLError) as reason:
        sys.exit(" ".join(str(reason).split()) if os.environ.get("RANK", "0") == "0" else 1)
