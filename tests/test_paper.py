"""What only the paper's script has: its networks, batch normalisation, Ornstein-Uhlenbeck noise, and pixels."""

import copy
import io
import math
import random
import re

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import stubs
import torch
from conftest import (
    CPU,
    ROOT,
    agent,
    command,
    eval_rows,
    model,
    networks,
    numpy,
    process,
    random_batch,
    scalars,
    weights,
)
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise

import ddpg_paper_faithful as paper

PIXELS = (9, 64, 64)


def networks_for(obs_shape, actions=6):
    """Actor and critic, without batch normalisation, for observations of that shape and so many actions."""
    obs = gym.spaces.Box(0, 255, obs_shape, np.uint8)
    made = paper.DDPG(paper.Args(batch_norm="none"), obs, gym.spaces.Box(-1, 1, (actions,)), CPU)
    return made.actor, made.qf


def parameters(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# Networks


@pytest.mark.parametrize("obs_shape, papers", [((17,), 130_000), (PIXELS, 430_000)])
def test_about_as_many_parameters_as_the_paper(obs_shape, papers):
    for network in networks_for(obs_shape):
        assert abs(parameters(network) / papers - 1) < 0.1


def test_layers_and_where_the_action_enters():
    actor, qf = networks_for((17,))
    assert [tuple(p.shape) for p in actor.parameters()][::2] == [(400, 17), (300, 400), (6, 300)]
    assert [tuple(p.shape) for p in qf.parameters()][::2] == [(400, 17), (300, 400 + 6), (1, 300)]
    actor, qf = networks_for(PIXELS)
    convolutions = [(32, 9, 3, 3), (32, 32, 3, 3), (32, 32, 3, 3)]
    assert [tuple(p.shape) for p in actor.parameters()][::2] == [*convolutions, (200, 2048), (200, 200), (6, 200)]
    assert [tuple(p.shape) for p in qf.parameters()][::2] == [*convolutions, (200, 2048), (200, 206), (1, 200)]


def normalised(norm, x):
    """Batch normalisation by the running averages."""
    return (x - numpy(norm.running_mean)) / np.sqrt(numpy(norm.running_var) + norm.eps) * numpy(norm.weight) + numpy(
        norm.bias
    )


def linear(layer, x):
    return x @ numpy(layer.weight).T + numpy(layer.bias)


def relu(x):
    return np.maximum(x, 0)


def test_networks_with_batch_normalisation_by_hand():
    """On the observation, all of the actor's layers, and the critic's before the action; after the linear map."""
    actor, qf = networks(paper, obs_dim=3, low=(-0.4, -3.0), high=(0.4, 1.0), batch_norm="both")
    for norm in (m for network in (actor, qf) for m in network.modules() if isinstance(m, torch.nn.BatchNorm1d)):
        for tensor in norm.weight, norm.bias, norm.running_mean, norm.running_var:
            torch.nn.init.uniform_(tensor.data, 0.5, 2)
    for layer in actor.fc_mu, qf.fc3:
        torch.nn.init.uniform_(layer.weight, -0.1, 0.1)
    actor.eval(), qf.eval()
    obs, action = torch.randn(5, 3), torch.randn(5, 2)

    x = relu(normalised(actor.norm1, linear(actor.fc1, normalised(actor.input, numpy(obs)))))
    x = relu(normalised(actor.norm2, linear(actor.fc2, x)))
    expected = np.tanh(linear(actor.fc_mu, x)) * [0.4, 2.0] + [0.0, -1.0]
    np.testing.assert_allclose(numpy(actor(obs)), expected, atol=1e-5)

    x = relu(normalised(qf.norm1, linear(qf.fc1, normalised(qf.input, numpy(obs)))))
    x = relu(linear(qf.fc2, np.hstack([x, (numpy(action) - [0.0, -1.0]) / [0.4, 2.0]])))
    np.testing.assert_allclose(numpy(qf(obs, action)), linear(qf.fc3, x)[:, 0], atol=1e-5)


@pytest.mark.parametrize("obs_shape, output_bound", [((17,), 3e-3), (PIXELS, 3e-4)])
def test_initial_weights(obs_shape, output_bound):
    """Uniform: within the bound, and near it; the fan-in of the layer that the action enters counts both."""
    for network in networks_for(obs_shape):
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        for layer in layers:
            inputs = {torch.nn.Linear: lambda m: m.in_features, torch.nn.Conv2d: lambda m: m.in_channels * 9}
            bound = output_bound if layer is layers[-1] else 1 / inputs[type(layer)](layer) ** 0.5
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


def test_learning_rates_and_weight_decay_sit_on_the_right_networks(run, made):
    """CleanRL's documentation has the learning rates swapped."""
    agents = made(paper, "DDPG")
    run(paper, actor_lr=0.02, critic_lr=0.03)
    for network, optimizer, lr in (
        (agents[0].actor, agents[0].actor_optimizer, 0.02),
        (agents[0].qf, agents[0].qf_optimizer, 0.03),
    ):
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        decay = 0.01 if network is agents[0].qf else 0  # of weights: biases and normalisations are spared
        assert decays == {id(p): decay * (p.ndim > 1) for p in network.parameters()}
        assert all(group["lr"] == lr for group in optimizer.param_groups)


# Batch normalisation


def averages(network):
    return {name: value.clone() for name, value in network.state_dict().items() if "running" in name}


@pytest.mark.parametrize("flags, mean, var", [({}, 0.002, 1.001), (dict(batch_norm_momentum=0.3), 0.6, 1.3)])
def test_running_averages_by_hand(flags, mean, var):
    """Observations 1 and 3: mean 2, variance 2 (of a sample). A thousandth of the way from (0, 1) is (0.002, 1.001)."""
    learner = agent(paper, batch_norm="both", **flags)
    obs = torch.tensor([[1.0] * 3, [3.0] * 3])
    learner.update(paper.Batch(obs, torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 3), torch.zeros(2)), False)
    torch.testing.assert_close(learner.qf.input.running_mean, torch.tensor([mean] * 3))
    torch.testing.assert_close(learner.qf.input.running_var, torch.tensor([var] * 3))


