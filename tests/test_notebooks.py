"""The notebooks through papermill, at `ci` scale: they run, they do what they are asked, they refuse what they must.

All runs are subprocesses, two at once, begun by the first test that needs one; only those that the selected tests need. Runs
with one folder of artifacts share them, and wait for one another's.
"""

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import sb3_zip
from stable_baselines3 import SAC

from pgdlib.lab import artifacts, claims, load, minari_files, tasks
from pgdlib.simulators import episodes, locomotion
from tools import promote

pytestmark = pytest.mark.notebook
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
NO_DATA = "no D4RL data here"
GUIDANCE = "notebooks/04_guidance.ipynb"
BESIDE = "where no checkout is, beside the package as a wheel holds it"

# name -> (folder of artifacts, working folder, notebook, parameters beside `scale`); GUIDES is a folder
GOOD = {
    "01": ("shared", NOTEBOOKS, "01_data.ipynb", "-p dataset human -p horizon 12"),
    "03": ("shared", ROOT, "notebooks/03_ppo_guide.ipynb", ""),
    "02": ("shared", ROOT, "notebooks/02_diffusion.ipynb", "-p dataset human -p train_steps 7 -p samples 6"),
    "04": ("shared", ROOT, GUIDANCE, "-p lam 2.0 -p dataset human -y lams:\xa0[0.5,1.0]"),
    "04 alone": ("alone", NOTEBOOKS, "04_guidance.ipynb", "-p lam 2.0"),
    "04 auto": ("auto", ROOT, GUIDANCE, "-p dataset expert -p units raw -p rule proximal -y lams:\xa0[0.1]"),
    "04 of SAC": ("zip", ROOT, GUIDANCE, "-p dataset human -p transform arctanh -p guide GUIDES/sac.zip -y lams:\xa0[0.1]"),
    "08": ("shared", ROOT, "notebooks/08_rules.ipynb", "-p dataset human -y lams:\xa0[0.5,1.0]"),
    "09": ("shared", ROOT, "notebooks/09_quality.ipynb", ""),
    "06": ("shared", NOTEBOOKS, "06_world_model.ipynb", "-p dataset human -p model_steps 40 -p long 12 -p rule smoothed"),
    "05": ("shared", NOTEBOOKS, "05_iql_benchmark.ipynb", "-p dataset human -y lams:\xa0[0,\xa02] -p seeds 2"),
    "05 all agents": (
        "shared",
        ROOT,
        "notebooks/05_iql_benchmark.ipynb",
        "-p dataset human -p seeds 2 -p real_fraction 0.0625 -p real_steps 50 -y lams:\xa0[1.0] -y conservatism:\xa0[0.5,1,2] "
        "-y agents:\xa0[td3_bc,edac,bcq] -y sources:\xa0[real,synther,pgd,mopo,morel]",
    ),
    "03 of a zip": ("zip", ROOT, "notebooks/03_ppo_guide.ipynb", "-p guide GUIDES/ppo.zip -p episodes 7"),
    "03 trained anew": ("anew", ROOT, "notebooks/03_ppo_guide.ipynb", "-p retrain True -p seed 3 -p episodes 5"),
}
# Another task, and data of an environment that nothing is known of
FILES = ["01_data", "02_diffusion", "03_ppo_guide", "04_guidance", "05_iql_benchmark", "06_world_model", "08_rules"]
MORE = {
    "04": " -y lams:\xa0[0.5,2.5]",
    "05": " -p seeds 2 -y lams:\xa0[0,1.5]",
    "06": " -p long 12",
    "08": " -y lams:\xa0[0.5,2.5]",
}
OWN = {"01": "", "02": "", "04": " -p guide GUIDES/own.safetensors", "05": "", "08": " -p guide GUIDES/own.safetensors"}
for number, file in zip((file[:2] for file in FILES), FILES):
    GOOD[f"{number} of hopper"] = ("hopper", BESIDE, f"{file}.ipynb", "-p dataset hopper-medium" + MORE.get(number, ""))
    if number in OWN:
        path = f"notebooks/{file}.ipynb"
        GOOD[f"{number} of own data"] = ("own", ROOT, path, "-p dataset my/own-v0" + MORE.get(number, "") + OWN[number])
