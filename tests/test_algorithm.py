"""The algorithm's parts, held against hand-computed numbers, plain Python, and stable-baselines3.

Where the two scripts are word for word the same, which test_siblings.py checks, one of them is enough here.
"""

import copy
import random
import re
from contextlib import nullcontext
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
    HALF_RANGE,
    HIGH,
    LOW,
    MIDDLE,
    agent,
    felt_weights,
    linear,
    model,
    networks,
    numpy,
    paper,
    random_batch,
    randomize,
    relu,
    tuned,
    weights,
)
from stable_baselines3 import DDPG
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.td3.policies import TD3Policy

# Networks


def normalised(norm, x):
    if isinstance(norm, nn.Identity):
        return x
    if isinstance(norm, nn.LayerNorm):
        mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    else:
        mean, var = numpy(norm.running_mean), numpy(norm.running_var)
    return (x - mean) / np.sqrt(var + 1e-5) * numpy(norm.weight) + numpy(norm.bias)


def hidden(network, i, x):
    norm = getattr(network, f"norm{i}", nn.Identity())
    return relu(normalised(norm, linear(getattr(network, f"fc{i}"), x)))


@pytest.mark.parametrize("which", ["none", "actor", "critic", "both"])
def test_networks_by_hand(script, which):
    """Normalised before each hidden ReLU; the paper's also at the input, but in the critic not after the action."""
    flag, kind = ("layer_norm", nn.LayerNorm) if script is tuned else ("batch_norm", nn.BatchNorm1d)
    made, inputs = agent(script, 3, LOW, HIGH, **{flag: which}), [] if script is tuned else ["input"]
    for name, normalises, places in (
        ("actor", which in ("actor", "both"), [*inputs, "norm1", "norm2"]),
        ("qf", which in ("critic", "both"), [*inputs, "norm1", *([] if inputs else ["norm2"])]),
    ):
        for network in getattr(made, name), getattr(made, f"target_{name}"):
            found = [place for place, module in network.named_modules() if isinstance(module, kind)]
            assert found == (places if normalises else [])
            randomize(network)

    actor, qf, obs, action = made.actor.eval(), made.qf.eval(), torch.randn(5, 3), torch.randn(5, 2)
    own_input = normalised(actor.input, numpy(obs)) if inputs else numpy(obs)
    x = linear(actor.fc_mu, hidden(actor, 2, hidden(actor, 1, own_input)))
    np.testing.assert_allclose(numpy(actor(obs)), np.tanh(x) * HALF_RANGE + MIDDLE, atol=1e-5)
    scaled = (numpy(action) - MIDDLE) / HALF_RANGE
    if script is tuned:
        x = hidden(qf, 1, np.hstack([numpy(obs), scaled]))
    else:
        x = np.hstack([hidden(qf, 1, normalised(qf.input, numpy(obs))), scaled])
    np.testing.assert_allclose(numpy(qf(obs, action)), linear(qf.fc3, hidden(qf, 2, x))[:, 0], atol=1e-5)
    assert qf(obs[:1], action[:1]).shape == (1,)


# Actions and noise


def test_actions_reach_their_own_bounds_and_no_further(script):
    actor, _ = networks(script, low=LOW, high=HIGH)
    nn.init.zeros_(actor.fc_mu.weight)
    for pull, action in (1e3, HIGH), (-1e3, LOW), (0, MIDDLE):
        nn.init.constant_(actor.fc_mu.bias, pull)
        np.testing.assert_allclose(numpy(actor(torch.randn(4, 3))), [action] * 4, atol=1e-6)
    assert torch.equal(actor.clip(torch.tensor([[-100.0] * 2, [100.0] * 2])), torch.tensor([LOW, HIGH]))


