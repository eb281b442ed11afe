"""The algorithm's parts, held against hand-computed numbers, plain Python, and stable-baselines3."""

import copy
import functools
import io
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import stubs
import torch
import torch.nn as nn
from conftest import (
    CPU,
    ROOT,
    TINY,
    agent,
    felt_weights,
    model,
    networks,
    numpy,
    paper,
    process,
    random_batch,
    tuned,
    weights,
)
from stable_baselines3 import DDPG
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.td3.policies import TD3Policy

# Networks


def relu(x):
    return np.maximum(x, 0)


def linear(layer, x):
    return x @ numpy(layer.weight).T + numpy(layer.bias)


def test_networks_compute_what_the_paper_draws():
    """The tuned networks by hand; the paper's, with batch normalisation, are in test_paper.py."""
    actor, qf = networks(tuned, obs_dim=3, low=(-0.4, -3.0), high=(0.4, 1.0))
    obs, action = torch.randn(5, 3), torch.randn(5, 2)
    x = relu(linear(actor.fc2, relu(linear(actor.fc1, numpy(obs)))))
    mu = np.tanh(linear(actor.fc_mu, x)) * [0.4, 2.0] + [0.0, -1.0]
    np.testing.assert_allclose(numpy(actor(obs)), mu, atol=1e-6)
    x = relu(linear(qf.fc2, relu(linear(qf.fc1, np.hstack([numpy(obs), (numpy(action) - [0.0, -1.0]) / [0.4, 2.0]])))))
    np.testing.assert_allclose(numpy(qf(obs, action)), linear(qf.fc3, x)[:, 0], atol=1e-6)
    assert [tuple(p.shape) for p in qf.parameters()][::2] == [(256, 5), (256, 256), (1, 256)]


def test_q_has_shape_n(script):
    _, qf = networks(script)
    assert qf(torch.randn(7, 3), torch.randn(7, 1)).shape == (7,)
    assert qf(torch.randn(1, 3), torch.randn(1, 1)).shape == (1,)


# Actions and noise

BOUNDS = [((-0.4,), (0.4,)), ((-3.0,), (1.0,)), ((-0.4, -3.0, 2.0), (0.4, 1.0, 2.5))]


@pytest.mark.parametrize("low, high", BOUNDS)
def test_actions_reach_their_own_bounds_and_no_further(script, low, high):
    actor, _ = networks(script, low=low, high=high)
    obs = torch.randn(4, 3)
    with torch.no_grad():
        for pull, bound in (1e3, high), (-1e3, low):
            actor.fc_mu.bias.fill_(pull)
            np.testing.assert_allclose(actor(obs), [bound] * 4, atol=1e-6)
        actor.fc_mu.weight.zero_()
        actor.fc_mu.bias.zero_()
        np.testing.assert_allclose(actor(obs), [np.add(low, high) / 2] * 4, atol=1e-6)
        far = actor.clip(torch.tensor([[-100.0], [100.0]]).expand(2, len(low)))
    assert torch.equal(far, torch.tensor([low, high]))


@pytest.mark.parametrize("low, high", BOUNDS)
@pytest.mark.parametrize("std", [0.1, 5.0])
def test_exploration_is_scaled_per_dimension_and_stays_within_the_bounds(script, low, high, std):
    """Each dimension a thousand times over: one call is a thousand samples."""
    half_range, middle = np.subtract(high, low) / 2, np.add(high, low) / 2
    flag = "exploration_noise" if script is tuned else "ou_sigma"
    explorer = agent(script, low=low * 1000, high=high * 1000, **{flag: std})
    nn.init.zeros_(explorer.actor.fc_mu.weight), nn.init.zeros_(explorer.actor.fc_mu.bias)
    explored = explorer.explore().numpy().reshape(1000, -1)
    assert (explored >= np.float32(low)).all() and (explored <= np.float32(high)).all()
    if std == 0.1:
        np.testing.assert_allclose(explored.std(0) / half_range, std, rtol=0.1)
        np.testing.assert_allclose(explored.mean(0), middle, atol=0.02 * half_range.max())
    else:  # clipped, not squashed or drawn anew
        assert np.isin(explored, np.float32([low, high])).mean() > 0.7