# name -> (notebook, parameter, what the message says)
BAD = {
    "unknown": ("04_guidance", "-p lamb 2.0", "unknown parameter lamb=2.0; this notebook takes lam, rule, dataset, "),
    "negative": ("04_guidance", "-p lam -1", "parameter lam=-1 is not allowed; it must be 'auto' or a number of at least 0"),
    "solver": ("06_world_model", "-p solver euler", "parameter solver='euler' is not allowed; it must be one of 'heun', "),
    "dataset": ("01_data", "-p dataset pen", "parameter dataset='pen' is not allowed; it must be one of 'human', 'cloned', "),
    "scale": (
        "02_diffusion",
        "-p scale huge",
        "parameter scale='huge' is not allowed; it must be one of 'ci', 'quick', 'paper'",
    ),
    "agent": (
        "05_iql_benchmark",
        "-y agents:\xa0[sac]",
        "parameter agents=['sac'] is not allowed; it must be a list, not empty, of",
    ),
    "denoiser": ("05_iql_benchmark", "-p denoiser GUIDES/half.safetensors", "half.safetensors' cannot be used: "),
    "window": (
        "05_iql_benchmark",
        "-p horizon 1000",
        "horizon=1000 is not allowed for stand-in pen-human; it must be at most 400",
    ),
    "no guide": (
        "04_guidance",
        "-p guide GUIDES/none.zip",
        "none.zip' is not a file; it must be 'shipped', a .safetensors gui",
    ),
    "half a guide": ("04_guidance", "-p guide GUIDES/half.safetensors", "half.safetensors' cannot be used: "),
    "other guide": ("03_ppo_guide", "-p guide GUIDES/walker.zip", "17 observations and 6 actions; needed are 45 and 24"),
}


@dataclass
class Run:
    """A finished run."""

    code: int
    stderr: str
    output: Path  # the executed notebook
    artifacts: Path  # its PGD_RUNS

    @property
    def cells(self):
        return [c for c in nbformat.read(self.output, as_version=4).cells if c.cell_type == "code"]

    @property
    def text(self):
        """All that the notebook printed, or showed as HTML."""
        outputs = [o for cell in self.cells for o in cell.outputs]
        return "\n".join(o.get("text", "") + o.get("data", {}).get("text/html", "") for o in outputs)

    def table(self, name):
        """The table beside a figure."""
        assert (self.artifacts / "figures/ci" / f"{name}.png").read_bytes()[1:4] == b"PNG"
        return pd.read_csv(self.artifacts / "figures/ci" / f"{name}.csv")

    def files(self, pattern="*"):
        """What lies in the folder of artifacts, but for lock files."""
        return [f for f in self.artifacts.rglob(pattern) if f.is_file() and f.suffix not in (".lock", ".used")]