@pytest.mark.parametrize("std", [0.1, 5.0])
def test_exploration_is_scaled_per_dimension_and_stays_within_the_bounds(script, std):
    """Each dimension a thousand times over: one call is a thousand samples."""
    flag = "exploration_noise" if script is tuned else "ou_sigma"
    explorer = agent(script, low=LOW * 1000, high=HIGH * 1000, **{flag: std})
    nn.init.zeros_(explorer.actor.fc_mu.weight), nn.init.zeros_(explorer.actor.fc_mu.bias)
    explored, later = (explorer.explore().numpy().reshape(1000, 2) for _ in range(2))
    assert (explored >= np.float32(LOW)).all() and (explored <= np.float32(HIGH)).all()
    if std == 0.1:
        noise, later = ((each - MIDDLE) / HALF_RANGE for each in (explored, later))
        np.testing.assert_allclose(noise.std(0), std, rtol=0.1)
        np.testing.assert_allclose(noise.mean(0), 0, atol=0.02)
        # Gaussian noise is independent from step to step, the other's second step is 0.85 times the first and as much
        correlation = 0 if script is tuned else 0.85 / (1 + 0.85**2) ** 0.5
        assert np.corrcoef(noise.ravel(), later.ravel())[0, 1] == pytest.approx(correlation, abs=0.05)
    else:  # clipped, not squashed or drawn anew
        assert np.isin(explored, np.float32([LOW, HIGH])).mean() > 0.7


def test_act_gives_the_explored_action_of_the_observation_it_was_given(script):
    """And keeps it: its mean distance from the greedy one is what is logged."""
    explorer, obs = agent(script, 3, LOW, HIGH), np.float64([0.3, -2.0, 5.0])
    explorer.noise.sample = lambda: torch.tensor([0.1, -0.2])
    action = explorer.act(obs)
    greedy = numpy(explorer.actor(torch.tensor(obs[None], dtype=torch.float32)))[0]
    np.testing.assert_allclose(action, greedy + [0.1, -0.2], atol=1e-6)
    scalars = explorer.diagnostics(random_batch(script, action_dim=2))
    assert scalars["charts/exploration_difference"] == pytest.approx(0.15, abs=1e-6)


def test_bounds_that_no_float32_equals_are_kept(script, run, monkeypatch):
    """Through a run whose noise takes every action out of bounds, and its evaluations."""
    low, high = np.array([-0.4, 0.3, -0.1]), np.array([0.4, 0.7, 1e6 + 0.1])
    space, taken = gym.spaces.Box(low, high, dtype=np.float64), []

    class Strict(stubs.Point):
        def __init__(self):
            super().__init__(action=space)

        def step(self, action):
            taken.append(action)
            return super().step(action / high)

    monkeypatch.setitem(gym.registry, "Strict-v0", gym.envs.registration.EnvSpec("Strict-v0", Strict))
    run(script, env_id="Strict-v0", **{"exploration_noise" if script is tuned else "ou_sigma": 50.0})
    assert len(taken) == 120 + 6 * 10 and all(map(space.contains, taken))
    for reached, bound in (np.min(taken, 0), low), (np.max(taken, 0), high):
        assert (np.abs(reached - bound) <= (high - low) * 1e-7).all()


# Replay buffer


@pytest.mark.parametrize("capacity", [1, 7, 30])
def test_replay_buffer_is_a_bounded_list(capacity):
    """Random operations on the buffer and on a Python list of the last `capacity` rows."""

    def as_rows(batch):
        columns = batch.obs, batch.action, batch.reward[:, None], batch.next_obs, batch.discount[:, None]
        return set(map(tuple, torch.cat(columns, 1).tolist()))

    rng, buffer, oracle = random.Random(capacity), tuned.ReplayBuffer(capacity, 2, 1, CPU), []
    for i in range(200):
        row = np.float32([i, rng.random(), rng.random(), rng.random(), i + 1, rng.random(), rng.choice([0, 0.99])])
        buffer.add(row[:2], row[2:3], row[3], row[4:6], row[6])
        oracle = [*oracle, tuple(row.tolist())][-capacity:]
        if rng.random() < 0.3:
            assert as_rows(buffer.sample(rng.randint(1, 50))) <= set(oracle)
        if rng.random() < 0.1:
            state, buffer = copy.deepcopy(buffer.state_dict()), tuned.ReplayBuffer(capacity, 2, 1, CPU)
            buffer.load_state_dict(state)
    assert as_rows(buffer.sample(40 * capacity)) == set(oracle)


@pytest.mark.parametrize("added", [37, 163])
def test_replay_buffer_samples_uniformly(added):
    """With replacement, and anew each time."""
    buffer, n = tuned.ReplayBuffer(100, 1, 1, CPU), 200_000
    for i in range(added):
        buffer.add([i], [0], 0, [0], 0.99)
    drawn, counts = np.unique(buffer.sample(n).obs.numpy(), return_counts=True)
    assert drawn.tolist() == list(range(max(0, added - 100), added))
    expected = n / len(drawn)
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(drawn) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5  # mean and standard deviation of chi-square
    assert not torch.equal(buffer.sample(64).obs, buffer.sample(64).obs)


