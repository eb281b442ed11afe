"""The algorithm's parts, held against hand-computed numbers, plain Python, and stable-baselines3."""

import copy
import random
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import stubs
import torch
import torch.nn as nn
from conftest import CPU, TINY, agent, model, networks, numpy, paper, random_batch, tuned, weights
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
    x = relu(linear(qf.fc2, relu(linear(qf.fc1, np.hstack([numpy(obs), numpy(action)])))))
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
    greedy, explored = explorer.explore().numpy().reshape(2, 1000, -1)
    np.testing.assert_allclose(greedy, [middle] * 1000, atol=1e-6)
    assert (explored >= np.float32(low)).all() and (explored <= np.float32(high)).all()
    if std == 0.1:
        np.testing.assert_allclose(explored.std(0) / half_range, std, rtol=0.1)
        np.testing.assert_allclose(explored.mean(0), middle, atol=0.02 * half_range.max())
    else:  # clipped, not squashed or drawn anew
        assert np.isin(explored, np.float32([low, high])).mean() > 0.7


def test_act_gives_the_explored_action_of_the_observation_it_was_given(script):
    """And keeps it and the greedy one, whose mean distance is what is logged."""
    actor_and_noise, obs = agent(script, low=(-0.4, -3.0), high=(0.4, 1.0)), np.float64([0.3, -2.0, 5.0])
    actor_and_noise.noise.sample = lambda: torch.tensor([0.1, -0.2])
    action = actor_and_noise.act(obs)
    greedy = numpy(actor_and_noise.actor(torch.tensor(obs[None], dtype=torch.float32)))[0]
    np.testing.assert_allclose(action, greedy + [0.1, -0.2], atol=1e-6)
    np.testing.assert_allclose(actor_and_noise.actions, [greedy, action], atol=1e-6)
    scalars = actor_and_noise.diagnostics(random_batch(script, action_dim=2))
    assert scalars["charts/exploration_difference"] == pytest.approx(0.15, abs=1e-6)


@pytest.mark.parametrize("low, high", [(-0.4, 0.4), (0.3, 0.7), (-0.1, 1e6 + 0.1)])
def test_bounds_that_no_float32_equals_are_kept(script, low, high):
    space = gym.spaces.Box(low, high, (1,), np.float64)
    inner_low, inner_high = script.float32_bounds(space)
    assert inner_low.dtype == inner_high.dtype == torch.float32
    assert low <= inner_low < low + 1e-7 and high - 0.1 < inner_high <= high
    actor, _ = networks(script, low=inner_low.tolist(), high=inner_high.tolist())
    for action in actor.clip(torch.tensor([[-1e9], [1e9]])).numpy():
        assert space.contains(action)


def test_gaussian_noise_is_independent_from_step_to_step():
    process = tuned.GaussianNoise(torch.full((10_000,), 0.3))
    first, second = process.sample(), process.sample()
    assert abs(first.std() - 0.3) < 0.01 and abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.05


# Replay buffer


def transition(rng, i):
    obs, next_obs = [i, rng.random()], [i + 1, rng.random()]
    return np.float32(obs), np.float32([rng.random()]), rng.random(), np.float32(next_obs), rng.random() < 0.3


def as_rows(batch):
    columns = batch.obs, batch.action, batch.reward[:, None], batch.next_obs, batch.terminated[:, None]
    return torch.cat(columns, 1).tolist()


def as_row(obs, action, reward, next_obs, terminated):
    return [*obs.tolist(), *action.tolist(), float(np.float32(reward)), *next_obs.tolist(), float(terminated)]


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
        buffer.add([i], [0], 0, [0], False)
    drawn, counts = np.unique(buffer.sample(n).obs.numpy(), return_counts=True)
    assert drawn.tolist() == list(range(max(0, added - 100), added))
    expected = n / len(drawn)
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(drawn) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5  # mean and standard deviation of chi-square


def test_a_batch_is_drawn_with_replacement_and_independently(script):
    buffer = script.ReplayBuffer(10, 1, 1, CPU)
    for i in range(10):
        buffer.add([i], [0], 0, [0], False)
    first, second = buffer.sample(64).obs, buffer.sample(64).obs
    assert len(first) == 64 and not torch.equal(first, second)


