"""Dynamics error of a step: floors on real data, errors of a known size, ends, the simulator's reach."""

import functools

import numpy as np
import pytest
from conftest import pairs
from gymnasium_robotics.envs.adroit_hand import AdroitHandPenEnv

from pgdlib import dynamics
from pgdlib.dynamics import DynamicsError
from pgdlib.simulators import pen
from pgdlib.simulators.pen_states import perturb

dynamics_error, predict = (functools.partial(f, pen.PEN) for f in (dynamics.dynamics_error, dynamics.predict))

ONES = np.ones(45)
MOVING = np.r_[0:36, 39:42]  # what a step of the simulator gives, whatever the target


def ordered(obs, actions):
    """The mean errors on real data, from the best estimator to the worst."""
    errors = [dynamics_error(obs, actions, ONES, e) for e in dynamics.ESTIMATORS]
    assert all(np.isfinite(e.plain).all() and e.plain.shape == (len(obs),) for e in errors)
    ours, theirs, nothing = (e.plain.mean() for e in errors)
    assert ours <= 1e-3 and ours < nothing / 20 and nothing < theirs
    assert errors[0].by_step()[0] < 1e-3  # the first step, with a one-sided difference


def test_floors_on_random_episodes(real):
    ordered(*pairs(real))


@pytest.mark.slow
def test_floors_on_the_guides_episodes(guided):
    ordered(*pairs(guided, 8, 100))


def test_still_predicts_what_is(real):
    obs, actions = pairs(real)
    np.testing.assert_array_equal(predict(obs, actions, "still"), obs[:, :-1])
    error = dynamics_error(obs, actions, ONES, "still")
    np.testing.assert_allclose(error.squared, np.diff(obs, axis=1) ** 2)


def test_appendix_b_is_gyms_step_from_a_pen_at_zero(real):
    obs, actions = pairs(real, 2, 4)
    predicted = predict(obs, actions, "appendix_b")
    env = AdroitHandPenEnv()
    for i in range(2):
        for t in range(3):
            state = {"qpos": np.r_[obs[i, t, :24], np.zeros(6)], "qvel": np.zeros(30), "desired_orien": real.goals[i]}
            env.reset(seed=0, options={"initial_state_dict": state})
            np.testing.assert_allclose(predicted[i, t, MOVING], env.step(actions[i, t])[0][MOVING], rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ["reconstructed", "appendix_b"])
def test_the_target_keeps_its_place(real, estimator):
    obs, actions = pairs(real, 3, 5)
    predicted = predict(obs, actions, estimator)
    assert predicted.shape == (3, 4, 45)
    np.testing.assert_array_equal(predicted[..., 36:39], obs[:, :-1, 36:39])
    np.testing.assert_allclose(predicted[..., 42:45], predicted[..., 33:36] - obs[:, :-1, 36:39], atol=1e-12)
    moved = obs.copy()
    moved[..., 36:39] = 0.5
    np.testing.assert_array_equal(predict(moved, actions, estimator)[..., MOVING], predicted[..., MOVING])


def test_an_error_of_known_size_is_measured_exactly(real):
    """The pen's velocity after the last step is off by δ: nothing else is predicted from it, so δ² is added there alone."""
    obs, actions = pairs(real)
    variance = np.linspace(0.5, 9, 45)
    delta = np.array([3.0, -4, 5, 10, -20, 30])
    wrong = obs.copy()
    wrong[:, -1, 27:33] += delta
    before, after = (dynamics_error(o, actions, variance) for o in (obs, wrong))
    np.testing.assert_array_equal(before.squared[:, :-1], after.squared[:, :-1])
    own = predict(obs, actions)[:, -1, 27:33] - obs[:, -1, 27:33]  # what the reconstruction is off by itself
    added = (after.squared - before.squared)[:, -1]
    np.testing.assert_allclose(added[:, 27:33], delta**2 - 2 * own * delta, atol=1e-9)
    np.testing.assert_array_equal(np.delete(added, np.r_[27:33], 1), 0)
    steps = 45 * 59
    np.testing.assert_allclose(after.plain - before.plain, (delta**2).sum() / steps, rtol=0.02)
    expected = (delta**2 / variance[27:33]).sum() / steps
    np.testing.assert_allclose(after.normalised - before.normalised, expected, rtol=0.02)


def test_means_against_loops():
    rng = np.random.default_rng(0)
    squared, variance = rng.random((5, 7, 45)), rng.random(45) + 0.1
    squared[1] = np.nan
    squared[2, 4:] = np.nan
    error = DynamicsError(squared, variance, pen.GROUPS)
    rows = {i: squared[i, : 4 if i == 2 else 7] for i in (0, 2, 3, 4)}
    for i, row in rows.items():
        assert error.plain[i] == pytest.approx(row.mean()) and error.normalised[i] == pytest.approx((row / variance).mean())
    assert np.isnan(error.plain[1]) and np.isnan(error.normalised[1])
    steps = np.concatenate(list(rows.values()))
    groups = error.by_group()
    assert groups.keys() == pen.GROUPS.keys()
    for name, s in pen.GROUPS.items():
        assert groups[name] == pytest.approx((steps / variance)[:, s].mean())
    np.testing.assert_allclose(
        error.by_step(), [np.mean([r[t] / variance for r in rows.values() if t < len(r)]) for t in range(7)]
    )
    assert error.unjudged == 1  # the one without any step; the one that ends has an error


def test_what_is_not_allowed_is_named(quiet):
    with pytest.raises(ValueError, match=r"variance\[2\]=0.0 is not allowed; it must be above zero"):
        dynamics_error(*quiet, np.where(np.arange(45) == 2, 0.0, 1.0))
    with pytest.raises(ValueError, match=r"estimator='guess'.*reconstructed, appendix_b, still"):
        dynamics_error(*quiet, ONES, "guess")
    with pytest.raises(ValueError, match=r"obs of shape \(0, 40, 45\) is not allowed"):  # no episode was long enough
        dynamics_error(*(x[:0] for x in quiet), ONES)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("estimator", dynamics.ESTIMATORS)
