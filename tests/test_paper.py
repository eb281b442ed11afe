"""What only the paper's script has: its networks, batch normalisation, Ornstein-Uhlenbeck noise, and pixels.

The networks by hand, and whole updates against stable-baselines3, are in test_algorithm.py.
"""

import copy
import io
import math
import random

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import stubs
import torch
from conftest import (
    CPU,
    HALF_RANGE,
    HIGH,
    LOW,
    ROOT,
    agent,
    command,
    eval_rows,
    model,
    networks,
    process,
    random_batch,
    scalars,
)
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise

import ddpg_paper_faithful as paper

PIXELS = (9, 64, 64)


def networks_for(obs_shape, actions=6):
    """Actor and critic, without batch normalisation, for observations of that shape and so many actions."""
    obs = gym.spaces.Box(0, 255, obs_shape, np.uint8)
    made = paper.DDPG(paper.Args(batch_norm="none"), obs, gym.spaces.Box(-1, 1, (actions,)), CPU)
    return made.actor, made.qf


# Networks


def shapes(network):
    return [tuple(p.shape) for p in network.parameters()][::2]


@pytest.mark.parametrize("obs_shape, papers", [((17,), 130_000), (PIXELS, 430_000)])
def test_layers_where_the_action_enters_and_about_as_many_parameters_as_the_paper(obs_shape, papers):
    actor, qf = networks_for(obs_shape)
    if obs_shape == PIXELS:
        common = [(32, 9, 3, 3), (32, 32, 3, 3), (32, 32, 3, 3), (200, 2048)]
        assert shapes(actor) == [*common, (200, 200), (6, 200)] and shapes(qf) == [*common, (200, 206), (1, 200)]
    else:
        assert shapes(actor) == [(400, 17), (300, 400), (6, 300)]
        assert shapes(qf) == [(400, 17), (300, 400 + 6), (1, 300)]
    for network in actor, qf:
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(papers, rel=0.1)


@pytest.mark.parametrize("obs_shape, output_bound", [((17,), 3e-3), (PIXELS, 3e-4)])
def test_initial_weights(obs_shape, output_bound):
    """Uniform: within the bound, and near it; the fan-in of the layer that the action enters counts both."""
    for network in networks_for(obs_shape):
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        for layer in layers:
            inputs = layer.in_channels * 9 if isinstance(layer, torch.nn.Conv2d) else layer.in_features
            bound = output_bound if layer is layers[-1] else 1 / inputs**0.5
            assert 0.97 * bound < layer.weight.abs().max() <= bound
            assert layer.bias.abs().max() <= bound
            assert len(layer.bias) < 30 or layer.bias.abs().max() > 0.85 * bound
            if layer.weight.numel() > 1000:  # a uniform distribution's standard deviation
                assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize("name, bound", [("xavier", (6 / (400 + 300)) ** 0.5), ("kaiming", (6 / 400) ** 0.5)])
def test_other_initial_weights(name, bound):
    actor, _ = networks(paper, weights_init=name)
    assert 0.97 * bound < actor.fc2.weight.abs().max() <= bound and not actor.fc2.bias.any()
    assert actor.fc_mu.weight.abs().max() <= 3e-3


# Batch normalisation


@pytest.mark.parametrize("flags, mean, var", [({}, 0.002, 1.001), (dict(batch_norm_momentum=0.3), 0.6, 1.3)])
def test_running_averages_by_hand(flags, mean, var):
    """Observations 1 and 3: mean 2, variance 2 (of a sample). A thousandth of the way from (0, 1) is (0.002, 1.001)."""
    learner = agent(paper, batch_norm="both", **flags)
    obs = torch.tensor([[1.0] * 3, [3.0] * 3])
    learner.update(paper.Batch(obs, torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 3), torch.zeros(2)), False)
    torch.testing.assert_close(learner.qf.input.running_mean, torch.tensor([mean] * 3))
    torch.testing.assert_close(learner.qf.input.running_var, torch.tensor([var] * 3))