def test_what_lies_in_the_buffer_after_truncation_and_termination(script, run, made, monkeypatch):
    """main() itself on a scripted environment: the real last observation, and only `terminated` marked."""
    buffers = made(script, "ReplayBuffer")
    monkeypatch.setattr(stubs.Scripted, "made", [])
    run(script, env_id="stubs:Scripted-v0", total_timesteps=90)

    expected, episode, t = [], 0, 0
    for action in stubs.Scripted.made[0].actions:
        length, kind = stubs.Scripted.ENDINGS[episode % 5]
        over = t + 1 == length
        terminal = over and kind in ("terminated", "both")
        expected.append([episode, t, *action.tolist(), 10 * episode + t, episode, t + 1, float(terminal)])
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
        terminated=torch.tensor([0.0, 0.0, 1.0]),
    )
    simple = agent(script, gamma=0.5, low=(-9,), high=(9,))
    del simple.qf, simple.target_actor, simple.target_qf
    simple.qf = lambda obs, action: (3 * obs + action).squeeze(1)
    simple.target_actor = lambda obs: 2 * obs
    simple.target_qf = lambda obs, action: (obs + 10 * action).squeeze(1)
    loss, q = simple.critic_loss(batch)
    # Q' = 21, 2.1, 42; y = 1 + 10.5, 2 + 1.05, 3 (terminated); Q = 3.5, 6, 8; y - Q = 8, -2.95, -5
    assert q.tolist() == [3.5, 6.0, 8.0]
    assert loss.item() == pytest.approx((8**2 + 2.95**2 + 5**2) / 3, rel=1e-6)


def drifted(script, **flags):
    """An agent whose targets are no longer copies."""
    one, other = agent(script, **flags), agent(script, **flags)
    one.target_actor, one.target_qf = other.target_actor, other.target_qf
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
    """The critic moves and has gradients exactly as when the actor is not updated."""
    with_actor, batch = drifted(script), random_batch(script)
    without_actor, before = copy.deepcopy(with_actor), weights(with_actor.actor)
    with_actor.update(batch, True)
    without_actor.update(batch, False)
    for one, other in zip(with_actor.qf.parameters(), without_actor.qf.parameters(), strict=True):
        assert torch.equal(one, other) and torch.equal(one.grad, other.grad)
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


def test_a_second_parameter_group_learns_too(script):
    """As when a copy of the script gives the output layer a learning rate of its own."""
    qf = agent(script).qf
    groups = [dict(params=[*qf.fc1.parameters(), *qf.fc2.parameters()]), dict(params=qf.fc3.parameters(), lr=0.1)]
    before = [parameter.detach().clone() for parameter in qf.parameters()]
    script.descend(torch.optim.SGD(groups, lr=0.01), qf(torch.randn(8, 3), torch.randn(8, 1)).mean())
    for old, (name, parameter) in zip(before, qf.named_parameters(), strict=True):
        step = (0.1 if "fc3" in name else 0.01) * parameter.grad
        assert step.any()
        torch.testing.assert_close(parameter, old - step)


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
    "paper": (paper, dict(actor_lr=LR[0], critic_lr=LR[1], critic_weight_decay=L2)),
    "paper with batch normalisation": (paper, dict(actor_lr=LR[0], critic_lr=LR[1], critic_weight_decay=L2)),
}