def test_act_gives_the_explored_action_of_the_observation_it_was_given(script):
    """And keeps it: its mean distance from the greedy one is what is logged."""
    explorer, obs = agent(script, low=(-0.4, -3.0), high=(0.4, 1.0)), np.float64([0.3, -2.0, 5.0])
    explorer.noise.sample = lambda: torch.tensor([0.1, -0.2])
    action = explorer.act(obs)
    greedy = numpy(explorer.actor(torch.tensor(obs[None], dtype=torch.float32)))[0]
    np.testing.assert_allclose(action, greedy + [0.1, -0.2], atol=1e-6)
    np.testing.assert_array_equal(explorer.action[0], action)
    scalars = explorer.diagnostics(random_batch(script, action_dim=2))
    assert scalars["charts/exploration_difference"] == pytest.approx(0.15, abs=1e-6)


@pytest.mark.parametrize("low, high", [(-0.4, 0.4), (0.3, 0.7), (-0.1, 1e6 + 0.1)])
def test_bounds_that_no_float32_equals_are_kept(script, run, monkeypatch, low, high):
    """Through a run whose noise takes every action out of bounds, and its evaluations."""
    space, taken = gym.spaces.Box(low, high, (1,), np.float64), []

    class Strict(stubs.Point):
        def __init__(self):
            super().__init__(action=space)

        def step(self, action):
            taken.append(action)
            return super().step(action / high)

    monkeypatch.setitem(gym.registry, "Strict-v0", gym.envs.registration.EnvSpec("Strict-v0", Strict))
    run(script, env_id="Strict-v0", **{"exploration_noise" if script is tuned else "ou_sigma": 50.0})
    assert len(taken) == 120 + 6 * 10 and all(map(space.contains, taken))
    assert np.abs([min(taken) - low, max(taken) - high]).max() <= (high - low) * 1e-7


@pytest.mark.filterwarnings("ignore:.*maximum and minimum values are equal")
@pytest.mark.parametrize("env", ["HugeAction", "PointAction"])
def test_bounds_that_cannot_be_scaled_are_refused(script, env, capfd):
    """Their difference is infinite in float32, or zero."""
    with pytest.raises(SystemExit) as end:
        script.make_env(script.Args(env_id=f"stubs:{env}-v0"))
    said = capfd.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "DDPG needs an action space with finite bounds that differ" in said


def test_gaussian_noise_is_independent_from_step_to_step():
    process = tuned.GaussianNoise(torch.full((10_000,), 0.3))
    first, second = process.sample(), process.sample()
    assert abs(first.std() - 0.3) < 0.01 and abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.05


# Replay buffer


def transition(rng, i):
    obs, next_obs = [i, rng.random()], [i + 1, rng.random()]
    return np.float32(obs), np.float32([rng.random()]), rng.random(), np.float32(next_obs), rng.choice([0, 0.5, 0.99])


def as_rows(batch):
    columns = batch.obs, batch.action, batch.reward[:, None], batch.next_obs, batch.discount[:, None]
    return torch.cat(columns, 1).tolist()