def test_acting_depends_on_no_batch():
    """Acting and evaluating use running averages, before an update and after, and leave them and the modes alone."""
    learner, obs, batch = agent(paper, 2, batch_norm="both"), torch.randn(8, 2), random_batch(paper, obs_dim=2)
    networks = learner.actor, learner.qf, learner.target_actor, learner.target_qf
    for _ in range(2):
        before = copy.deepcopy([network.state_dict() for network in networks])
        learner.act(obs[0].numpy())
        learner.diagnostics(batch)
        *_, values = paper.evaluate(learner, [paper.make_env(paper.Args(env_id="stubs:Point-v0")) for _ in range(3)])
        for network, saved in zip(networks, before, strict=True):
            assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
        assert [network.training for network in networks] == [False, True, True, True]
        alone = torch.cat([learner.actor(row[None]) for row in obs])
        torch.testing.assert_close(learner.actor(obs), alone)
        starts = [torch.from_numpy(stubs.Point().reset(seed=20_000 + i)[0][None]) for i in range(3)]
        judge = copy.deepcopy(learner.qf).eval()
        by_hand = [judge(start, learner.actor(start)).item() for start in starts]
        np.testing.assert_allclose(values, by_hand, rtol=1e-5)
        learner.update(batch)


# Ornstein-Uhlenbeck noise


@pytest.mark.parametrize("dt", [1.0, 0.01])
def test_ou_noise_equals_stable_baselines3s(script, dt, monkeypatch):
    """Fed with the same normal numbers, over an episode's end too."""
    flags = dict(ou_sigma=0.2) if script is paper else dict(noise="ou", exploration_noise=0.2)
    ours = agent(script, 3, LOW, HIGH, ou_theta=0.3, ou_dt=dt, **flags).noise
    theirs = OrnsteinUhlenbeckActionNoise(np.zeros(2), 0.2 * HALF_RANGE, 0.3, dt)
    for step, numbers in enumerate(np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)):
        monkeypatch.setattr(torch, "randn_like", lambda x, numbers=numbers: torch.from_numpy(numbers))
        monkeypatch.setattr(np.random, "normal", lambda size, numbers=numbers: numbers)
        np.testing.assert_allclose(ours.sample(), theirs(), atol=1e-6)
        if step == 20:
            ours.reset(), theirs.reset()


# Pixels


def scripted(size=64):
    return paper.PixelObservation(stubs.Scripted("rgb_array", size))


def read(obs):
    """(episode, step) of each of the three frames, read from the picture's red and green."""
    assert obs.shape == PIXELS and obs.dtype == np.uint8
    frames = obs.reshape(3, 3, 64, 64)
    assert (frames[:, :2] == frames[:, :2, :1, :1]).all()
    blue = frames[:, 2]
    assert (blue[:, :32, :16] == 200).all() and blue.sum() == 3 * 200 * 32 * 16  # rows and columns in place
    return [tuple(frame[:2, 0, 0].tolist()) for frame in frames]


@pytest.mark.parametrize("size", [64, 256])
def test_frames_repeat_and_episode_ends(size):
    """ENDINGS: 3 steps, truncated; 2, terminated; 4, both; 1, terminated."""
    env, action = scripted(size), np.zeros(2, np.float32)

    def step():
        obs, *rest = env.step(action)
        return [read(obs), *rest[:3]]

    assert read(env.reset()[0]) == [(0, 0)] * 3
    assert step() == [[(0, 1), (0, 2), (0, 3)], 0 + 1 + 2, False, True]
    assert read(env.reset()[0]) == [(1, 0)] * 3
    assert step() == [[(1, 1), (1, 2), (1, 2)], 10 + 11, True, False]
    assert read(env.reset()[0]) == [(2, 0)] * 3
    assert step() == [[(2, 1), (2, 2), (2, 3)], 20 + 21 + 22, False, False]
    assert step() == [[(2, 4), (2, 4), (2, 4)], 23, True, True]
    assert read(env.reset()[0]) == [(3, 0)] * 3
    assert step() == [[(3, 1)] * 3, 30, True, False]
    assert len(env.unwrapped.actions) == 3 + 2 + 4 + 1