@pytest.mark.parametrize("bounds", [((-1.0, -1.0), (1.0, 1.0)), ((-0.4, -3.0), (0.4, 1.0))], ids=["one", "unequal"])
@pytest.mark.parametrize("case", SB3_CASES)
def test_ten_updates_equal_stable_baselines3(case, bounds, monkeypatch):
    """It knows actions in [-1, 1] only, and so do its networks; ours know the environment's own."""
    script, flags = SB3_CASES[case]
    flags = flags | ({} if script is tuned else {"batch_norm": "batch norm" in case})
    ours = agent(script, OBS_DIM, *bounds, gamma=GAMMA, tau=TAU, **flags)
    middle, half_range = torch.tensor(bounds).mean(0), (torch.tensor(bounds[1]) - torch.tensor(bounds[0])) / 2
    networks = [ours.actor, ours.qf, ours.target_actor, ours.target_qf]
    for network in networks[2:]:  # drifted
        for parameter in network.parameters():
            parameter.mul_(0.9)

    peer = DDPG("MlpPolicy", Space(), gamma=GAMMA, tau=TAU, buffer_size=1, policy_kwargs=dict(net_arch=[256, 256]))
    theirs = [peer.actor, peer.critic, peer.actor_target, peer.critic_target]
    if script is paper:
        unscaled = [agent(script, OBS_DIM, (-1.0, -1.0), (1.0, 1.0), **flags) for _ in range(2)]
        theirs = [network for each in unscaled for network in (each.actor, Critic(each.qf))]
        peer.actor, peer.critic, peer.actor_target, peer.critic_target = theirs
        # stable-baselines3 has its targets normalise by running averages; the paper script by the batch
        monkeypatch.setattr(TD3Policy, "set_training_mode", lambda policy, mode: [n.train(mode) for n in theirs])
    for network, source in zip(theirs, networks, strict=True):
        for parameter, value in zip(network.parameters(), source.parameters(), strict=True):
            parameter.data.copy_(value)
    lr, l2 = ((LR[0], LR[0]), 0) if script is tuned else (LR, L2)
    peer.actor.optimizer = torch.optim.Adam(peer.actor.parameters(), lr[0])
    peer.critic.optimizer = torch.optim.Adam(peer.critic.parameters(), lr[1], weight_decay=l2)
    peer._update_learning_rate = lambda optimizers: None  # it knows only one for both
    peer.set_logger(Logger(folder=None, output_formats=[]))

    for _ in range(10):
        batch = random_batch(script, OBS_DIM, ACTION_DIM, 64)
        samples = ReplayBufferSamples(
            batch.obs, batch.action, batch.next_obs, batch.terminated[:, None], batch.reward[:, None]
        )
        monkeypatch.setattr(peer.replay_buffer, "sample", lambda *args, samples=samples, **kwargs: samples)
        peer.train(gradient_steps=1, batch_size=64)
        losses = ours.update(batch._replace(action=batch.action * half_range + middle))

        logged = peer.logger.name_to_value
        assert losses["losses/qf1_loss"].item() == pytest.approx(logged["train/critic_loss"], abs=1e-6)
        assert losses["losses/actor_loss"].item() == pytest.approx(logged["train/actor_loss"], abs=1e-6)
        for mine, other in zip(networks, theirs, strict=True):
            torch.testing.assert_close(weights(mine), weights(other), atol=1e-6, rtol=0)


# Evaluation


class Countdown(gym.Env):
    """Pays 1, 2, 3, ... for as many steps as the environment's number says; the first one's end is terminal."""

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


def test_evaluate_by_hand(script):
    envs = [Countdown(2), Countdown(4), Countdown(1)]
    follower = SimpleNamespace(actor=Follow(), qf=Follow(), obs=torch.zeros(1), gamma=0.5)
    returns, discounted, q_estimates = script.evaluate(follower, envs, first_seed=30, max_steps=4)
    assert returns.tolist() == [3, 10, 1]
    assert discounted.tolist() == [1 + 1, 1 + 1 + 0.75 + 0.5, 1]
    assert q_estimates.tolist() == [2, 4, 1]
    assert [env.actions for env in envs] == [[[0], [1]], [[0], [1], [2], [2.5]], [[0]]]
    assert [env.seeds for env in envs] == [[30], [31], [32]]


def test_an_episode_that_does_not_end_is_cut_with_a_word(script, capfd):
    script.warn.cache_clear()
    follower = SimpleNamespace(actor=Follow(), qf=Follow(), obs=torch.zeros(1), gamma=0.5)
    returns, *_ = script.evaluate(follower, [Countdown(2), Countdown(10**9)], first_seed=0, max_steps=5)
    assert returns.tolist() == [3, 1 + 2 + 3 + 4 + 5]
    assert capfd.readouterr().err == (
        "warning: 1 evaluation episodes did not end within --max-eval-steps 5: cut there\n"
    )


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