def test_acting_depends_on_no_batch():
    """After an update, acting and evaluating use running averages, and leave them, and the modes, as they are."""
    learner, obs = agent(paper, obs_dim=2, batch_norm="both"), torch.randn(8, 2)
    learner.update(random_batch(paper, obs_dim=2))
    networks = learner.actor, learner.qf
    before, modes = [averages(network) for network in networks], [network.training for network in networks]
    learner.act(obs[0].numpy())
    *_, values = paper.evaluate(learner, [paper.make_env(paper.Args(env_id="stubs:Point-v0")) for _ in range(3)])
    assert modes == [network.training for network in networks]
    learner.qf.eval()
    alone = torch.cat([learner.actor(row[None]) for row in obs])
    torch.testing.assert_close(learner.actor(obs), alone)
    starts = [stubs.Point().reset(seed=20_000 + i)[0][None] for i in range(3)]
    by_hand = [learner.qf(start, learner.actor(start)).item() for start in map(torch.from_numpy, starts)]
    np.testing.assert_allclose(values, by_hand, rtol=1e-5)
    for network, saved in zip(networks, before, strict=True):
        assert all(torch.equal(value, saved[name]) for name, value in averages(network).items())


def test_main_acts_by_running_averages(run, monkeypatch):
    """Before the first update, after each and in evaluations; the targets are always in training mode."""
    modes = []
    for owner, name in (paper.DDPG, "explore"), (paper.DDPG, "diagnostics"):
        function = getattr(owner, name)

        def spy(agent, *rest, function=function):
            modes.append([getattr(agent, each).training for each in ("actor", "target_actor", "target_qf")])
            return function(agent, *rest)

        monkeypatch.setattr(owner, name, spy)
    run(paper)
    assert modes == [[False, True, True]] * (80 + 2)


def test_targets_normalise_by_the_batch():
    """Their running averages, which nothing keeps up to date, are never used: they may hold anything."""
    learner = agent(paper, batch_norm="both", tau=0.5)
    other = copy.deepcopy(learner)
    for target in other.target_actor, other.target_qf:
        for name, value in target.state_dict().items():
            if "running" in name:
                value.fill_(float("nan"))
    for _ in range(3):
        batch = random_batch(paper)
        losses, others = learner.update(batch), other.update(batch)
        for name in "losses/qf1_loss", "losses/qf1_values", "losses/actor_loss":
            assert torch.equal(losses[name], others[name])
    for name in "actor", "qf", "target_actor", "target_qf":
        assert torch.equal(weights(getattr(learner, name)), weights(getattr(other, name)))


