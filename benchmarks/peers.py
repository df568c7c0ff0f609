"""pgdlib beside public libraries at the same sizes, in turn, in one run: `make bench-peers`, or

python -m benchmarks.peers [--seconds 2] [--threads N] [--batches 64 256] [--seeds 1 5]

in an environment with `peers.txt`. A ratio is how many times the peer's rate ours is; NOTES.md says what each does otherwise.
"""

import argparse
import copy
import importlib
import importlib.util
import sys
import types
import warnings
from functools import partial

import torch
from torch import nn

from benchmarks import counts, timing
from benchmarks.stacked_seeds import learner
from pgdlib import edm, sampler

WIDTH, LENGTH, STEPS, CHURN = 64, 64, 32, 6.4
IQL_WIDTH, IQL_BATCH, IQL_STEPS = 256, 512, 10
TYPE = torch.bfloat16 if edm.has_bfloat16(torch.device("cpu")) else torch.float32  # in which our networks compute


def k_diffusion():
    """Its samplers alone: the package as a whole imports torchvision, whose builds fit only some of torch's."""
    package, utils = (types.ModuleType(name) for name in ("k_diffusion", "k_diffusion.utils"))
    package.__path__ = list(importlib.util.find_spec("k_diffusion").submodule_search_locations)
    package.utils, utils.append_dims = utils, lambda x, ndim: x[(..., *[None] * (ndim - x.ndim))]
    sys.modules.update({"k_diffusion": package, "k_diffusion.utils": utils})
    return importlib.import_module("k_diffusion.sampling")


class Planner(nn.Module):
    """The U-Net of the planner in `diffusers`, a residual block a level, in float32, called as ours is."""

    def __init__(self):
        super().__init__()
        from diffusers import UNet1DModel

        sizes = dict(in_channels=counts.SPEC.width, out_channels=counts.SPEC.width, block_out_channels=(WIDTH, 2 * WIDTH))
        kinds = dict(down_block_types=("DownResnetBlock1D",) * 2, up_block_types=("UpResnetBlock1D",), layers_per_block=0)
        kinds |= dict(mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock", act_fn="mish")
        self.net = UNet1DModel(**sizes, **kinds, time_embedding_type="positional", use_timestep_embedding=True)

    def forward(self, x, noise):
        return self.net(x.float().mT, noise.expand(len(x))).sample.mT


def denoisers():
    """(ours, the same with the U-Net of `diffusers`), untrained: weights change no speed."""
    torch.manual_seed(0)
    ours = edm.Denoiser(counts.SPEC.obs_dim, counts.SPEC.action_dim, LENGTH, WIDTH, 2)
    other = copy.deepcopy(ours)
    other.net = Planner()
    return ours.requires_grad_(False), other.requires_grad_(False)


def multistep(denoiser, shape):
    """A drawing by the DPM-Solver++(2M) of `diffusers`, from what `denoiser` makes of x."""
    from diffusers import EDMDPMSolverMultistepScheduler

    scheduler = EDMDPMSolverMultistepScheduler(sigma_data=denoiser.SIGMA_DATA)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(shape) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t).to(TYPE)
        x = scheduler.step(denoiser.net(x_in, t.reshape(1).float()).float(), t, x).prev_sample
    return x


def sampling(seconds, batches):
    """Rows of the networks and the samplers. With the same network, a ratio is what the loop around it costs."""
    solvers, (ours, other) = k_diffusion(), denoisers()
    sigmas, seen = sampler.noise_levels(STEPS).float(), dict(disable=True, s_churn=CHURN)
    seen |= dict(s_tmin=sampler.S_TMIN, s_tmax=sampler.S_TMAX, s_noise=sampler.S_NOISE)
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (ours.net, other.net)]
    for batch in batches:
        shape, noise, size = (batch, LENGTH, counts.SPEC.width), torch.Generator().manual_seed(0), f"{batch} x {LENGTH}"
        x, sigma = torch.randn(shape), torch.ones(1)
        heun_of_ours = partial(sampler.sample, ours, shape, STEPS, CHURN, noise)
        multistep_of_ours = partial(sampler.sample, ours, shape, STEPS, 0.0, noise, solver="multistep")

        def heun(model, shape=shape):
            return solvers.sample_heun(model, torch.randn(shape) * sigmas[0], sigmas, **seen)

        weights = f"U-Net, {sizes[0]:.2f} and {sizes[1]:.2f} million weights, {size}"
        yield compare(seconds, weights, "diffusers", partial(ours, x, sigma), partial(other, x, sigma), batch)
        yield compare(seconds, f"Heun, our U-Net, {size}", "k-diffusion", heun_of_ours, partial(heun, ours), batch)
        both = f"Heun, each with its own U-Net, {size}"
        yield compare(seconds, both, "k-diffusion with diffusers", heun_of_ours, partial(heun, other), batch)
        call = partial(multistep, ours, shape)
        yield compare(seconds, f"DPM-Solver++(2M), our U-Net, {size}", "diffusers", multistep_of_ours, call, batch)


def iql(seconds, seeds):
    """Rows of IQL, drawing the batches included."""
    import d3rlpy
    import structlog

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # its log, out of the table
    _, (rows, *_) = learner(1, IQL_WIDTH, IQL_BATCH)
    spec, arrays = counts.SPEC, rows.numpy()
    ends = torch.zeros(len(rows)).numpy()
    ends[99::100] = 1.0
    data = d3rlpy.dataset.MDPDataset(arrays[:, spec.obs], arrays[:, spec.actions].clip(-1, 1), arrays[:, spec.reward], ends)
    theirs = d3rlpy.algos.IQLConfig(batch_size=IQL_BATCH).create(device="cpu:0")
    theirs.build_with_dataset(data)

    def plain():
        for _ in range(IQL_STEPS):
            theirs.update(data.sample_transition_batch(IQL_BATCH))

    for count in seeds:
        made, rows = learner(count, IQL_WIDTH, IQL_BATCH)
        ours = lambda made=made, rows=rows: list(made.train(rows, made.step + IQL_STEPS))  # noqa: E731
        name = f"IQL, {count} seed{'s' * (count > 1)}, width {IQL_WIDTH}, batch {IQL_BATCH}"
        yield compare(seconds, name, "d3rlpy, one seed", ours, plain, count * IQL_STEPS, scale=count, grad=True)


def compare(seconds, name, peer, ours, theirs, units, scale=1.0, grad=False):
    """The cells of a row: `units` a second of both, and the ratio with its quartiles."""
    with torch.set_grad_enabled(grad):
        taken = timing.alternate({"ours": ours, "theirs": theirs}, seconds)
    middle, low, high = timing.ratio(taken, "theirs", "ours", scale)
    rates = timing.rate(taken, "ours", units), timing.rate(taken, "theirs", units / scale)
    return name, peer, *(f"{rate:.3g}" for rate in rates), f"{middle:.2f}", f"{low:.2f} to {high:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 5])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # those of the peers about each other
    print(f"{given.threads} threads; torch {torch.__version__}; our networks in {TYPE}; trajectories or seed-steps a second")
    print("| path | peer | ours | theirs | ratio | quartiles |\n|---|---|---|---|---|---|")
    for rows in (sampling(given.seconds, given.batches), iql(given.seconds, given.seeds)):
        for row in rows:
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
