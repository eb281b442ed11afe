"""The GPU path: what must hold without a GPU too, and, marked gpu, what only a GPU can show."""

import copy
import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, agent, felt_weights, paper, tuned, weights
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
OBS_DIM, ACTION_DIM, BATCH_SIZE = 5, 2, 32
SPACES = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,)), gym.spaces.Box(np.float32([-1, -3]), np.float32([1, 2]))
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Training:
    """An agent and a filled buffer, and main's own two calls, ready to be graphed: explore() and learn()."""

    def __init__(self, script, device="cpu", seed=0, **flags):
        torch.manual_seed(seed)
        device = torch.device(device)
        rates = {"learning_rate": 1e-3} if script is tuned else {"actor_lr": 1e-3, "critic_weight_decay": 0}
        self.script, self.flags = script, flags
        self.agent = script.DDPG(script.Args(tau=0.005, **rates | flags), *SPACES, device)
        self.explore = self.agent.explore
        buffer, rng = script.ReplayBuffer(1000, OBS_DIM, ACTION_DIM, device), np.random.default_rng(seed)
        for _ in range(200):
            obs, next_obs = rng.normal(size=(2, OBS_DIM))
            buffer.add(obs, rng.uniform(-1, 1, ACTION_DIM), rng.normal(), next_obs, rng.choice([0, 0.99]))

        def learn(update_actor=True):
            batch = buffer.sample(BATCH_SIZE)
            return self.agent.update(batch, update_actor), batch

        self.learn = learn

    def begin_episode(self, global_step):
        """What main does between the calls that may be graphed."""
        self.agent.noise.reset()
        if "noise_anneal_steps" in self.flags:
            self.agent.anneal_noise(global_step)
        if self.flags.get("noise") == "parameter":
            self.agent.noise.adapt(self.agent.obs)

    @property
    def networks(self):
        return self.agent.actor, self.agent.qf, self.agent.target_actor, self.agent.target_qf


CASES = {
    "tuned": (tuned, {}),
    "paper": (paper, {}),
    "with what can be added": (
        tuned,
        dict(noise="parameter", layer_norm="both", target_noise=0.2, noise_anneal_steps=9),
    ),
    "with Gaussian noise that shrinks": (tuned, dict(noise_anneal_steps=9)),
    "with Ornstein-Uhlenbeck noise that shrinks": (tuned, dict(noise="ou", noise_anneal_steps=9)),
}


@pytest.fixture(params=CASES)
def training_on(request):
    """training_on(device, flag=value, ...) is such a training, always from the same seed."""
    script, flags = CASES[request.param]
    return lambda device, **more: Training(script, device, **flags | more)


class NoHostReads(TorchDispatchMode):
    """Fails at an operation that gives the host a value of a tensor: on a GPU, each of these waits for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        assert name not in HOST_READS, f"{name} reads a value back to the host"
        return function(*args, **(kwargs or {}))


def numbers(losses):
    return [float(value) for value in losses.values()]


def test_the_update_and_acting_read_nothing_back_to_the_host(training_on):
    training = training_on("cpu")
    with NoHostReads():
        for step in range(6):
            training.begin_episode(step)
            training.explore()
            training.learn(step % 2 == 0)
    with pytest.raises(AssertionError, match="reads a value back"), NoHostReads():  # the check itself can fail
        training.learn()[0]["losses/qf1_loss"].item()


class FakeGraph:
    """Stands in for torch.cuda.CUDAGraph: counts its replays."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_a_graphed_function_runs_warms_up_records_once_and_replays_per_argument(script, monkeypatch):
    graphs, recording, calls = [], [], []

    class Record:
        def __init__(self, graph):
            graphs.append(graph)

        def __enter__(self):
            recording.append(True)

        def __exit__(self, *exception):
            recording.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", Record)

    def function(argument):
        calls.append((argument, bool(recording)))
        return object()

    graphed = script.cuda_graphed(function, warmup=3)
    eager = [graphed("a") for _ in range(3)]
    assert calls == [("a", False)] * 3 and len(set(map(id, eager))) == 3 and not graphs
    recorded = graphed("a")
    assert calls[3:] == [("a", True)] and graphs[0].replays == 1
    assert graphed("a") is recorded and graphs[0].replays == 2 and len(calls) == 4
    for _ in range(4):
        graphed("b")
    assert len(graphs) == 2 and graphs[1].replays == 1 and graphs[0].replays == 2


def test_the_function_to_be_graphed_gives_the_numbers_of_the_usual_style(script):
    """Against the update as it is usually written: optimisers that loop, targets parameter by parameter."""
    training, (actor, qf, target_actor, target_qf) = Training(script), Training(script).networks
    actor_optimizer, qf_optimizer = (torch.optim.Adam(network.parameters(), lr=1e-3) for network in (actor, qf))
    for network in (actor, qf, target_actor, target_qf):
        network.train()  # as update does, where there is batch normalisation
    for _ in range(20):
        losses, batch = training.learn()
        with torch.no_grad():
            y = batch.reward + batch.discount * target_qf(batch.next_obs, target_actor(batch.next_obs))
        qf_loss = ((y - qf(batch.obs, batch.action)) ** 2).mean()
        qf_optimizer.zero_grad()
        qf_loss.backward()
        qf_optimizer.step()
        mu_loss = -qf(batch.obs, actor(batch.obs)).mean()
        actor_optimizer.zero_grad()
        mu_loss.backward()
        actor_optimizer.step()
        with torch.no_grad():
            for network, target in (actor, target_actor), (qf, target_qf):
                for parameter, target_parameter in zip(network.parameters(), target.parameters(), strict=True):
                    target_parameter.copy_(0.005 * parameter + 0.995 * target_parameter)
        assert losses["losses/qf1_loss"].item() == pytest.approx(qf_loss.item(), rel=1e-4)
        assert losses["losses/actor_loss"].item() == pytest.approx(mu_loss.item(), rel=1e-4, abs=1e-5)
    for network, usual in zip(training.networks, (actor, qf, target_actor, target_qf), strict=True):
        torch.testing.assert_close(felt_weights(network), felt_weights(usual), rtol=1e-4, atol=2e-5)