def as_row(obs, action, reward, next_obs, discount):
    return np.float32([*obs, *action, reward, *next_obs, discount]).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_replay_buffer_is_a_bounded_list(script, seed):
    """Random operations on the buffer and on a Python list of the last `capacity` rows."""
    rng = random.Random(seed)
    capacity = rng.choice([1, 2, 7, 30])
    buffer, oracle = script.ReplayBuffer(capacity, 2, 1, CPU), []
    for i in range(200):
        new = transition(rng, i)
        buffer.add(*new)
        oracle = [*oracle, as_row(*new)][-capacity:]
        if rng.random() < 0.3:
            batch = buffer.sample(rng.randint(1, 50))
            assert {len(field) for field in batch} == {len(batch.obs)}
            assert all(row in oracle for row in as_rows(batch))
        if rng.random() < 0.1:
            state, buffer = copy.deepcopy(buffer.state_dict()), script.ReplayBuffer(capacity, 2, 1, CPU)
            buffer.load_state_dict(state)
    seen = {tuple(row) for row in as_rows(buffer.sample(40 * capacity))}
    assert seen == {tuple(row) for row in oracle}


@pytest.mark.parametrize("added", [37, 100, 163])
def test_replay_buffer_samples_uniformly(script, added):
    buffer, n = script.ReplayBuffer(100, 1, 1, CPU), 200_000
    for i in range(added):
        buffer.add([i], [0], 0, [0], 0.99)
    drawn, counts = np.unique(buffer.sample(n).obs.numpy(), return_counts=True)
    assert drawn.tolist() == list(range(max(0, added - 100), added))
    expected = n / len(drawn)
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(drawn) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5  # mean and standard deviation of chi-square


def test_a_batch_is_drawn_with_replacement_and_independently(script):
    buffer = script.ReplayBuffer(10, 1, 1, CPU)
    for i in range(10):
        buffer.add([i], [0], 0, [0], 0.99)
    first, second = buffer.sample(64).obs, buffer.sample(64).obs
    assert len(first) == 64 and not torch.equal(first, second)


@pytest.mark.parametrize("env", ["Scripted", "InPlace"])
def test_what_lies_in_the_buffer_after_truncation_and_termination(script, run, made, monkeypatch, env):
    """main() itself on a scripted environment: the real last observation, whose value counts unless it is terminal."""
    buffers = made(script, "ReplayBuffer")
    monkeypatch.setattr(stubs.Scripted, "made", [])
    run(script, env_id=f"stubs:{env}-v0", total_timesteps=90)

    expected, episode, t = [], 0, 0
    for action in stubs.Scripted.made[0].actions:
        length, kind = stubs.Scripted.ENDINGS[episode % 5]
        over = t + 1 == length
        terminal = over and kind in ("terminated", "both")
        discount = 0 if terminal else np.float32(0.99)
        expected.append([episode, t, *action.tolist(), 10 * episode + t, episode, t + 1, discount])
        episode, t = (episode + 1, 0) if over else (episode, t + 1)
    assert len(expected) == buffers[0].added == 90
    assert buffers[0].rows[:90].tolist() == expected
    assert [episode for episode, *_ in expected[:8]] == [0, 0, 0, 1, 1, 2, 2, 2]

    actions = np.array([row[2:4] for row in expected])
    assert (actions >= stubs.LOW).all() and (actions <= stubs.HIGH).all()
    warm_up = actions[: TINY["learning_starts"]]  # uniform over each dimension's own range
    np.testing.assert_allclose(warm_up.min(0), stubs.LOW, atol=0.3)
    np.testing.assert_allclose(warm_up.max(0), stubs.HIGH, atol=0.3)


# Losses


def test_critic_loss_by_hand(script):
    """Networks as lambdas: mu'(s) = 2 s, Q'(s, a) = s + 10 a, Q(s, a) = 3 s + a."""
    batch = script.Batch(
        obs=torch.tensor([[1.0], [2.0], [3.0]]),
        action=torch.tensor([[0.5], [0.0], [-1.0]]),
        reward=torch.tensor([1.0, 2.0, 3.0]),
        next_obs=torch.tensor([[1.0], [0.1], [2.0]]),
        discount=torch.tensor([0.5, 0.25, 0.0]),
    )
    simple = agent(script)
    del simple.qf, simple.target_actor, simple.target_qf
    simple.qf = lambda obs, action: (3 * obs + action).squeeze(1)
    simple.target_actor = lambda obs: 2 * obs
    simple.target_qf = lambda obs, action: (obs + 10 * action).squeeze(1)
    loss, q = simple.critic_loss(batch)
    # Q' = 21, 2.1, 42; y = 1 + 10.5, 2 + 0.525, 3 (terminated); Q = 3.5, 6, 8; y - Q = 8, -3.475, -5
    assert q.tolist() == [3.5, 6.0, 8.0]
    assert loss.item() == pytest.approx((8**2 + 3.475**2 + 5**2) / 3, rel=1e-6)