def n_step_model(episodes, n, gamma):
    """Rows as a textbook has them; an episode is its (obs, action, reward, next_obs), and True if it terminated."""
    for steps, terminated in episodes:
        for t, (obs, action, *_) in enumerate(steps):
            ahead = steps[t : t + n]
            reward = sum(gamma**j * step[2] for j, step in enumerate(ahead))
            terminal = terminated and t + len(ahead) == len(steps)
            yield [*obs, *action, reward, *ahead[-1][3], 0 if terminal else gamma ** len(ahead)]


@pytest.mark.parametrize("script, env, n", [(tuned, "InPlace", 1), (tuned, "Scripted", 3), (paper, "InPlace", 1)])
def test_what_lies_in_the_buffer(script, env, n, run, made, monkeypatch):
    """main() itself: the real last observation, whose value counts unless it is terminal; noise anew each episode."""
    buffers, resets = made(script, "ReplayBuffer"), []
    noise = tuned.GaussianNoise if script is tuned else paper.OrnsteinUhlenbeckNoise
    monkeypatch.setattr(noise, "reset", lambda noise: resets.append(noise))
    monkeypatch.setattr(stubs.Scripted, "made", [])
    flags = dict(n_step=n) if script is tuned else {}
    run(script, env_id=f"stubs:{env}-v0", total_timesteps=88, gamma=0.5, eval_interval=0, **flags)
    actions, episodes = np.array(stubs.Scripted.made[0].actions), []
    remaining = iter(actions)
    for episode in range(40):  # 8 times all five endings
        length, kind = stubs.Scripted.ENDINGS[episode % 5]
        steps = [([episode, t], next(remaining), 10 * episode + t, [episode, t + 1]) for t in range(length)]
        episodes.append((steps, kind != "truncated"))
    assert buffers[0].added == 88 and len(resets) == 40
    np.testing.assert_array_equal(buffers[0].rows[:88], np.float32([*n_step_model(episodes, n, 0.5)]))
    assert (actions >= stubs.LOW).all() and (actions <= stubs.HIGH).all()
    for reached, bound in (actions[:40].min(0), stubs.LOW), (actions[:40].max(0), stubs.HIGH):
        np.testing.assert_allclose(reached, bound, atol=0.3)  # the warm-up's are uniform over each range


# Updates


def test_losses_by_hand(script):
    """Networks as lambdas: mu(s) = mu'(s) = 2 s, Q'(s, a) = s + 10 a, Q(s, a) = 3 s + a."""
    batch = script.Batch(
        obs=torch.tensor([[1.0], [2.0], [3.0]]),
        action=torch.tensor([[0.5], [0.0], [-1.0]]),
        reward=torch.tensor([1.0, 2.0, 3.0]),
        next_obs=torch.tensor([[1.0], [0.1], [2.0]]),
        discount=torch.tensor([0.5, 0.25, 0.0]),
    )
    simple = agent(script)
    del simple.actor, simple.qf, simple.target_actor, simple.target_qf
    simple.actor = simple.target_actor = lambda obs: 2 * obs
    simple.qf = lambda obs, action: (3 * obs + action).squeeze(1)
    simple.target_qf = lambda obs, action: (obs + 10 * action).squeeze(1)
    loss, q = simple.critic_loss(batch)
    # Q' = 21, 2.1, 42; y = 1 + 10.5, 2 + 0.525, 3 (terminated); Q = 3.5, 6, 8; y - Q = 8, -3.475, -5
    assert q.tolist() == [3.5, 6.0, 8.0]
    assert loss.item() == pytest.approx((8**2 + 3.475**2 + 5**2) / 3, rel=1e-6)
    assert simple.actor_loss(batch.obs).item() == -(5 + 10 + 15) / 3


def all_networks(agent) -> list[nn.Module]:
    return [agent.actor, agent.qf, agent.target_actor, agent.target_qf]


def test_update_moves_the_targets_by_tau_and_only_with_the_actor(script):
    learner = agent(script, tau=0.25)
    randomize(learner.target_actor), randomize(learner.target_qf)
    before = list(map(weights, all_networks(learner)))
    losses = learner.update(random_batch(script), False)
    after = list(map(weights, all_networks(learner)))
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True, True]
    assert set(losses) == {"losses/qf1_loss", "losses/qf1_values"}

    losses = learner.update(random_batch(script))
    actor, qf, target_actor, target_qf = map(weights, all_networks(learner))
    torch.testing.assert_close(target_actor, 0.75 * before[2] + 0.25 * actor)  # the already updated actor
    torch.testing.assert_close(target_qf, 0.75 * before[3] + 0.25 * qf)
    assert set(losses) == {"losses/qf1_loss", "losses/qf1_values", "losses/actor_loss"}
    assert not any(p.grad is not None for network in all_networks(learner) for p in network.parameters())


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