def test_targets_value_by_hand():
    """One observation twice has no spread: the normalised input is 0 whatever the running averages say."""
    learner = agent(paper, batch_norm="both")
    actor, qf = learner.target_actor.train(), learner.target_qf.train()
    batch = random_batch(paper, n=2)._replace(next_obs=torch.full((2, 3), 7.0), discount=torch.full((2,), 0.5))
    loss, q = learner.critic_loss(batch)
    hidden = relu(numpy(qf.norm1.bias))  # zeros normalised are zeros; only the bias is left
    action = numpy(actor(batch.next_obs))
    next_q = linear(qf.fc3, relu(linear(qf.fc2, np.hstack([np.tile(hidden, (2, 1)), action]))))[:, 0]
    y = numpy(batch.reward) + 0.5 * next_q
    assert loss.item() == pytest.approx(((y - numpy(q)) ** 2).mean(), rel=1e-5)


def test_saving_keeps_the_running_averages(run, made):
    agents = made(paper, "DDPG")
    saved = model(run(paper))
    for key, network in ("actor", agents[0].actor), ("qf", agents[0].qf):
        kept = averages(network)
        assert kept and all(torch.equal(saved[key][name], value) for name, value in kept.items())
        at_first = {"mean": 0, "var": 1}  # they have moved since
        assert all((value != at_first[name.split("_")[-1]]).any() for name, value in kept.items())


@pytest.mark.parametrize("flags", [dict(batch_norm="actor"), dict(pixels=True, env_id="stubs:Scripted-v0")])
def test_the_model_says_how_to_rebuild_it(run, flags):
    saved = model(run(paper, total_timesteps=50, eval_interval=0, **flags))
    space = gym.spaces.Box(saved["actor"]["action_low"].numpy(), saved["actor"]["action_high"].numpy())
    obs_space = gym.spaces.Box(-np.inf, np.inf, saved["obs_shape"])
    rebuilt = paper.DDPG(paper.Args(**saved["args"]), obs_space, space, CPU)
    for name in "actor", "qf":
        getattr(rebuilt, name).load_state_dict(saved[name])


@pytest.mark.parametrize("which", ["none", "actor", "critic", "both"])
def test_batch_normalisation_is_where_it_should_be(which):
    """In the networks and their targets: at the input and before each ReLU; in the critic not after the action."""
    learner = agent(paper, batch_norm=which)
    for name, kinds, places in (
        ("actor", ("actor", "both"), ["input", "norm1", "norm2"]),
        ("qf", ("critic", "both"), ["input", "norm1"]),
    ):
        for network in getattr(learner, name), getattr(learner, f"target_{name}"):
            found = [place for place, module in network.named_modules() if isinstance(module, torch.nn.BatchNorm1d)]
            assert found == (places if which in kinds else [])


# Ornstein-Uhlenbeck noise


@pytest.mark.parametrize("dt, std, lag, burn_in", [(1.0, 0.3797, 6, 60), (0.01, 0.3653, 666, 4000)])
def test_ou_noise_matches_theory(dt, std, lag, burn_in):
    """x' = a x + b N with a = 1 - theta dt: standard deviation b / sqrt(1 - a^2), autocorrelation a^lag, about 1/e."""
    noise = paper.OrnsteinUhlenbeckNoise(torch.ones(20_000), 0.15, 0.2, dt)
    for _ in range(burn_in):
        first = noise.sample()
    for _ in range(lag):
        last = noise.sample()
    assert first.std() == pytest.approx(std, rel=0.03) and last.std() == pytest.approx(std, rel=0.03)
    assert abs(last.mean()) < 0.02
    correlation = torch.corrcoef(torch.stack([first, last]))[0, 1]
    assert correlation == pytest.approx((1 - 0.15 * dt) ** lag, abs=0.03)


@pytest.mark.parametrize("dt", [1.0, 0.01])
def test_ou_noise_equals_stable_baselines3s(dt, monkeypatch):
    """Fed with the same normal numbers, over an episode's end too."""
    ours = paper.OrnsteinUhlenbeckNoise(torch.ones(3), 0.15, 0.2, dt)
    theirs = OrnsteinUhlenbeckActionNoise(np.zeros(3), 0.2 * np.ones(3), 0.15, dt)
    normal = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    for step, numbers in enumerate(normal):
        monkeypatch.setattr(torch, "randn_like", lambda x, numbers=numbers: torch.from_numpy(numbers))
        monkeypatch.setattr(np.random, "normal", lambda size, numbers=numbers: numbers)
        np.testing.assert_allclose(ours.sample(), theirs(), atol=1e-6)
        if step == 20:
            ours.reset(), theirs.reset()
    ours.reset()
    assert not ours.x.any()


def test_ou_noise_is_scaled_per_dimension():
    noise = paper.OrnsteinUhlenbeckNoise(torch.tensor([0.4, 2.0]).repeat(5000), 0.15, 0.2, 1.0)
    for _ in range(30):
        sample = noise.sample()
    np.testing.assert_allclose(sample.reshape(5000, 2).std(0), [0.3797 * 0.4, 0.3797 * 2.0], rtol=0.05)