@pytest.mark.parametrize("garbage", ["noise", np.nan, 1e9])
def test_dead_steps_do_not_count(real, estimator, garbage):
    """Trajectories that end: whatever stands after their end, the error is that of the trajectory cut there."""
    obs, actions = pairs(real, 7, 20, first=60)
    lengths, rng = [20, 17, 9, 3, 4, 2, 1], np.random.default_rng(0)
    alive = (np.arange(20) < np.array(lengths)[:, None]).astype(float)
    for values in (obs, actions):
        noise = rng.normal(size=values.shape) * 3
        values[alive == 0] = noise[alive == 0] if garbage == "noise" else garbage
    error = dynamics_error(obs, actions, ONES, estimator, alive)
    for i, n in enumerate(lengths[:-1]):
        expected = dynamics_error(obs[i : i + 1, :n], actions[i : i + 1, :n], ONES, estimator)
        np.testing.assert_allclose(error.squared[i, : n - 1], expected.squared[0], rtol=1e-6, atol=1e-15)
        assert np.isnan(error.squared[i, n - 1 :]).all()
        assert error.plain[i] == pytest.approx(expected.plain[0])
    assert np.isnan(error.plain[6])  # one step has no successor


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("estimator", ["reconstructed", "appendix_b"])
def test_what_cannot_be_judged_is_nan_and_nothing_else(quiet, estimator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warnings in the working folder
    obs, actions = quiet
    clean = dynamics_error(obs, actions, ONES, estimator).plain
    assert np.isfinite(clean).all()
    for t, dims, value in (
        (5, slice(0, 45), np.nan),
        (5, slice(0, 45), np.inf),
        (5, slice(3, 4), 30.0),  # a joint far beyond its limits
        (0, slice(3, 4), np.nan),
        (-1, slice(29, 30), np.nan),
        (-1, slice(29, 30), np.inf),
    ):
        broken = obs.copy()
        broken[1, t, dims] = value
        error = dynamics_error(broken, actions, ONES, estimator).plain
        assert np.isnan(error[1]), (t, dims, value)
        np.testing.assert_array_equal(np.delete(error, 1), np.delete(clean, 1))
    wild = actions.copy()
    wild[1, 7, 3] = np.nan
    error = dynamics_error(obs, wild, ONES, estimator).plain
    assert np.isnan(error[1])
    np.testing.assert_array_equal(np.delete(error, 1), np.delete(clean, 1))


def test_too_fast_for_the_simulator(quiet):
    obs, actions = quiet
    obs = obs.copy()
    obs[2, 6, 32] = 301.0  # the pen's spin
    assert np.isnan(dynamics_error(obs, actions, ONES).plain).tolist() == [False, False, True, False]
    assert np.isfinite(dynamics_error(obs, actions, ONES, "appendix_b").plain).all()  # it does not look at velocities


@pytest.mark.parametrize("estimator", ["reconstructed", "appendix_b"])
def test_chunks_and_threads_change_nothing(real, estimator, monkeypatch):
    obs, actions = pairs(real, 3, 11)
    whole = predict(obs, actions, estimator, threads=1)
    np.testing.assert_array_equal(predict(obs, actions, estimator, threads=3), whole)
    monkeypatch.setattr(dynamics, "advance", functools.partial(dynamics.advance, chunk=7))
    np.testing.assert_array_equal(predict(obs, actions, estimator), whole)


def test_injected_noise_has_its_size_and_leaves_an_observation(real):
    obs, variance, size = real.obs, real.obs.var((0, 1)), 0.05
    kept = obs.copy()
    noisy, again, other = (perturb(obs, size, np.random.default_rng(s), variance) for s in (0, 0, 1))
    np.testing.assert_array_equal(obs, kept)
    np.testing.assert_array_equal(noisy, again)
    assert (noisy != other)[..., :36].all()
    np.testing.assert_array_equal(perturb(obs, 0.0, np.random.default_rng(0), variance), obs)
    noise = noisy - obs
    np.testing.assert_allclose(noise[..., :33].std((0, 1)), size * np.sqrt(variance[:33]), rtol=0.05)  # 3216 draws
    np.testing.assert_allclose(np.corrcoef(noise[..., :33].reshape(-1, 33).T), np.eye(33), atol=0.1)
    assert (noise[..., 33:36] != 0).any((0, 1)).all()
    np.testing.assert_array_equal(noise[..., 36:39], 0)
    np.testing.assert_allclose(np.linalg.norm(noisy[..., 33:36], axis=-1), 1, atol=1e-9)
    np.testing.assert_allclose(noisy[..., 42:45], noisy[..., 33:36] - noisy[..., 36:39], atol=1e-9)
    np.testing.assert_allclose(noisy[..., 39:42] - obs[..., 39:42], noise[..., 24:27], atol=1e-9)


def test_appendix_b_does_not_see_what_reconstruction_sees(guided):
    """Noise of a hundredth of the data's spread: four times the floor or more for one, nothing for the other."""
    obs, actions = pairs(guided, 8, 32, first=20)
    variance = obs.var((0, 1))
    noisy = perturb(obs, 0.01, np.random.default_rng(0), variance)
    rise = {
        e: np.divide(*(dynamics_error(o, actions, variance, e).normalised.mean() for o in (noisy, obs)))
        for e in ("reconstructed", "appendix_b")
    }
    assert rise["reconstructed"] > 4 and rise["appendix_b"] == pytest.approx(1, abs=0.01)