PAPERS = dict(actor_lr=LR[0], critic_lr=LR[1], critic_weight_decay=L2)
SB3_CASES = {
    "tuned": (tuned, dict(learning_rate=LR[0])),
    "tuned, target noise": (tuned, dict(learning_rate=LR[0], target_noise=0.9, target_noise_clip=0.7)),
    "paper, batch norm none": (paper, PAPERS | dict(batch_norm="none")),
    "paper, batch norm actor": (paper, PAPERS | dict(batch_norm="actor")),
    "paper, batch norm critic": (paper, PAPERS | dict(batch_norm="critic")),
    "paper, batch norm both": (paper, PAPERS | dict(batch_norm="both")),
}


@pytest.mark.parametrize("case", SB3_CASES)
def test_updates_equal_stable_baselines3s(case, monkeypatch):
    """It knows actions in [-1, 1] only, and so do its networks; ours know the environment's own."""
    script, flags = SB3_CASES[case]
    ours = agent(script, OBS_DIM, LOW, HIGH, tau=TAU, **flags)
    networks = all_networks(ours)
    for network in networks[2:]:  # drifted
        for parameter in network.parameters():
            parameter.mul_(0.9)
    if "target_noise" in flags:  # which the bounds then cut, too
        nn.init.constant_(ours.target_actor.fc_mu.bias, 0.5)

    peer = DDPG("MlpPolicy", Space(), gamma=GAMMA, tau=TAU, buffer_size=1, policy_kwargs=dict(net_arch=[256, 256]))
    theirs = [peer.actor, peer.critic, peer.actor_target, peer.critic_target]
    if script is paper:
        unscaled = [agent(script, OBS_DIM, [-1] * ACTION_DIM, [1] * ACTION_DIM, **flags) for _ in range(2)]
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
        action = batch.action * torch.tensor(HALF_RANGE).float() + torch.tensor(MIDDLE).float()
        losses = ours.update(batch._replace(action=action))

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

    def forward(self, obs, action=None):
        return obs[:, :1] if action is None else obs[:, 1] + action[:, 0]

    def clip(self, action):
        return action.clamp(-10, 2.5)


def test_evaluate_by_hand(capfd):
    """Rewards' signs are turned by a wrapper; the last episode would not end, and is cut with a word."""
    args = SimpleNamespace(seed=2, gamma=0.5, max_eval_steps=5)
    follower = SimpleNamespace(actor=Follow(), qf=Follow(), device=CPU, args=args)
    envs = [gym.wrappers.RecordEpisodeStatistics(Countdown(n)) for n in (2, 4, 1, 10**9)]
    turned = [gym.wrappers.TransformReward(env, lambda reward: -reward) for env in envs]
    returns, discounted, q_estimates = tuned.evaluate(follower, turned, first_start=30)
    assert returns.tolist() == [3, 10, 1, 15]
    assert discounted.tolist() == [-2, -3.25, -1, -3.5625]  # 1 + 1 + 0.75 + 0.5 + 0.3125: what the critic learns
    assert q_estimates.tolist() == [2, 4, 1, 1e9]
    assert [env.unwrapped.actions for env in envs[:3]] == [[[0], [1]], [[0], [1], [2], [2.5]], [[0]]]
    assert [env.unwrapped.seeds for env in envs] == [[30_030], [30_031], [30_032], [30_033]]
    assert capfd.readouterr().err == "warning: 1 evaluation episodes cut at --max-eval-steps\n"


# A run goes on from its checkpoint; test_resume.py kills runs in processes of their own

