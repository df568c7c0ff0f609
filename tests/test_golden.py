"""Golden values: what the method computes stays what it was, through every change of the code around it.

Each item is a set of tensors, small and quick to make. On a machine like the one that wrote `golden.json` (the same torch,
the same instruction set, one thread) the digests of all bits are equal; elsewhere rounding differs, and the moments are close.
`python tests/test_golden.py` writes the file anew: do so only in a commit that says why.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # to be run as a program
from conftest import toy

from pgdlib import data, edm, guidance, pgd, sampler, synthetic, worldmodel
from pgdlib.agents import stack
from pgdlib.agents.iql import IQL
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.lab import artifacts, pipeline, study

FILE = Path(__file__).with_name("golden.json")
RULES = ("explicit", "normalised_linear", "normalised_cosine", "proximal", "smoothed", "annealed")


def machine():
    """What decides rounding."""
    return f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, bf16 {_bfloat16()}"


def _bfloat16():
    return edm.has_bfloat16(torch.device("cpu"))


def episodes():
    return toy([40, 25, 60, 33], seed=5)


def denoiser():
    """60 training steps of a small denoiser: (its EMA, the losses)."""
    torch.manual_seed(0)
    trajectories = episodes()
    model = edm.Denoiser(16, 16, 2)
    model.normaliser.fit(trajectories.packed())
    windows = data.Windows(trajectories, model.normaliser, 16)
    return edm.train(model, windows, edm.Training(60, 16, 1e-3, seed=3))


def make():
    """Name -> tensors of everything that is golden."""
    torch.set_num_threads(1)
    model, losses = denoiser()
    guide = pipeline.load_guide()[0]
    found = {"denoiser": [*model.state_dict().values(), losses]}
    model.eval().requires_grad_(False)
    for rule in RULES:
        lam = 5.0 if rule.startswith("normalised") else 0.3
        aim = guidance.Guide(rule, guide, model.normaliser, lam, 8, 2)
        found[f"guided, {rule}"] = list(sampler.draw(model, (6, 16, data.CHANNELS), 8, 1.6, 2, aim))
    found["multistep"] = list(sampler.draw(model, (6, 16, data.CHANNELS), 8, 0.0, 2, solver="multistep"))
    transitions = stack.of_trajectories(episodes())
    mean, std = transitions[:, :45].mean(0), transitions[:, :45].std(0)
    for name, kind in (("IQL", IQL), ("TD3+BC", TD3BC), ("BC", stack.BC)):
        learner = stack.Learner(kind([0, 7], mean, std, (32, 32)), [0, 7], 40, 32, 1e-3)
        learner.train([transitions] * 2, 20)
        found[f"agent, {name}"] = list(learner.agent.state_dict().values())
    lab = SimpleNamespace(normaliser=model.normaliser, variance=episodes().obs.var(0).numpy(), policy=guide, device="cpu")
    x = torch.randn(4, 16, data.CHANNELS, generator=torch.Generator().manual_seed(1)) * 0.3
    values, _ = study.Study.judge(lab, x)
    found["judge"] = [torch.from_numpy(np.nan_to_num(v)) for v in values.values()]
    torch.manual_seed(1)
    ensemble = worldmodel.Ensemble(3, 2, (32, 32))
    how = worldmodel.Training(20, 32, seed=2, weight_decay=(1e-5, 1e-5, 1e-5))
    losses = worldmodel.train(ensemble, episodes(), toy([30], seed=6), how)
    found["world model"] = [*ensemble.state_dict().values(), losses]
    policy = learner.agent.policy.requires_grad_(False)
    real = stack.of_trajectories(episodes())
    diffusion = synthetic.Diffusion(model, "heun", 6, 1.2, 1)
    sources = pgd.Sources(real, diffusion, ensemble, policy, 5, 0.25, [0, 7])
    rows = pgd.Row("guided", "diffusion", "explicit", 0.5), pgd.Row("calibrated", "diffusion", "annealed", "calibrated")
    for row in (*rows, pgd.Row("model", "world model")):
        made, batch = sources(row, policy, 1)
        found[f"round, {row.name}"] = [*made, *(getattr(batch, name) for name in pgd.FACTS)]
    return found


def summed_up(tensors):
    """A digest of all bits, and a few moments."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors]).nan_to_num()
    digest = artifacts.digest({str(i): t for i, t in enumerate(tensors)})[:16]
    return dict(digest=digest, moments=[float(v) for v in (flat.mean(), flat.std(), flat.abs().mean())])


@pytest.fixture(scope="module")
def made():
    return {name: summed_up(tensors) for name, tensors in make().items()}


@pytest.mark.parametrize("name", json.loads(FILE.read_text())["values"] if FILE.exists() else [])
def test_is_what_it_was(made, name):
    golden = json.loads(FILE.read_text())
    assert np.allclose(made[name]["moments"], golden["values"][name]["moments"], rtol=0.02, atol=1e-4)
    if machine() == golden["machine"]:
        assert made[name]["digest"] == golden["values"][name]["digest"]


def test_nothing_is_missing(made):
    assert made.keys() == json.loads(FILE.read_text())["values"].keys()


if __name__ == "__main__":
    found = dict(machine=machine(), values={name: summed_up(tensors) for name, tensors in make().items()})
    FILE.write_text(json.dumps(found, indent=1) + "\n")
