"""What the tuned script can add to DDPG, by hand: noises, annealing, layer normalisation, n steps, smoothed targets."""

import random
import re
from itertools import pairwise

import numpy as np
import pytest
import stubs
import test_resume as processes
import torch
import torch.nn as nn
from conftest import agent, model, networks, numpy, random_batch, scalars, tuned, weights

BOUNDS = dict(low=(-0.4, -3.0), high=(0.4, 1.0))
HALF_RANGE, MIDDLE = np.array([0.4, 2.0]), np.array([0.0, -1.0])


def with_parameter_noise(**flags):
    return agent(tuned, **BOUNDS, **dict(noise="parameter", layer_norm="both", exploration_noise=0.2) | flags)


def randomize(network):
    """Weights as training leaves them: those of normalisations are no longer 1 and 0."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)


# Parameter noise


def test_perturbed_weights():
    """The actor's plus N(0, sigma^2), other ones in each episode; its normalisations' and the actor itself stay."""
    explorer = with_parameter_noise()
    randomize(explorer.actor)
    before, noises = weights(explorer.actor), []
    for sigma in 0.2, 0.2, 0.7:
        explorer.noise.sigma.fill_(sigma)
        explorer.noise.reset()
        perturbed, noise = dict(explorer.noise.perturbed.named_parameters()), []
        for name, parameter in explorer.actor.named_parameters():
            if "norm" in name:
                assert torch.equal(perturbed[name], parameter)
            else:
                noise.append((perturbed[name] - parameter).flatten())
        noises.append(torch.cat(noise))
        assert noises[-1].std().item() == pytest.approx(sigma, rel=0.02)
        assert noises[-1].mean().item() == pytest.approx(0, abs=0.02 * sigma)
        assert all(part.std() > 0.5 * sigma for part in noise if len(part) > 2)  # biases too
    assert len(noises[0]) == 3 * 256 + 256 + 256 * 256 + 256 + 256 * 2 + 2
    assert abs(torch.corrcoef(torch.stack(noises[:2]))[0, 1]) < 0.02
    assert torch.equal(weights(explorer.actor), before)


def test_an_episode_is_acted_by_the_perturbed_actor():
    explorer, obs = with_parameter_noise(exploration_noise=0.5), np.float32([0.3, -2.0, 5.0])
    explorer.noise.reset()
    first = explorer.act(obs)
    greedy, perturbed = (numpy(net(torch.tensor(obs[None])))[0] for net in (explorer.actor, explorer.noise.perturbed))
    np.testing.assert_allclose(first, perturbed, atol=1e-6)
    assert (first != greedy).all() and (explorer.act(obs) == first).all()  # no other noise
    explorer.noise.reset()
    assert (explorer.act(obs) != first).all()


@pytest.mark.parametrize("sigma, factor", [(0.001, 1.01), (0.7, 1 / 1.01)])
def test_sigma_follows_the_distance(sigma, factor):
    """sqrt(mean of ((mu - perturbed mu) / half range)^2), by a perturbation of its own, against the target 0.2."""
    explorer, obs = with_parameter_noise(), torch.randn(16, 3)
    assert explorer.noise.sigma.item() == pytest.approx(0.2)  # at first
    randomize(explorer.actor)
    explorer.noise.reset()
    acting = weights(explorer.noise.perturbed)
    explorer.noise.sigma.fill_(sigma)
    explorer.noise.adapt(obs)
    noise = weights(explorer.noise.probe) - weights(explorer.actor)
    assert noise[noise != 0].std().item() == pytest.approx(sigma, rel=0.02)
    moved = (numpy(explorer.noise.probe(obs)) - numpy(explorer.actor(obs))) / HALF_RANGE
    distance = np.sqrt(np.mean(moved**2))
    assert (distance < 0.2) == (factor > 1)
    assert explorer.noise.distance.item() == pytest.approx(distance, rel=1e-4)
    assert explorer.noise.sigma.item() == pytest.approx(sigma * factor, rel=1e-6)
    assert torch.equal(weights(explorer.noise.perturbed), acting)  # the episode goes on as it was


def test_a_run_with_parameter_noise(run, made, monkeypatch):
    """Perturbed anew in each of its 30 episodes, adapted every 50 steps of learning, and logged."""
    calls, agents = [], made(tuned, "DDPG")
    for name in "reset", "adapt":
        method = getattr(tuned.ParameterNoise, name)

        def spy(noise, *args, method=method, name=name):
            method(noise, *args)
            calls.append((name, noise.sigma.item(), weights(noise.perturbed)))
            assert not args or args[0].shape == (16, 2)  # a batch

        monkeypatch.setattr(tuned.ParameterNoise, name, spy)
    run_dir = run(
        tuned, noise="parameter", layer_norm="actor", total_timesteps=300, learning_starts=30, eval_interval=100
    )
    sigmas = [sigma for name, sigma, _ in calls if name == "adapt"]
    assert len(sigmas) == 6  # 50, 100, ..., 300
    for old, new in pairwise([0.1, *sigmas]):
        assert min(abs(new / old - 1.01), abs(old / new - 1.01)) < 1e-5
    episodes = [perturbed for name, _, perturbed in calls if name == "reset"]
    assert len(episodes) == 30 and not any(torch.equal(one, other) for one, other in pairwise(episodes))
    logged = scalars(run_dir)
    assert [step for step, _ in logged["charts/parameter_noise_distance"]] == [100, 200, 300]
    last = [logged[f"charts/parameter_noise_{name}"][-1][1] for name in ("sigma", "distance")]
    assert last == pytest.approx([sigmas[-1], agents[0].noise.distance.item()])
    assert not [name for name in model(run_dir) if "noise" in name]  # which acting without exploration doesn't need


# The other noises, and annealing


def test_ou_noise_by_hand(monkeypatch):
    """Fed with ones: x = 1, then x - 0.5 x + 1; --exploration-noise is the size of a step where dt is 1."""
    explorer = agent(tuned, **BOUNDS, noise="ou", exploration_noise=0.3, ou_theta=0.5)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    for x in 1, 1.5, 1.75:
        np.testing.assert_allclose(explorer.noise.sample(), 0.3 * HALF_RANGE * x, rtol=1e-6)
    explorer.noise.reset()
    np.testing.assert_allclose(explorer.noise.sample(), 0.3 * HALF_RANGE, rtol=1e-6)
    slower = agent(tuned, **BOUNDS, noise="ou", exploration_noise=0.3, ou_theta=0.5, ou_dt=0.25)
    for x in 0.5, 0.5 - 0.5 * 0.5 * 0.25 + 0.5:  # steps of sqrt(dt)
        np.testing.assert_allclose(slower.noise.sample(), 0.3 * HALF_RANGE * x, rtol=1e-6)


@pytest.mark.parametrize("noise", ["gaussian", "ou", "parameter"])
def test_annealing_by_hand(noise):
    """From 0.3 to 0.1 in 200 steps; both end with halves of the range as their unit."""
    explorer = agent(
        tuned, **BOUNDS, noise=noise, exploration_noise=0.3, exploration_noise_final=0.1, noise_anneal_steps=200
    )
    np.testing.assert_allclose(explorer.noise.scale, 0.3 * HALF_RANGE, rtol=1e-6)
    for step, size in (0, 0.3), (50, 0.25), (100, 0.2), (150, 0.15), (200, 0.1), (10_000, 0.1):
        explorer.anneal_noise(step)
        np.testing.assert_allclose(explorer.noise.scale, size * HALF_RANGE, rtol=1e-5)
    assert torch.equal(explorer.actor.action_scale, torch.tensor([0.4, 2.0]))
    if noise == "parameter":  # its target distance has shrunk too
        explorer.noise.sigma.fill_(0.7)
        explorer.noise.adapt(torch.randn(16, 3))
        low, high = sorted([explorer.noise.distance.item(), 0.1])
        assert low < high and (explorer.noise.sigma < 0.7) == (high != 0.1)


@pytest.mark.parametrize(
    "flags, size", [({}, 0.3), (dict(noise_anneal_steps=240), 0.2), (dict(noise_anneal_steps=60), 0.1)]
)
def test_a_run_anneals(run, made, flags, size):
    """Of 120 steps."""
    agents = made(tuned, "DDPG")
    run(tuned, exploration_noise=0.3, exploration_noise_final=0.1, **flags)
    assert agents[0].noise.scale.item() == pytest.approx(size, rel=1e-5)


# Layer normalisation


def normalised(norm, x):
    spread = np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return (x - x.mean(1, keepdims=True)) / spread * numpy(norm.weight) + numpy(norm.bias)


def linear(layer, x):
    return x @ numpy(layer.weight).T + numpy(layer.bias)


def relu(x):
    return np.maximum(x, 0)


def test_layer_normalisation_by_hand():
    """After the product of each hidden layer, before ReLU; not at the output."""
    actor, qf = networks(tuned, **BOUNDS, layer_norm="both")
    randomize(actor), randomize(qf)
    obs, action = torch.randn(5, 3), torch.randn(5, 2)
    x = relu(normalised(actor.norm1, linear(actor.fc1, numpy(obs))))
    x = relu(normalised(actor.norm2, linear(actor.fc2, x)))
    np.testing.assert_allclose(numpy(actor(obs)), np.tanh(linear(actor.fc_mu, x)) * HALF_RANGE + MIDDLE, atol=1e-5)
    x = np.hstack([numpy(obs), (numpy(action) - MIDDLE) / HALF_RANGE])
    x = relu(normalised(qf.norm1, linear(qf.fc1, x)))
    x = relu(normalised(qf.norm2, linear(qf.fc2, x)))
    np.testing.assert_allclose(numpy(qf(obs, action)), linear(qf.fc3, x)[:, 0], atol=1e-5)


@pytest.mark.parametrize("which", ["none", "critic", "actor", "both"])
def test_layer_normalisation_is_where_it_should_be(which):
    """In the networks and their targets; the other weights are drawn as without, to the byte."""
    torch.manual_seed(3)
    plain = agent(tuned)
    torch.manual_seed(3)
    changed = agent(tuned, layer_norm=which)
    for name, kind in ("actor", "actor"), ("target_actor", "actor"), ("qf", "critic"), ("target_qf", "critic"):
        parameters = dict(getattr(changed, name).named_parameters())
        norms = {f"norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
        assert {each for each in parameters if "norm" in each} == (norms if which in (kind, "both") else set())
        for each, parameter in getattr(plain, name).named_parameters():
            assert torch.equal(parameters[each], parameter)


def test_without_layer_normalisation_the_networks_are_plain_ones_to_the_byte():
    torch.manual_seed(3)
    actor, qf = networks(tuned)
    torch.manual_seed(3)
    plain_actor = nn.Sequential(nn.Linear(3, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    plain_qf = nn.Sequential(nn.Linear(4, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    obs, action = torch.randn(5, 3), torch.randn(5, 1)
    assert torch.equal(actor(obs), plain_actor(obs).tanh())
    assert torch.equal(qf(obs, action), plain_qf(torch.cat([obs, action], 1))[:, 0])


# n steps


def n_step_model(episodes, n, gamma):
    """Transitions as a textbook has them; an episode is its (obs, action, reward, next_obs) and how it ended."""
    for steps, terminated in episodes:
        for t, (obs, action, *_) in enumerate(steps):
            ahead = steps[t : t + n]
            reward = sum(gamma**j * step[2] for j, step in enumerate(ahead))
            terminal = terminated and t + len(ahead) == len(steps)
            yield obs, action, reward, ahead[-1][3], 0 if terminal else gamma ** len(ahead)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 50])
def test_n_step_transitions_of_random_episodes(n):
    """Every step once, in order, as soon as its n rewards are there or its episode is over."""
    rng, n_step, episodes, made, number = random.Random(n), tuned.NStep(n, 0.9), [], [], 0
    for _ in range(60):
        length, ending = rng.randint(1, 12), rng.choice([(True, False), (False, True), (True, True)])
        episodes.append(([], ending[0]))
        for t in range(length):
            obs, action, reward, next_obs = number, [rng.random()], rng.gauss(0, 1), number + 1
            number += 1
            episodes[-1][0].append((obs, action, reward, next_obs))
            over = ending if t + 1 == length else (False, False)
            made += n_step.transitions(obs, action, reward, next_obs, *over)
            assert len(made) == (number if any(over) else number - min(t + 1, n - 1))
    expected = list(n_step_model(episodes, n, 0.9))
    assert len(made) == len(expected) == number
    for one, other in zip(made, expected, strict=True):
        assert [one[i] for i in (0, 1, 3)] == [other[i] for i in (0, 1, 3)]
        assert (one[2], one[4]) == pytest.approx((other[2], other[4]), rel=1e-12, abs=1e-12)
        if n == 1:
            assert one == other  # the plain transition, to the byte


@pytest.mark.parametrize("n", [1, 3])
def test_what_lies_in_the_buffer_with_n_steps(run, made, monkeypatch, n):
    """main() itself on a scripted environment."""
    buffers = made(tuned, "ReplayBuffer")
    monkeypatch.setattr(stubs.Scripted, "made", [])
    run(tuned, env_id="stubs:Scripted-v0", total_timesteps=88, n_step=n, gamma=0.5)  # 8 times all five endings
    actions, episodes = iter(stubs.Scripted.made[0].actions), []
    for episode in range(40):
        length, kind = stubs.Scripted.ENDINGS[episode % 5]
        steps = [([episode, t], next(actions), 10 * episode + t, [episode, t + 1]) for t in range(length)]
        episodes.append((steps, kind != "truncated"))
    expected = [[*obs, *action, reward, *after, y] for obs, action, reward, after, y in n_step_model(episodes, n, 0.5)]
    assert buffers[0].added == 88
    np.testing.assert_array_equal(buffers[0].rows[:88], np.float32(expected))


# Smoothed targets


def test_target_smoothing_by_hand(monkeypatch):
    """Noise of 0.5 half ranges, cut at 0.6 half ranges; then the action is cut at its bounds."""
    learner = agent(tuned, 1, **BOUNDS, target_noise=0.5, target_noise_clip=0.6)
    normal = torch.tensor([[1.0, -1.0], [3.0, -3.0], [0.0, 1.2]])
    monkeypatch.setattr(torch, "randn_like", lambda action: normal)
    del learner.qf, learner.target_actor, learner.target_qf
    learner.target_actor = lambda obs: torch.tensor([[0.1, -1.0], [0.1, -1.0], [0.0, 0.0]])
    seen = []
    learner.target_qf = lambda obs, action: seen.append(action) or action.sum(1)
    learner.qf = lambda obs, action: obs[:, 0]
    batch = random_batch(tuned, 1, 2, 3)
    loss, _ = learner.critic_loss(batch)
    # 0.1 + 0.5 x 0.4, -1 - 0.5 x 2; 0.1 + 0.6 x 0.4 = 0.34, -1 - 0.6 x 2 = -2.2; 0, 0.6 x 2 = 1.2, cut at 1
    np.testing.assert_allclose(seen[0], [[0.3, -2.0], [0.34, -2.2], [0.0, 1.0]], atol=1e-6)
    y = numpy(batch.reward) + numpy(batch.discount) * [-1.7, -1.86, 1.0]
    assert loss.item() == pytest.approx(((y - numpy(batch.obs)[:, 0]) ** 2).mean(), rel=1e-5)


def test_without_smoothing_no_random_number_is_drawn():
    learner, state = agent(tuned, target_noise_clip=0.5), torch.get_rng_state()
    batch = random_batch(tuned)
    torch.set_rng_state(state)
    learner.update(batch)
    assert torch.equal(torch.get_rng_state(), state)
    agent_with = agent(tuned, target_noise=0.2)
    torch.set_rng_state(state)
    agent_with.update(batch)
    assert not torch.equal(torch.get_rng_state(), state)


# Everything at once, killed and resumed

ALL = "--n-step 3 --target-noise 0.2 --layer-norm both --noise-anneal-steps 500 --exploration-noise-final 0.02"
ALL += " --policy-frequency 2 --final-eval-episodes 3 --noise"


@pytest.mark.parametrize("noise", ["parameter --matmul onednn", "ou", "gaussian"])
def test_resumed_exactly_with_every_option(tmp_path, noise):
    """Killed at step 600, before its checkpoint: step 400's is resumed, after two adaptations of sigma."""
    flags = f"{re.sub('--final-eval-episodes [0-9]+', '', processes.PENDULUM)} {ALL} {noise}"
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    assert processes.run(tmp_path / "whole", processes.TUNED, flags).code == 0
    killed = processes.before("os.replace", 9, processes.send(processes.signal.SIGKILL))
    assert processes.run(tmp_path / "killed", processes.TUNED, flags, killed).code == -9
    assert torch.load(tmp_path / "killed/runs/x/checkpoint.pt", weights_only=True)["global_step"] == 400
    assert processes.run(tmp_path / "killed", processes.TUNED, "--resume runs/x").code == 0
    assert processes.outcome(tmp_path / "killed/runs/x") == processes.outcome(tmp_path / "whole/runs/x")