RESUMED = {
    "gaussian": (tuned, dict(matmul="onednn", policy_frequency=2)),
    "ou": (tuned, dict(noise="ou", noise_anneal_steps=90, target_noise=0.2, n_step=3)),
    "parameter": (tuned, dict(noise="parameter", layer_norm="both", noise_anneal_steps=90)),
    "paper": (paper, dict(batch_norm="both")),
    "pixels": (paper, dict(pixels=True, batch_size=4, buffer_size=15)),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_as_if_never_stopped(case, run, made):
    """From step 50 of 57, or from pixels, where episodes are shorter, 28 of 29; the buffer goes round too."""
    (script, flags), pixels = RESUMED[case], case == "pixels"
    buffers = made(script, "PixelReplayBuffer" if pixels else "ReplayBuffer")
    total, end = (40, 29) if pixels else (80, 57)
    flags = dict(buffer_size=27, checkpoint_interval=4, keep_checkpoint=True) | flags
    flags |= dict(learning_starts=20, eval_interval=20, eval_episodes=1, final_eval_episodes=0)
    whole = run(script, run_name="whole", total_timesteps=total, **flags)
    part = run(script, run_name="part", total_timesteps=end, **flags)
    script.main(script.args_of(str(part), total_timesteps=total))
    for network in "actor", "qf":
        for name, tensor in model(whole)[network].items():
            assert torch.equal(model(part)[network][name], tensor), name
    assert (whole / "eval.csv").read_bytes() == (part / "eval.csv").read_bytes()
    stopped, resumed = buffers[1], buffers[2]
    assert torch.equal(buffers[0].rows[: buffers[0].added], resumed.rows[: resumed.added])
    if pixels:  # episodes of four steps
        assert (stopped.placed, resumed.placed) == (29 + 8, 40 + 10)


# Products by oneDNN

LAYERS = [(17, 256), (23, 256), (256, 256), (256, 6), (17, 400), (400, 300), (406, 300), (300, 1)]  # for HalfCheetah


def relative_errors(n, inputs, outputs):
    """Of a layer's output and both gradients, against float64, relative to the largest number of each."""
    x, w, b, g = (torch.randn(*shape) for shape in ((n, inputs), (outputs, inputs), (outputs,), (n, outputs)))
    y = torch.nn.functional.linear(x.requires_grad_(), w.requires_grad_(), b)
    found = y, *torch.autograd.grad(y, (x, w), g)
    x, w, b, g = (each.detach().double() for each in (x, w, b, g))
    for one, exact in zip(found, (x @ w.T + b, g @ w, g.T @ x), strict=True):
        yield ((one - exact).abs().max() / exact.abs().max().clamp(min=1)).item()  # a single product may be near 0


def largest_error():
    return max(error for n in (1, 10, 256) for layer in LAYERS for error in relative_errors(n, *layer))


def test_products_have_fp32s_accuracy(capfd):
    """By whom it was asked for; bf16's error would be 1e-2."""
    avx512, kernels = torch.backends.cpu.get_cpu_capability() == "AVX512", []
    for error in largest_error, lambda: tuned.by_onednn(largest_error):
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON) if avx512 else nullcontext():
            assert 0 < error() < 5e-6
        kernels.append(re.findall(",exec,cpu,matmul,([^,]+)", capfd.readouterr().out))
    assert not kernels[0] and not re.search("bf16|amx", " ".join(kernels[1]))
    assert len(kernels[1]) > 40 or not avx512


ZEN_5 = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n"
ZEN_4 = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n"
INTEL = "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
ARM = "BogoMIPS\t: 243.75\nCPU implementer\t: 0x41\n"


def test_onednn_multiplies_only_where_mkl_holds_back(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(tuned, "Path", lambda *parts: path if parts == ("/proc/cpuinfo",) else Path(*parts))
    for cpu, matmul in (None, "mkl"), (ZEN_5, "onednn"), (ZEN_4, "mkl"), (INTEL, "mkl"), (ARM, "mkl"):
        if cpu:
            path.write_text(f"processor\t: 0\n{cpu}")
        tuned.set_up(args := tuned.Args())
        assert args.matmul == matmul, cpu


def test_only_the_update_is_multiplied_by_onednn(run, monkeypatch):
    allowed = {}
    for owner, name in (tuned.DDPG, "explore"), (tuned.DDPG, "critic_loss"), (tuned, "evaluate"):

        def spy(*args, name=name, function=getattr(owner, name)):  # noqa: B008
            allowed.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return function(*args)

        monkeypatch.setattr(owner, name, spy)
    run(tuned, matmul="onednn")
    assert allowed == {"explore": {"highest"}, "critic_loss": {"medium"}, "evaluate": {"highest"}}
    allowed.clear()
    run(tuned, matmul="mkl", run_name="other")
    assert set().union(*allowed.values()) == {"highest"}