def test_an_environment_that_changes_its_action_gets_the_same_one_three_times():
    env = stubs.InPlace("rgb_array")
    env = paper.PixelObservation(gym.wrappers.TransformAction(env, np.copy, env.action_space))
    env.reset()
    env.step(np.float32([0.1, 0.2]))
    assert [taken.tolist() for taken in env.unwrapped.actions] == [np.float32([0.1, 0.2]).tolist()] * 3


def test_pixel_networks_scale_frames_to_0_1():
    actor, _ = networks_for(PIXELS)
    seen, frames = [], torch.randint(0, 256, (4, *PIXELS), dtype=torch.uint8)
    actor.input[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    actor(frames)
    torch.testing.assert_close(seen[0], frames.float() / 255)


@pytest.mark.parametrize("capacity", [1, 8, 99])
def test_pixel_replay_buffer_against_a_list(capacity):
    """Random episodes, round the ring more than twice, beside a list of all observations and one of all transitions.

    With `capacity` + 1 places, a hundredth of which (1 or 2) is given up at once; resumed now and then, also in the
    middle of an episode, where the observation takes another place.
    """
    rng, places = random.Random(capacity), capacity + 1
    hundredth = {1: 1, 8: 1, 99: 2}[capacity]
    buffer, placed, transitions, from_place = paper.PixelReplayBuffer(capacity, (1, 2, 2), 2, CPU), [], [], 0
    assert buffer.frames.dtype == torch.uint8 and len(buffer.frames) == places

    def frames():
        return np.array([rng.randrange(256) for _ in range(4)], np.uint8).reshape(1, 2, 2)

    while len(placed) < 2.5 * places + 20:
        obs, shared, length = frames(), False, rng.choice([1, 2, 3, 20])
        for t in range(length):
            action, reward, next_obs = np.float32([rng.random(), rng.random()]), rng.randrange(100), frames()
            discount = 0.5 if t < length - 1 else rng.choice([0, 0.5])  # terminated, truncated
            buffer.add(obs, action, reward, next_obs, discount)
            for each in [next_obs] if shared else [obs, next_obs]:
                if len(placed) % places % hundredth == 0:  # the place here and up to the next hundredth's
                    given_up = min(hundredth, places - len(placed) % places)
                    from_place = len(placed) - places + given_up
                placed.append(each.flatten().tolist())
            transitions.append([len(placed) - 2, *action.tolist(), reward, discount])
            obs, shared = next_obs, True
            if rng.random() < 0.1 or (t == length - 1 and rng.random() < 0.3):
                file = io.BytesIO()
                torch.save(buffer.state_dict(), file)
                file.seek(0)
                state, buffer = torch.load(file), paper.PixelReplayBuffer(capacity, (1, 2, 2), 2, CPU)
                assert len(state["frames"]) == min(len(placed), places)  # only what is filled
                buffer.frames.random_()
                buffer.load_state_dict(state)
                shared = False
            held = [[*placed[i], *rest, *placed[i + 1]] for i, *rest in transitions if i >= from_place]
            assert 1 <= len(held) <= capacity and buffer.size == len(held)
            torch.manual_seed(len(placed))
            drawn = (torch.rand(20, dtype=torch.float64) * len(held)).long()  # uniform, and in the order they came
            torch.manual_seed(len(placed))
            batch = buffer.sample(20)
            columns = batch.action, batch.reward[:, None], batch.discount[:, None], batch.next_obs.flatten(1)
            assert torch.cat([batch.obs.flatten(1), *columns], 1).tolist() == [held[i] for i in drawn]


def test_a_run_from_pixels(run, made, monkeypatch):
    """What lies in the buffer, beside an environment stepped by hand; and the model says how to rebuild it."""
    buffers = made(paper, "PixelReplayBuffer")
    monkeypatch.setattr(stubs.Scripted, "made", [])
    flags = dict(env_id="stubs:Scripted-v0", total_timesteps=40, learning_starts=20, batch_size=4, eval_interval=20)
    run_dir = run(paper, pixels=True, **flags)
    (buffer,), trained_on, env = buffers, stubs.Scripted.made[0], scripted()
    env.reset()  # make_env tries the rendering: the first episode is never played
    frames, next_obs, over = buffer.frames.numpy(), None, True
    for place, *action, reward, next_place, discount in buffer.rows[:40].tolist():
        obs = env.reset()[0] if over else next_obs
        next_obs, expected_reward, terminated, truncated, _ = env.step(np.float32(action))
        assert (frames[int(place)] == obs).all() and (frames[int(next_place)] == next_obs).all()
        assert (reward, discount) == (expected_reward, 0 if terminated else np.float32(0.99))
        over = terminated or truncated
    assert np.array_equal(env.unwrapped.actions, trained_on.actions)  # three times each
    resets = len(trained_on.seeds) - 1
    assert buffer.added == 40 and buffer.placed == 40 + resets  # each observation once
    assert [row["global_step"] for row in eval_rows(run_dir)] == [20, 40]
    assert np.isfinite([value for _, value in scalars(run_dir)["losses/qf1_loss"]]).all()

    saved = model(run_dir)
    space = gym.spaces.Box(saved["actor"]["action_low"].numpy(), saved["actor"]["action_high"].numpy())
    rebuilt = paper.DDPG(paper.Args(**saved["args"]), gym.spaces.Box(0, 255, saved["obs_shape"]), space, CPU)
    rebuilt.actor.load_state_dict(saved["actor"]), rebuilt.qf.load_state_dict(saved["qf"])


def test_every_environment_of_a_run_has_the_same_camera():
    """Where MuJoCo's looks is settled by where things are when the first picture is taken."""
    try:
        one, other = (paper.make_env(paper.Args(env_id="InvertedPendulum-v5", pixels=True)) for _ in range(2))
    except SystemExit:
        pytest.skip("MuJoCo cannot render here")
    picture = one.reset(seed=3)[0]
    assert picture.std() > 5 and (picture == other.reset(seed=3)[0]).all()


def test_without_gl_is_one_line_with_the_remedy(tmp_path):
    line = command(paper, env_id="InvertedPendulum-v5", pixels=True)
    failed = process(line, tmp_path, MUJOCO_GL="glfw", DISPLAY=":99")
    assert failed.returncode == 2 and not list(tmp_path.iterdir())
    assert failed.stderr.startswith("error: cannot make InvertedPendulum-v5") and failed.stderr.count("\n") == 1
    assert "MUJOCO_GL=egl, and apt-get install libegl1" in failed.stderr


# Its docstring


def final_return(name, up_to=math.inf):
    """The mean over three seeds of the last ten evaluations, up to that step."""
    evaluations = [pd.read_csv(path) for path in ROOT.glob(f"benchmark/results/{name}__[123]/eval.csv")]
    return np.mean([rows[rows["global_step"] <= up_to]["mean"].tail(10).mean() for rows in evaluations])


def test_the_docstrings_figures_are_those_of_the_committed_data():
    cheetah = "paper/HalfCheetah-v5__ddpg_paper_faithful"
    inverted = "InvertedPendulum-v5__ddpg_paper_faithful__batch-norm-actor"
    slow, fast = final_return(cheetah), final_return(f"{cheetah}__batch-norm-momentum-0.1")
    here = final_return(f"paper/{inverted}", up_to=100_000)
    slower_noise = final_return(f"paper_100k/{inverted}_ou-dt-0.01")
    few_steps = final_return(f"paper_100k/{inverted}_learning-starts-64")
    for figures in (
        f"HalfCheetah-v5 {slow:,.0f}; with torch's 0.1, {fast:,.0f}",
        f"InvertedPendulum-v5 {here:,.0f}; with 0.01, {slower_noise:,.0f}: level",
        f"not tuned: {here:,.0f} there; with 64 steps, {few_steps:,.0f}",
    ):
        assert figures in paper.__doc__, figures
