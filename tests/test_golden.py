"""Golden values: what the method computes stays what it was, through every change of the code around it.

Each item is a set of tensors, small and quick to make. On a machine like the one that wrote `golden.json` (the same torch,
the same instruction set, one thread) the digests of all bits are equal; elsewhere rounding differs, and the moments are close.
`ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python tests/test_golden.py` writes the file anew, with instructions whose rounding lies
between that of matrix tiles and that of float32: do so only in a commit that says why.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # to be run as a program
from conftest import toy

from pgdlib import data, dynamics, edm, fast, guidance, measures, pgd, sampler, synthetic, worldmodel
from pgdlib.agents import stack
from pgdlib.agents.bc import BC
from pgdlib.agents.iql import IQL
from pgdlib.agents.td3_bc import TD3BC
from pgdlib.lab import artifacts
from pgdlib.policies import GaussianPolicy
from pgdlib.simulators import pen

FILE = Path(__file__).with_name("golden.json")


def machine():
    """What decides rounding."""
    version, low = torch.__version__.partition("+")[0], fast.has_bfloat16("cpu")
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", f"tiles {torch.cpu._is_amx_tile_supported()}")  # these add in another order
    return f"torch {version}, {torch.backends.cpu.get_cpu_capability()}, bf16 {low}, {most}"


def episodes():
    return toy([40, 25, 60, 33], seed=5)


def denoiser():
    """60 training steps of a small denoiser: (its EMA, the losses)."""
    torch.manual_seed(0)
    trajectories = episodes()
    model = edm.Denoiser(45, 24, 16, 16, 2)
    model.normaliser.fit(trajectories.packed())
    windows = data.Windows(trajectories, model.normaliser, 16)
    training = edm.Training(model, windows, edm.Recipe(60, 16, 1e-3, seed=3))
    assert list(training)[-1] == 60
    return training.ema, training.losses


def make():
    """Name -> tensors of everything that is golden."""
    torch.set_num_threads(1)
    model, losses = denoiser()
    tensors, card = artifacts.load(artifacts.PACKAGE / "assets" / "ppo_pen.safetensors")
    guide = GaussianPolicy(**card["config"]).requires_grad_(False)
    guide.load_state_dict(tensors)
    noise = fast.stream("cpu", "drawing", 2)
    found = {"denoiser": [*model.state_dict().values(), losses]}
    model.eval().requires_grad_(False)
    for rule in guidance.RULES:
        lam = 5.0 if rule.startswith("normalised") else 0.3
        aim = guidance.Guide(rule, guide, model.normaliser, lam, 8, 2)
        found[f"guided, {rule}"] = list(sampler.draw(model, (6, 16, 71), 8, 1.6, noise, aim))
    found["multistep"] = list(sampler.draw(model, (6, 16, 71), 8, 0.0, noise, solver="multistep"))
    transitions = episodes().transitions()
    mean, std = transitions[:, :45].mean(0), transitions[:, :45].std(0)
    for name, kind in (("IQL", IQL), ("TD3+BC", TD3BC), ("BC", BC)):
        learner = stack.Learner(kind(episodes().spec, [0, 7], mean, std, (32, 32)), [0, 7], 40, 32, 1e-3)
        assert list(learner.train([transitions] * 2, 20))[-1] == 20
        found[f"agent, {name}"] = list(learner.agent.state_dict().values())
    x = model.normaliser.denormalise(torch.randn(4, 16, 71, generator=torch.Generator().manual_seed(1)) * 0.3)
    obs, actions, alive = x[..., :45], x[..., 45:69], measures.alive(x[..., 70])
    found["judge"] = [measures.log_likelihood(guide, obs, actions, alive), measures.mean_density(guide, obs, actions, alive)]
    for estimator in dynamics.ESTIMATORS:
        judged = obs.numpy(), actions.numpy(), episodes().variance, estimator, alive.numpy()
        found["judge"].append(torch.from_numpy(np.nan_to_num(dynamics.dynamics_error(pen.PEN, *judged).squared)))
    torch.manual_seed(1)
    ensemble = worldmodel.Ensemble(45, 24, 3, 2, (32, 32))
    recipe = worldmodel.Recipe(20, 32, seed=2, weight_decay=(1e-5, 1e-5, 1e-5))
    training = worldmodel.Training(ensemble, episodes(), toy([30], seed=6), recipe)
    assert list(training)[-1] == 20
    found["world model"] = [*ensemble.state_dict().values(), training.losses]
    policy = learner.agent.policy.requires_grad_(False)
    diffusion = synthetic.Diffusion(model, "heun", 6, 1.2, 1)
    sources = pgd.Sources(transitions, diffusion, ensemble, policy, 5, 0.25, [0, 7], pen.PEN)
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