def papermill(folder, notebook, output, artifacts, parameters, **more):
    """Run `papermill notebook output ...` as a user would, in the working folder `folder`, with `more` in the environment."""
    env = {
        "PGD_RUNS": artifacts,
        "MINARI_DATASETS_PATH": artifacts / NO_DATA,
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [Path(sys.executable).with_name("papermill"), notebook, output, "-k", "python3", *parameters]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {k: str(v) for k, v in {**env, **more}.items()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Run(done.returncode, done.stderr, output, artifacts)


@pytest.fixture(scope="module")
def started(request, tmp_path_factory, beside_wheel):
    """name -> the future of its `Run`, for all names that selected tests have."""
    base = tmp_path_factory.mktemp("notebooks")
    sb3_zip(base / "ppo.zip")
    sb3_zip(base / "sac.zip", algorithm=SAC, buffer_size=1, policy_kwargs=dict(net_arch=[32]))
    sb3_zip(base / "walker.zip", 17, 6)
    whole = load.SHIPPED_GUIDE.read_bytes()
    (base / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    shutil.copy(tasks.by_name("hopper").guide, base / "own.safetensors")
    rng = np.random.default_rng(0)
    played = episodes.rollout(locomotion.runner("hopper"), lambda obs: rng.uniform(-1, 1, (len(obs), 3)), 300, rng, 60)
    minari_files.write_minari(base / "own" / NO_DATA, "my/own-v0", [played], "of nothing that is known", whole=False)
    wanted = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}
    mine, site = beside_wheel
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = {}
        for name in [n for n in [*GOOD, *BAD] if n in wanted]:
            if name in GOOD:
                artifacts, folder, notebook, parameters = GOOD[name]
                parameters = f"-p scale ci {parameters}"
            else:
                artifacts, folder, (notebook, parameters, _) = name, ROOT, BAD[name]
                notebook = f"notebooks/{notebook}.ipynb"
            given = [p.replace("GUIDES", str(base)).replace("\xa0", " ") for p in parameters.split(" ") if p]
            folder, more = (mine, {"PYTHONPATH": site}) if folder == BESIDE else (folder, {})
            futures[name] = pool.submit(papermill, folder, notebook, base / f"{name}.ipynb", base / artifacts, given, **more)
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture
def run(started, name):
    return started[name].result()


def named(*names):
    return pytest.mark.parametrize("name", names)


@named(*GOOD)
def test_it_runs(started, name):
    run = started[name].result()
    assert run.code == 0, run.stderr[-3000:]
    assert all(c.execution_count for c in run.cells if c.source)


@named(*GOOD)
def test_nothing_half_made_is_left(started, name):
    run = started[name].result()
    for other in started.keys() & GOOD.keys():
        if GOOD[other][0] == GOOD[name][0]:  # at work in the same folder
            started[other].result()
    assert not [f for f in run.artifacts.rglob("*") if "partial" in f.name or "damaged" in f.name]
    assert not run.files("checkpoints/*")


def verdicts(run, slug):
    """The claims that the run has recorded, id -> row."""
    return claims.load(run.artifacts / f"results/ci/claims_standin-{slug}.json")


@named("01")
def test_01_tells_of_the_dataset_it_was_given(run):
    assert "stand-in pen-human" in run.text and "(5000, 45)" in run.text
    assert len(run.table("01_returns_standin-human")) == 25
    floors = run.table("01_floors_standin-human").set_index("group").loc["pen angular velocity"]
    assert 10 * floors["reconstructed"] < floors["still"] < floors["appendix_b"]
    assert "(256, 12, 71)" in run.text  # a batch of windows
    noticed = run.table("01_sensitivity_standin-human").set_index("size")
    rise = noticed.loc[0.01:0.02].iloc[0] / noticed.iloc[0]
    assert rise["state reconstructed"] > 3 and rise["Appendix B"] < 1.01


@named("02")
def test_02_trains_and_draws_as_asked(run):
    assert 7 in [artifacts.load(file)[1]["recipe"]["steps"] for file in run.files("denoisers/human-standin-*")]
    assert "7 training steps" in run.text and "6 trajectories" in run.text
    assert len(run.table("02_training_standin-human")) == 10
    lines = {"generated", "still (generated)", "short training", "still (real data)", "floor (real data)"}
    assert set(run.table("02_dynamics_standin-human")) == {"group", *lines}
    samplers = run.table("02_samplers_standin-human")
    assert samplers["evaluations"].tolist() == [15, 15, 8, 4] and samplers["error.mean"].notna().any()
    assert "C8" in verdicts(run, "human")


@named("01 of hopper")
def test_a_runners_ruler_is_exact(run):
    floors = run.table("01_floors_standin-hopper-medium")
    assert floors["reconstructed"].max() < 1e-10 < 1e-4 < floors["still"].max()


@named("04 of hopper")
def test_the_claims_are_judged_of_a_runner(run):
    assert {id.split()[0] for id in verdicts(run, "hopper-medium")} >= {"C1", "C2", "C3", "C5", "C7", "C9"}


@named("04 of own data")
def test_without_a_simulator_the_distance_to_the_data_stands_in_for_errors(run):
    assert "no simulator is known for an unnamed environment" in run.text
    figure = run.table("04_figure1_my-own-v0")
    assert figure["distance.mean"].notna().all() and "normalised.mean" not in figure


@named("03")
def test_03_shows_the_shipped_guide(run):
    _, card = load.load_guide()
    assert len(run.table("03_learning_curve_pen")) == len(card["curve"])
    returns = run.table("03_returns_pen")
    assert len(returns) == 20 and returns["guide, mean action"].mean() > 3000 > 500 > returns["random actions"].mean()


@named("03 of a zip")
def test_03_takes_a_stable_baselines3_zip(run):
    returns = run.table("03_returns_pen")
    assert len(returns) == 7 and returns["guide, mean action"].mean() < 1000  # an untrained one
    assert "ppo.zip" in run.text and "returns over 7 episodes" in run.text


@named("04 of SAC")
def test_04_is_guided_by_a_squashed_gaussian(run):
    """Natural units and the calibrated λ, too, though it is no Gaussian."""
    assert "SquashedGaussian" not in run.text and "no VecNormalize is saved beside it" in run.text
    for name in ("04_figure1", "04_figure1_annealed"):
        likelihood = run.table(f"{name}_standin-human").set_index("lam")["log_likelihood.mean"]
        assert likelihood.loc[0.1] > likelihood.loc[0.0] + 0.05


@named("03 trained anew")
def test_03_trains_anew(run):
    assert len(run.files("guides/*.safetensors")) == 1
    steps = run.table("03_learning_curve_pen")["steps"].tolist()
    assert steps[0] == 0 and steps[-1] >= 2_048 and len(run.table("03_returns_pen")) == 5


@named("04", "04 alone")
def test_04_sweeps_the_lams_it_was_given(run, name):
    own = promote.parameters(promote.read(NOTEBOOKS / "04_guidance.ipynb"))["lams"]
    slug, lams = {"04": ("human", [0.5, 1, 2]), "04 alone": ("cloned", [2, *own])}[name]
    sweep = run.table(f"04_figure1_standin-{slug}").set_index("lam")
    assert f"stand-in pen-{slug}" in run.text
    assert sweep.index.tolist() == sorted({0, *lams})
    likelihood = sweep["log_likelihood.mean"]
    assert likelihood[1] > likelihood[0] and (sweep.loc[:1.5, "diverged"] == 0).all()
    assert np.isfinite(likelihood).all() and (likelihood.loc[2:] < likelihood[1]).all()


@named("04", "04 alone", "04 auto")
def test_04_gives_a_verdict_on_every_claim_it_tests(run, name):
    slug = {"04 alone": "cloned", "04 auto": "expert"}.get(name, "human")
    found = verdicts(run, slug)
    assert {"C1", "C3", "C5", "C7", "C9"} <= set(found) and sum(id.startswith("C2") for id in found) >= 3
    assert all(row["verdict"] in claims.VERDICTS and row["scale"] == "ci" for row in found.values())
    for text in claims.CLAIMS.values():
        assert text in run.text, text


@named("04 auto")
def test_04_calibrates_its_own_rule_too(run):
    beside = run.table("04_figure1_proximal_standin-expert")
    assert len(beside) > 3 and (beside["diverged"] == 0).all()


@named("08")
def test_08_compares_the_rules_and_measures_the_threshold(run):
    fronts = run.table("08_fronts_standin-human")
    assert fronts.groupby("rule").size().min() >= 3 and len(fronts.groupby("rule")) == 8
    assert (fronts[fronts["rule"].isin(["proximal", "smoothed", "annealed"])]["diverged"] == 0).all()
    thresholds = run.table("08_threshold_standin-human")
    assert set(thresholds["units"]) == {"natural", "raw"} and len(thresholds) == 32


@named("09")
def test_09_fits_a_line_to_each_claim(run):
    effects = run.table("09_quality").query("denoiser == 'train' and churn > 0 and data_steps == data_steps.max()")
    trends = json.loads((run.artifacts / "results/ci/trends_standin-cloned.json").read_text())
    for name, words in trends.items():
        own = effects[effects["id"] == name]
        assert words.startswith(f"{np.polyfit(-np.log2(own['error']), own['effect'], 1)[0]:+.2g} ["), name
    assert len(trends) >= 6 and "C3" not in trends  # which is the same with every model


@named("06")
def test_06_compares_both_models(run):
    horizon = run.table("06_horizon_standin-human").set_index("k")
    assert horizon.index.tolist() == list(range(1, 11))  # 12 steps, from the second to the last
    assert horizon["simulator.mean"][1] < 0.01 < horizon["still (simulator's rollouts).mean"][1]
    assert verdicts(run, "human")["C6"]["verdict"] in claims.VERDICTS
    assert 40 in [artifacts.load(file)[1]["recipe"]["steps"] for file in run.files("worldmodels/human-standin-*")]


@named("05")
def test_05_fills_table_1(run):
    table = run.table("05_table1_iql_standin-human_2seeds")
    guided = ["explicit rule, λ = 2", "annealed rule, calibrated λ"]
    rows = ["behaviour cloning", *(f"IQL, {r}" for r in ["real data", "unguided (λ = 0)", *guided, "world model"])]
    assert table["row"].drop_duplicates().tolist() == rows and (table.groupby("row").size() == 2).all()
    assert table["d4rl_return"].notna().all()
    kept = pd.read_csv(run.artifacts / "results/ci/table1_iql_standin-human_2seeds.csv")
    pd.testing.assert_frame_equal(kept, table)
    assert all(name in run.text for name in rows) and "2,448 ± 130" in run.text
    curves = run.table("05_curves_iql_standin-human_2seeds")
    assert curves["step"].tolist() == [0, 20, 40] and curves.shape == (3, 1 + 2 * len(rows))
    found = verdicts(run, "human")
    assert found["C4 explicit rule, λ = 2"]["verdict"] in claims.VERDICTS
    assert found["C2 IQL as the guide, annealed rule"]["verdict"] in claims.VERDICTS
    assert len(run.files("agents/iql-ci-*")) == 1


@named("05 all agents")
def test_05_takes_other_agents_and_other_data(run):
    table = run.table("05_table1_td3_bc_standin-human_2seeds")
    rows = set(table["row"])
    guided, *others = "explicit rule, λ = 1", "SynthER", "MOPO", "MOReL"
    for agent in ("TD3+BC", "EDAC", "BCQ"):
        assert {f"{agent}, {data}" for data in ("real data", *others)} <= rows
        assert (f"{agent}, {guided}" in rows) == (agent != "BCQ"), "what has no density guides nothing"
    assert "TD3+BC, real data, 50 steps" in rows and not any("unguided" in row for row in rows)
    found = verdicts(run, "human")["C10"]
    assert "TD3+BC, EDAC" in found["measure"] and found["verdict"] in claims.VERDICTS


@named("04")
def test_04_shows_figures_where_nobody_can_move_its_panels(run, tmp_path):
    command = [Path(sys.executable).with_name("jupyter-nbconvert"), "--to", "html", "--output-dir", tmp_path, run.output]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    (file,) = tmp_path.glob("*.html")
    page = file.read_text()
    for name in ("04-slide", "04-player", "04-film"):
        (cell,) = [c for c in run.cells if c.id == name]
        (output,) = [o for o in cell.outputs if o.output_type == "display_data"]
        assert set(output.data) == {"image/png", "text/plain"}
        (shown,) = re.findall(rf'id="cell-id={name}"(.*?)(?=id="cell-id=|</main>)', page, re.DOTALL)
        assert shown.count("<img") == 1
    assert not re.search(f'model not found|<script type="{re.escape(promote.WIDGET_VIEW)}', page, re.IGNORECASE)


@named("04 alone")
def test_04_makes_what_it_misses(run):
    folders = {f.relative_to(run.artifacts).parts[0] for f in run.files()}
    assert folders == {"minari", "data", "denoisers", "sweeps", "figures", "results"}
    assert len(run.files("denoisers/*")) == 1


@named(*BAD)
def test_bad_input_is_named_and_nothing_is_made(run, name):
    *_, message = BAD[name]
    assert run.code == 1
    assert message in run.stderr, run.stderr[-3000:]
    made = {f.relative_to(run.artifacts).parts[0] for f in run.files()}
    assert made == ({"minari", "data"} if name in ("denoiser", "window") else set())  # these two are judged by the data