def test_ou_noise_restarts_with_each_episode(run, monkeypatch):
    resets = []

    class Spy(paper.OrnsteinUhlenbeckNoise):
        def reset(self):
            super().reset()
            resets.append(self)

    monkeypatch.setattr(paper, "OrnsteinUhlenbeckNoise", Spy)
    run(paper)  # twelve episodes of ten steps
    assert len(resets) == 12


# Pixels


def scripted(size=64):
    return paper.PixelObservation(stubs.Scripted("rgb_array", size))


def read(obs):
    """(episode, step) of each of the three frames, read from the picture's red and green."""
    assert obs.shape == PIXELS and obs.dtype == np.uint8
    frames = obs.reshape(3, 3, 64, 64)
    assert (frames[:, :2] == frames[:, :2, :1, :1]).all()
    assert (frames[:, 2, :32, :16] == 200).all() and frames[
        :, 2
    ].sum() == 3 * 200 * 32 * 16  # rows and columns in place
    return [tuple(frame[:2, 0, 0].tolist()) for frame in frames]


@pytest.mark.parametrize("size", [64, 128, 256])
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
    action = np.array([0.1, 0.2], np.float32)
    env.reset()
    env.step(action)
    assert [taken.tolist() for taken in env.unwrapped.actions] == [action.tolist()] * 3