def drifted(script, **flags):
    """An agent whose targets are no longer copies."""
    one, other = agent(script, **flags), agent(script, **flags)
    one.target_actor.load_state_dict(other.actor.state_dict())
    one.target_qf.load_state_dict(other.qf.state_dict())
    return one


def all_weights(agent) -> list[torch.Tensor]:
    return [weights(network) for network in (agent.actor, agent.qf, agent.target_actor, agent.target_qf)]


def test_critic_loss_gives_the_targets_no_gradient(script):
    learner = drifted(script)
    targets = [*learner.target_actor.parameters(), *learner.target_qf.parameters()]
    for parameter in targets:
        parameter.requires_grad_(True)
    learner.critic_loss(random_batch(script))[0].backward()
    assert all(p.grad is None for p in targets)
    assert all(p.grad.abs().sum() > 0 for p in learner.qf.parameters())


def test_actor_loss_by_hand(script):
    simple = agent(script)
    del simple.actor, simple.qf
    simple.actor, simple.qf = lambda obs: 2 * obs, lambda obs, action: (obs + 10 * action).squeeze(1)
    assert simple.actor_loss(torch.tensor([[1.0], [3.0]])).item() == -(21 + 63) / 2


def test_the_actors_update_leaves_the_critic_untouched(script):
    """The critic moves, with its optimiser, exactly as when the actor is not updated."""
    with_actor, batch = drifted(script), random_batch(script)
    without_actor, before = copy.deepcopy(with_actor), weights(with_actor.actor)
    with_actor.update(batch, True)
    without_actor.update(batch, False)
    for one, other in zip(with_actor.qf.parameters(), without_actor.qf.parameters(), strict=True):
        assert torch.equal(one, other) and one.grad is None and other.grad is None
        states = with_actor.qf_optimizer.state[one], without_actor.qf_optimizer.state[other]
        assert all(torch.equal(states[0][name], states[1][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert torch.equal(weights(without_actor.actor), before) and not torch.equal(weights(with_actor.actor), before)


def test_update_moves_the_targets_by_tau_and_only_with_the_actor(script):
    learner = drifted(script, tau=0.25)
    before = all_weights(learner)
    losses = learner.update(random_batch(script), False)
    after = all_weights(learner)
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True, True]
    assert set(losses) == {"losses/qf1_loss", "losses/qf1_values"}

    losses = learner.update(random_batch(script))
    actor, qf, target_actor, target_qf = all_weights(learner)
    torch.testing.assert_close(target_actor, 0.75 * before[2] + 0.25 * actor)  # the already updated actor
    torch.testing.assert_close(target_qf, 0.75 * before[3] + 0.25 * qf)
    assert set(losses) == {"losses/qf1_loss", "losses/qf1_values", "losses/actor_loss"}


def test_tau_1_makes_the_targets_copies(script):
    learner = drifted(script, tau=1.0)
    learner.update(random_batch(script))
    actor, qf, target_actor, target_qf = all_weights(learner)
    assert torch.equal(actor, target_actor) and torch.equal(qf, target_qf)


# Its state

STATES = {
    "tuned": (tuned, {}),
    "tuned, OU noise": (tuned, dict(noise="ou", noise_anneal_steps=100, target_noise=0.2)),
    "tuned, parameter noise": (tuned, dict(noise="parameter", layer_norm="both")),
    "paper": (paper, dict(batch_norm="both")),
}


@pytest.mark.parametrize("case", STATES)
def test_an_agent_goes_on_from_its_saved_state(case):
    """Acting and learning, from the middle of an episode, to the byte; another agent's own state leaves no trace."""
    script, flags = STATES[case]

    def go_on(learner, episode=False):
        if episode:
            learner.noise.reset()
        actions = []
        for step in range(1, 6):
            if flags.get("noise_anneal_steps"):
                learner.anneal_noise(step if episode else 10 + step)
            if flags.get("noise") == "parameter":
                learner.noise.adapt(torch.randn(8, 3))
            actions += learner.act(np.float32([step, 0, 1])).tolist()
            learner.update(random_batch(script))
        return actions, *map(torch.Tensor.tolist, all_weights(learner))

    learner, file = agent(script, **flags), io.BytesIO()
    go_on(learner, episode=True)
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other = agent(script, **flags)
    go_on(other, episode=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    outcomes = []
    for each in learner, other:
        torch.manual_seed(7)
        outcomes.append(go_on(each))
    assert outcomes[0] == outcomes[1]


# Action units


@pytest.mark.parametrize("low, high", [((-1e4,), (1e4,)), ((-1e-3,), (1e-3,)), ((-3.0,), (1.0,))])
def test_the_units_of_actions_change_nothing(script, low, high):
    """The critic sees actions in [-1, 1]: whatever the bounds, the same values, gradients and updates."""
    torch.manual_seed(1)
    plain = agent(script)
    torch.manual_seed(1)
    other = agent(script, low=low, high=high)
    half_range, middle = (high[0] - low[0]) / 2, (high[0] + low[0]) / 2
    for _ in range(5):
        batch = random_batch(script)
        converted = batch._replace(action=batch.action * half_range + middle)
        torch.testing.assert_close(other.qf(batch.obs, converted.action), plain.qf(batch.obs, batch.action))
        gradients = [torch.autograd.grad(each.actor_loss(batch.obs), [*each.actor.parameters()])
                     for each in (plain, other)]  # fmt: skip
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
        plain.update(batch), other.update(converted)
    for one, another in zip(all_weights(plain), all_weights(other), strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=1e-5)


# One whole update against stable-baselines3

OBS_DIM, ACTION_DIM, GAMMA, TAU, LR, L2 = 5, 2, 0.97, 0.01, (1e-4, 1e-3), 1e-2


class Space(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (OBS_DIM,))
    action_space = gym.spaces.Box(-1, 1, (ACTION_DIM,))


class Critic(nn.Module):
    """The paper's critic as stable-baselines3 calls one, whose own networks can't take the action at layer two."""

    def __init__(self, qf):
        super().__init__()
        self.qf = qf

    def forward(self, obs, action):
        return (self.qf(obs, action)[:, None],)

    def q1_forward(self, obs, action):
        return self(obs, action)[0]


SB3_CASES = {
    "tuned": (tuned, dict(learning_rate=LR[0])),
    "tuned, target noise": (tuned, dict(learning_rate=LR[0], target_noise=0.3, target_noise_clip=0.4)),
    **{
        f"paper, batch norm {which}": (
            paper,
            dict(batch_norm=which, actor_lr=LR[0], critic_lr=LR[1], critic_weight_decay=L2),
        )
        for which in ("none", "actor", "critic", "both")
    },
}


@pytest.mark.parametrize("bounds", [((-1.0, -1.0), (1.0, 1.0)), ((-0.4, -3.0), (0.4, 1.0))], ids=["one", "unequal"])
@pytest.mark.parametrize("case", SB3_CASES)
def test_ten_updates_equal_stable_baselines3(case, bounds, monkeypatch):
    """It knows actions in [-1, 1] only, and so do its networks; ours know the environment's own."""
    script, flags = SB3_CASES[case]
    ours = agent(script, OBS_DIM, *bounds, tau=TAU, **flags)
    middle, half_range = torch.tensor(bounds).mean(0), (torch.tensor(bounds[1]) - torch.tensor(bounds[0])) / 2
    networks = [ours.actor, ours.qf, ours.target_actor, ours.target_qf]
    for network in networks[2:]:  # drifted
        for parameter in network.parameters():
            parameter.mul_(0.9)

    peer = DDPG("MlpPolicy", Space(), gamma=GAMMA, tau=TAU, buffer_size=1, policy_kwargs=dict(net_arch=[256, 256]))
    theirs = [peer.actor, peer.critic, peer.actor_target, peer.critic_target]
    if script is paper:
        unscaled = [agent(script, OBS_DIM, (-1.0, -1.0), (1.0, 1.0), **flags) for _ in range(2)]
        theirs = [network for each in unscaled for network in (each.actor, each.qf)]
        peer.actor, peer.actor_target, peer.critic, peer.critic_target = *theirs[::2], *map(Critic, theirs[1::2])
        # stable-baselines3 has its targets normalise by running averages; the paper script by the batch
        monkeypatch.setattr(TD3Policy, "set_training_mode", lambda policy, mode: [n.train(mode) for n in theirs])
    for network, source in zip(theirs, networks, strict=True):
        for parameter, value in zip(network.parameters(), source.parameters(), strict=True):
            parameter.data.copy_(value)
    lr, l2 = ((LR[0], LR[0]), 0) if script is tuned else (LR, L2)
    peer.actor.optimizer = torch.optim.Adam(peer.actor.parameters(), lr[0])
    matrices, vectors = ([p for p in peer.critic.parameters() if (p.ndim == 2) == which] for which in (True, False))
    peer.critic.optimizer = torch.optim.Adam([dict(params=matrices, weight_decay=l2), dict(params=vectors)], lr[1])
    peer._update_learning_rate = lambda optimizers: None  # it knows only one for both
    peer.target_policy_noise, peer.target_noise_clip = flags.get("target_noise", 0), flags.get("target_noise_clip", 0)
    peer.set_logger(Logger(folder=None, output_formats=[]))

    for step in range(10):
        batch = random_batch(script, OBS_DIM, ACTION_DIM, 64, GAMMA)
        ends, rewards = (batch.discount == 0).float()[:, None], batch.reward[:, None]
        samples = ReplayBufferSamples(batch.obs, batch.action, batch.next_obs, ends, rewards)
        monkeypatch.setattr(peer.replay_buffer, "sample", lambda *args, samples=samples, **kwargs: samples)
        torch.manual_seed(step)
        peer.train(gradient_steps=1, batch_size=64)
        torch.manual_seed(step)
        losses = ours.update(batch._replace(action=batch.action * half_range + middle))

        logged = peer.logger.name_to_value
        assert losses["losses/qf1_loss"].item() == pytest.approx(logged["train/critic_loss"], abs=1e-6)
        assert losses["losses/actor_loss"].item() == pytest.approx(logged["train/actor_loss"], abs=1e-6)
        for mine, other in zip(networks, theirs, strict=True):
            torch.testing.assert_close(felt_weights(mine), felt_weights(other), atol=1e-6, rtol=0)


# Evaluation


class Countdown(gym.Env):
    """Pays 1, 2, 3, ... for as many steps as the environment's number says; the first one's end is terminal."""

    action_space = gym.spaces.Box(-10, 10, (1,))

    def __init__(self, length):
        self.length, self.seeds, self.actions = length, [], []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.t = 0
        return np.float32([0, self.length]), {}

    def step(self, action):
        self.actions.append(action.tolist())
        self.t += 1
        over = self.t == self.length
        return np.float32([self.t, self.length]), self.t, over and self.length == 2, over and self.length != 2, {}


class Follow(nn.Module):
    """mu(s) = the first observation, so that each action shows what was observed; Q(s, a) = the second."""

    action_low, action_high = torch.tensor([-10.0]), torch.tensor([2.5])

    def forward(self, obs, action=None):
        return obs[:, :1] if action is None else obs[:, 1] + action[:, 0]

    def clip(self, action):
        return action.clamp(self.action_low, self.action_high)


def evaluate_countdowns(script, lengths, max_steps):
    """What evaluate returns, and the environments; a wrapper turns the sign of each reward."""
    args = SimpleNamespace(seed=2, gamma=0.5, max_eval_steps=max_steps)
    follower = SimpleNamespace(actor=Follow(), qf=Follow(), device=CPU, args=args)
    envs = [gym.wrappers.RecordEpisodeStatistics(Countdown(n)) for n in lengths]
    envs = [gym.wrappers.TransformReward(env, lambda reward: -reward) for env in envs]
    return script.evaluate(follower, envs, first_start=30), [env.unwrapped for env in envs]


def test_evaluate_by_hand(script):
    (returns, discounted, q_estimates), envs = evaluate_countdowns(script, [2, 4, 1], max_steps=4)
    assert returns.tolist() == [3, 10, 1]
    assert discounted.tolist() == [-(1 + 1), -(1 + 1 + 0.75 + 0.5), -1]  # what the critic learns
    assert q_estimates.tolist() == [2, 4, 1]
    assert [env.actions for env in envs] == [[[0], [1]], [[0], [1], [2], [2.5]], [[0]]]
    assert [env.seeds for env in envs] == [[30_030], [30_031], [30_032]]


def test_an_episode_that_does_not_end_is_cut_with_a_word(script, capfd):
    (returns, *_), _ = evaluate_countdowns(script, [2, 10**9], max_steps=5)
    assert returns.tolist() == [3, 1 + 2 + 3 + 4 + 5]
    assert capfd.readouterr().err == "warning: 1 evaluation episodes cut at --max-eval-steps\n"


def test_every_evaluation_meets_the_same_starts_and_the_final_one_and_other_seeds_none_of_them(script, run):
    """Two evaluations of two episodes, then three fresh ones at the end."""
    starts = []
    for seed in 1, 2:
        stubs.Scripted.made.clear()
        run(script, env_id="stubs:Scripted-v0", seed=seed, run_name=f"seed{seed}", final_eval_episodes=3)
        starts.append([env.seeds for env in stubs.Scripted.made[1:]])
    assert starts[0] == [[20_000, 20_000, 20_002, 20_004], [20_001, 20_001, 20_003]]
    assert starts[1] == [[seed + 10_000 for seed in seeds] for seeds in starts[0]]


def test_evaluation_leaves_training_alone(script, run):
    """An evaluation takes no random number and moves nothing: with or without, the same weights."""
    with_evaluations = model(run(script, run_name="a"))
    without = model(run(script, run_name="b", eval_interval=0))
    assert all(torch.equal(with_evaluations["actor"][k], without["actor"][k]) for k in without["actor"])


# Products by oneDNN

LAYERS = {  # of HalfCheetah, 17 observations and 6 actions
    tuned: [(17, 256), (23, 256), (256, 256), (256, 6), (256, 1)],
    paper: [(17, 400), (400, 300), (406, 300), (300, 6), (300, 1)],
}
PRODUCTS = """
import torch
import {script} as script

def errors(n, inputs, outputs):
    "Of a layer's output and both gradients, against float64, relative to the largest number of each."
    torch.manual_seed(n)
    x, w, b, g = (torch.randn(*shape) for shape in ((n, inputs), (outputs, inputs), (outputs,), (n, outputs)))
    y = torch.nn.functional.linear(x.requires_grad_(), w.requires_grad_(), b)
    found = y, *torch.autograd.grad(y, (x, w), g)
    x, w, b, g = (each.detach().double() for each in (x, w, b, g))
    for one, exact in zip(found, (x @ w.T + b, g @ w, g.T @ x), strict=True):
        yield ((one - exact).abs().max() / exact.abs().max().clamp(min=1)).item()  # a single product may be near 0

def largest_error(_):
    return max(error for n in (1, 10, 64, 256) for layer in {layers} for error in errors(n, *layer))

print("error", largest_error(None), flush=True)
print("error", script.by_onednn(largest_error, None), flush=True)
"""


def test_products_have_fp32s_accuracy(script, tmp_path):
    """Every shape of a batch of 1, 10, 64 and 256, by whom it was asked for; bf16's error would be 1e-2."""
    code = PRODUCTS.format(script=script.SCRIPT, layers=LAYERS[script])
    done = process([sys.executable, "-c", code], tmp_path, ONEDNN_VERBOSE="1", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    mkl, mkl_error, onednn, onednn_error = re.split(r"error (.*)", done.stdout)[:4]
    assert 0 < float(mkl_error) < 5e-6 and 0 < float(onednn_error) < 5e-6
    kernels = [re.findall(",exec,cpu,matmul,([^,]+)", each) for each in (mkl, onednn)]
    assert not kernels[0]
    assert not re.search("bf16|amx", " ".join(kernels[1]))
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert len(kernels[1]) > 40


CPUS = {  # /proc/cpuinfo, and what auto is there
    "Zen 5": ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", "onednn"),
    "Zen 4": ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", "mkl"),
    "Intel": ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n", "mkl"),
    "ARM": ("BogoMIPS\t: 243.75\nCPU implementer\t: 0x41\n", "mkl"),
    "no /proc/cpuinfo": (None, "mkl"),
}


@pytest.fixture
def on_cpu(script, tmp_path, monkeypatch):
    """on_cpu(name): the script takes its machine for that one."""

    def on_cpu(name):
        path = tmp_path / f"{name}/cpuinfo"
        if CPUS[name][0]:
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"processor\t: 0\n{CPUS[name][0]}")
        monkeypatch.setattr(script, "Path", lambda *parts: path if parts == ("/proc/cpuinfo",) else Path(*parts))

    return on_cpu


@pytest.mark.parametrize("cpu", CPUS)
def test_onednn_multiplies_only_where_mkl_holds_back(script, cpu, on_cpu):
    on_cpu(cpu)
    args = script.Args()
    script.set_up(args)
    assert args.matmul == CPUS[cpu][1]


def test_only_the_update_is_multiplied_by_onednn_and_a_resumed_run_keeps_that(script, run, on_cpu, monkeypatch):
    """Also where the resumed run's own machine would have MKL multiply."""
    allowed = {}
    for owner, name in (script.DDPG, "explore"), (script.DDPG, "critic_loss"), (script, "evaluate"):
        function = getattr(owner, name)

        def spy(*args, name=name, function=function):
            allowed.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return function(*args)

        monkeypatch.setattr(owner, name, spy)
    by_onednn = {"explore": {"highest"}, "critic_loss": {"medium"}, "evaluate": {"highest"}}
    on_cpu("Zen 5")
    run_dir = run(script, keep_checkpoint=True, checkpoint_interval=50)
    assert allowed == by_onednn
    assert json.loads((run_dir / "args.json").read_text())["args"]["matmul"] == "onednn"
    allowed.clear()
    on_cpu("Zen 4")
    script.main(script.args_of(str(run_dir), total_timesteps=200))
    assert allowed == by_onednn
    allowed.clear()
    run(script, run_name="other")
    assert set().union(*allowed.values()) == {"highest"}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_gives_the_same_bytes_by_onednn_too(script, threads):
    torch.set_num_threads(threads)
    outcomes = []
    for _ in range(2):
        torch.manual_seed(4)
        learner = agent(script)
        learn = functools.partial(script.by_onednn, learner.update)
        for _ in range(3):
            learn(random_batch(script, n=64))
        outcomes.append(torch.cat(all_weights(learner)))
    assert torch.equal(*outcomes)