def test_without_a_gpu_cudagraphs_are_refused_in_one_line(script, cli, tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        cli(script, "--cudagraphs", "--no-cuda")
    said = capfd.readouterr()
    assert (end.value.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert "CUDA" in said.err and not list(tmp_path.iterdir())


class EndsAtOnce(gym.Wrapper):
    """Its episode is over after one step: it leaves its row in the batch and does nothing more."""

    def step(self, action):
        obs, reward, _, truncated, info = self.env.step(action)
        return obs, reward, True, truncated, info


def test_episodes_stepped_together_have_the_numbers_of_episodes_on_their_own(script):
    """Every episode alone, with only idle rows beside it, gives to the byte what it gives in company."""
    envs = [script.make_env(script.Args(env_id="Pendulum-v1")) for _ in range(4)]
    evaluated = agent(script, low=(-2.0,), high=(2.0,))
    together = script.evaluate(evaluated, envs)
    for i in range(len(envs)):
        company = [env if j == i else EndsAtOnce(env) for j, env in enumerate(envs)]
        alone = script.evaluate(evaluated, company)
        assert [values[i] for values in alone] == [values[i] for values in together]
    assert len(set(together[0])) == len(envs)


@pytest.fixture
def side_stream():
    """Where recording needs its first calls; the default stream again afterwards."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


@gpu
@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graphed_run_agrees_with_an_eager_one(training_on, compiled, side_stream):
    """500 updates, critic alone and both in turn, to 1e-5; compiled, with other kernels, 20 updates' losses to 1e-3."""
    steps, tolerance = (20, 1e-3) if compiled else (500, 1e-5)
    runs = []
    for graphed in (False, True):
        training = training_on("cuda", cudagraphs=graphed, compile=graphed and compiled)
        _, learn = training.script.accelerated(training.agent, training.learn)
        torch.manual_seed(3)
        losses, batches = [], []
        for step in range(steps):
            loss, batch = learn(step % 2 == 0)
            losses.append(numbers(loss))
            batches.append(batch.obs.clone())
        runs.append((losses, batches, training.networks))
    (losses, batches, networks), (graphed_losses, graphed_batches, graphed_networks) = runs
    assert all(map(torch.equal, batches, graphed_batches)), "other indices sampled"
    for one, other in zip(losses, graphed_losses, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
    for one, other in zip(networks, graphed_networks, strict=True):
        if not compiled:
            torch.testing.assert_close(weights(one), weights(other), rtol=tolerance, atol=tolerance)


@gpu
@needs_gpu
def test_the_update_never_waits_for_the_device(training_on):
    training = training_on("cuda")
    training.explore(), training.learn()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            training.begin_episode(step), training.explore(), training.learn()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@needs_gpu
def test_graphed_acting_follows_the_observation_and_the_learning(training_on, side_stream):
    """The graph reads observation, weights and noise where they lie; they are restored before, as in main."""
    saved = training_on("cuda")
    for i in range(3):
        saved.begin_episode(i), saved.learn()
    training = training_on("cuda", cudagraphs=True)
    agent, obs = training.agent, np.random.default_rng(0).normal(size=(20, OBS_DIM))
    agent.load_state_dict(copy.deepcopy(saved.agent.state_dict()))
    perturbs = training.flags.get("noise") == "parameter"
    shrinks = "noise_anneal_steps" in training.flags and not perturbs
    agent.explore, learn = training.script.accelerated(agent, training.learn)
    for i, each in enumerate(obs):
        if i % 5 == 0:
            training.begin_episode(i)
        action = agent.act(each)
        tensor = torch.tensor(each[None], dtype=torch.float32, device=agent.device)
        greedy = agent.actor(tensor)[0].detach().cpu().numpy()
        if perturbs:
            expected = agent.actor.clip(agent.noise.perturbed(tensor))[0].detach().cpu()
            np.testing.assert_allclose(action, expected, atol=1e-6)
        if shrinks and i >= 10:  # to nothing
            np.testing.assert_allclose(action, greedy, atol=1e-6)
        else:
            assert np.abs(action - greedy).max() > 1e-6
        before = weights(agent.actor).clone()
        learn(True)
        assert not torch.equal(weights(agent.actor), before)


@gpu
@needs_gpu
def test_with_graphs_it_learns_pendulum_and_resumes(script, tmp_path):
    flags = ["--env-id", "Pendulum-v1", "--learning-starts", "1000", "--eval-interval", "5000", "--cudagraphs"]
    flags += ["--total-timesteps", "20000", "--checkpoint-interval", "10000", "--keep-checkpoint", "--run-name", "run"]
    flags += ["--final-eval-episodes", "10"]
    subprocess.run([sys.executable, ROOT / f"{script.SCRIPT}.py", *flags], cwd=tmp_path, check=True)
    score = json.loads((tmp_path / "runs/run/result.json").read_text())
    last = float((tmp_path / "runs/run/eval.csv").read_text().splitlines()[-1].split(",")[1])
    assert last > -250, score
    more = ["--resume", "runs/run", "--total-timesteps", "25000"]
    subprocess.run([sys.executable, ROOT / f"{script.SCRIPT}.py", *more], cwd=tmp_path, check=True)
    assert float((tmp_path / "runs/run/eval.csv").read_text().splitlines()[-1].split(",")[1]) > -250