def test_pixel_networks_scale_frames_to_0_1():
    for network in networks_for(PIXELS):
        seen = []
        network.input[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        frames = torch.randint(0, 256, (4, *PIXELS), dtype=torch.uint8)
        actions = [torch.zeros(4, 6)] if isinstance(network, paper.QNetwork) else []
        network(frames, *actions)
        torch.testing.assert_close(seen[0], frames.float() / 255)


@pytest.mark.parametrize("capacity", [1, 3, 8, 99, 250])
def test_pixel_replay_buffer_against_a_list(capacity):
    """Random episodes, round the ring more than twice, beside a list of all observations and one of all transitions.

    With `capacity` + 1 places, a hundredth of which (1, 2 or 3) is given up at once; resumed now and then, also in the
    middle of an episode, where the observation takes another place.
    """
    rng, places = random.Random(capacity), capacity + 1
    hundredth = {1: 1, 3: 1, 8: 1, 99: 2, 250: 3}[capacity]
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


def test_a_run_from_pixels(run, made):
    """Through warm-up, learning, evaluation and saving; and what lies in the buffer, frame by frame."""
    buffers = made(paper, "PixelReplayBuffer")
    stubs.Scripted.made.clear()
    flags = dict(env_id="stubs:Scripted-v0", total_timesteps=40, learning_starts=20, batch_size=None, eval_interval=20)
    run_dir = run(paper, pixels=True, **flags)
    frames, rows = buffers[0].frames.numpy(), buffers[0].rows[:4].numpy()
    actions = iter(stubs.Scripted.made[0].actions)
    # the first reset of each environment, in make_env, tries the rendering: episode 0 is never played
    seen = [(read(frames[int(row[0])]), read(frames[int(row[-2])])) for row in rows]
    start = seen[0][0][0][0]
    by_episode = [
        (obs[0][0] - start, [step for _, step in obs], [step for _, step in next_obs]) for obs, next_obs in seen
    ]
    assert all(obs[0][0] == next_obs[0][0] for obs, next_obs in seen)
    lengths = [stubs.Scripted.ENDINGS[(start + i) % 5][0] for i in range(4)]
    episode = t = 0
    for (number, obs_steps, next_steps), row in zip(by_episode, rows, strict=True):
        length = lengths[episode]
        played = range(t, min(t + 3, length))
        terminal = t + 3 >= length and stubs.Scripted.ENDINGS[(start + episode) % 5][1] != "truncated"
        rewards = sum(10 * (start + episode) + step for step in played)
        assert row[[3, 5]].tolist() == [rewards, 0 if terminal else np.float32(0.99)]
        assert all((row[1:3] == next(actions)).all() for _ in played)
        expected = [min(t + i, length) for i in (1, 2, 3)]
        assert (number, next_steps) == (episode, expected)
        assert obs_steps == ([0, 0, 0] if t == 0 else [t - 2, t - 1, t])
        t += 3
        if t >= length:
            episode, t = episode + 1, 0
    resets = len(stubs.Scripted.made[0].seeds) - 1
    assert buffers[0].added == 40 and buffers[0].placed == 40 + resets  # each observation once
    assert [row["global_step"] for row in eval_rows(run_dir)] == [20, 40]
    assert np.isfinite([value for _, value in scalars(run_dir)["losses/qf1_loss"]]).all()


def test_a_run_from_pixels_goes_on_as_if_never_stopped(run, made):
    """With a buffer that has gone round its ring before the checkpoint and does so again after it."""
    buffers = made(paper, "PixelReplayBuffer")
    flags = dict(pixels=True, learning_starts=20, batch_size=4, buffer_size=27, eval_interval=20, checkpoint_interval=4)
    whole = run(paper, run_name="whole", total_timesteps=60, **flags)
    part = run(paper, run_name="part", total_timesteps=40, keep_checkpoint=True, **flags)
    paper.main(paper.args_of(str(part), total_timesteps=60))
    assert [buffer.placed for buffer in buffers] == [60 + 15, 40 + 10, 60 + 15]  # episodes of four steps
    for network in "actor", "qf":
        for name, tensor in model(whole)[network].items():
            assert (model(part)[network][name] == tensor).all(), name
    assert (whole / "eval.csv").read_bytes() == (part / "eval.csv").read_bytes()
    held = [buffers[i].rows[: buffers[i].added] for i in (0, 2)]
    assert 0 < len(held[0]) < 27 and (held[0] == held[1]).all()


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


def test_pixels_of_a_real_environment():
    """Pendulum draws itself without GL: 500 x 500, shrunk to 64 x 64, and it is no blank picture."""
    pytest.importorskip("pygame")
    env = paper.make_env(paper.Args(env_id="Pendulum-v1", pixels=True))
    obs, _ = env.reset(seed=0)
    moved, *_ = env.step(env.action_space.high)
    assert obs.shape == PIXELS and obs.dtype == np.uint8 and obs.std() > 5
    assert (moved[:3] != moved[6:]).any()


# Its docstring


def test_the_docstrings_figures_are_those_of_the_committed_data():
    def final_return(name, up_to=math.inf):
        """The mean over seeds of the last ten evaluations, up to that step."""
        evaluations = [pd.read_csv(path) for path in ROOT.glob(f"benchmark/results/{name}__[123]/eval.csv")]
        return np.mean([rows[rows["global_step"] <= up_to]["mean"].tail(10).mean() for rows in evaluations])

    def both(env_id, flags=""):
        return final_return(f"paper/{env_id}__ddpg_paper_faithful{flags}")

    def modes(env_id, flags, folder="paper_modes"):
        return final_return(f"{folder}/{env_id}__paper_batch_norm{flags}")

    def actor_alone(flags):
        return final_return(f"paper_100k/InvertedPendulum-v5__ddpg_paper_faithful__batch-norm-actor_{flags}")

    here = final_return("paper/InvertedPendulum-v5__ddpg_paper_faithful__batch-norm-actor", up_to=100_000)
    rllabs = "__actor-loss-statistics-running_target-statistics-slow"
    faster = rllabs.replace("_target", "_batch-norm-momentum-0.1_target")
    assert modes("Pendulum-v1", "", "paper_modes_pendulum") > modes("Pendulum-v1", faster, "paper_modes_pendulum")
    instead = [modes("InvertedPendulum-v5", flags) for flags in ("__target-statistics-copied", rllabs)]
    assert both("InvertedPendulum-v5") < min(instead)
    momentum = both("HalfCheetah-v5"), both("HalfCheetah-v5", "__batch-norm-momentum-0.1")
    starts = actor_alone("learning-starts-64"), actor_alone("learning-starts-10e3")
    for network in networks_for(PIXELS, actions=1):
        weights = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim > 1)
        assert round(weights, -3) == 471_000
    because = {
        "targets' normalisation": "better on Pendulum-v1, worse on InvertedPendulum-v5",
        "running averages": "HalfCheetah-v5 {:,.0f}; with torch's 0.1, {:,.0f}".format(*momentum),
        "OU time step": f"InvertedPendulum-v5 {here:,.0f}; with 0.01, {actor_alone('ou-dt-0.01'):,.0f}: level",
        "warm-up": f"not tuned: {here:,.0f} there; with 64 steps, {starts[0]:,.0f}",
        "pixels: kernel; action": "471,000 weights, near the paper's 430,000; as above",
    }
    rows = [re.split(r" *\| *", line)[1:-1] for line in paper.__doc__.splitlines() if line.count("|") == 4]
    assert {name: text for name, _, text in rows if re.search(r"\d{3}|-v\d", text)} == because
