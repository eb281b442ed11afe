"""The GPU path: what must hold without a GPU too, and, marked gpu, what only a GPU can show."""

import contextlib
import copy
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, eval_rows, paper, tuned, weights
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
        self.buffer, rng = script.ReplayBuffer(1000, OBS_DIM, ACTION_DIM, device), np.random.default_rng(seed)
        for _ in range(200):
            obs, next_obs = rng.normal(size=(2, OBS_DIM))
            self.buffer.add(obs, rng.uniform(-1, 1, ACTION_DIM), rng.normal(), next_obs, rng.choice([0, 0.99]))

        def learn(update_actor=True):
            batch = self.buffer.sample(BATCH_SIZE)
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


@pytest.fixture
def graphed(script, monkeypatch):
    """A training, its graphed function, the graphs (stand-ins for torch's) and the calls of what is in them."""
    graphs, recording, calls = [], [], []

    class Graph:
        replays = 0

        def replay(self):
            self.replays += 1

    @contextlib.contextmanager
    def record(graph):
        graphs.append(graph)
        recording.append(True)
        yield
        recording.pop()

    def function(argument):
        calls.append((argument, bool(recording)))
        return object()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    training = Training(script)
    training.agent.schedule = 1.0  # as a copy may add
    return training, script.cuda_graphed(function, training.agent, training.buffer), graphs, calls


def test_a_graphed_function_runs_warms_up_records_once_and_replays_per_argument(graphed):
    _, call, graphs, calls = graphed
    eager = [call("a") for _ in range(3)]
    assert calls == [("a", False)] * 3 and len(set(map(id, eager))) == 3 and not graphs
    recorded = call("a")
    assert calls[3:] == [("a", True)] and graphs[0].replays == 1
    assert call("a") is recorded and graphs[0].replays == 2 and len(calls) == 4
    for _ in range(4):
        call("b")
    assert len(graphs) == 2 and graphs[1].replays == 1 and graphs[0].replays == 2


def test_a_number_that_an_update_may_read_has_a_graph_for_each_value(graphed):
    """Not for each transition that is added to the buffer."""
    training, call, graphs, calls = graphed
    noise, optimizer = training.agent.noise, training.agent.qf_optimizer

    def repeat():
        for _ in range(5):
            training.buffer.add(np.zeros(OBS_DIM), np.zeros(ACTION_DIM), 0.0, np.zeros(OBS_DIM), 0.0)
            call("a")

    optimizer.load_state_dict(optimizer.state_dict())  # as in a resumed run
    repeat()
    training.agent.schedule = 2.0
    repeat()
    noise.training = False
    repeat()
    optimizer.param_groups[0]["lr"] = 0.5
    repeat()
    assert [graph.replays for graph in graphs] == [2] * 4 and len(calls) == 4 * 4
    training.agent.schedule, noise.training = 1.0, True
    optimizer.param_groups[0]["lr"] = 1e-3
    repeat()
    assert [graph.replays for graph in graphs] == [7, 2, 2, 2] and len(calls) == 4 * 4


def test_a_number_that_keeps_changing_ends_graphing_with_one_warning(graphed, capsys):
    training, call, graphs, calls = graphed
    for _ in range(4):
        call("a")
    for i in range(40):
        training.agent.schedule = 2.0 + i
        call("a")
    training.agent.schedule = 1.0
    call("a")
    assert len(calls) == 4 + 40 + 1 and not calls[-1][1] and graphs[0].replays == 1
    out = capsys.readouterr()
    assert (out.out + out.err).count("warning: no CUDA graphs from here on") == 1


def test_what_cannot_be_recorded_ends_graphing_with_one_warning(graphed, monkeypatch, capsys):
    _, call, graphs, calls = graphed

    @contextlib.contextmanager
    def refuse(graph):
        yield
        raise RuntimeError("CUDA error: operation not permitted\nand more")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    for _ in range(6):
        call("a")
    assert [argument for argument, _ in calls] == ["a"] * 7 and not graphs  # the fourth was tried, and then run
    lines = capsys.readouterr().err.splitlines()
    why = "an update cannot be recorded (CUDA error: operation not permitted)"
    assert lines == [f"warning: no CUDA graphs from here on: {why}"]


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
        _, learn = training.script.accelerated(training.agent, training.buffer, training.learn)
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
    agent.explore, learn = training.script.accelerated(agent, training.buffer, training.learn)
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
    flags = "--env-id Pendulum-v1 --learning-starts 1000 --eval-interval 5000 --final-eval-episodes 10 --cudagraphs "
    flags += "--total-timesteps 20000 --checkpoint-interval 10000 --keep-checkpoint --run-name run"
    for line in flags, "--resume runs/run --total-timesteps 25000":
        subprocess.run([sys.executable, ROOT / f"{script.SCRIPT}.py", *line.split()], cwd=tmp_path, check=True)
        assert eval_rows(tmp_path / "runs/run")[-1]["mean"] > -250
