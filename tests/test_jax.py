"""The agent in JAX against the PyTorch script's, and its runs on the same protocol."""

import hashlib
import json
import re
import signal
import sys
import tomllib

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, eval_rows, model, process, tuned
from test_benchmark import run_report
from test_resume import KILL, PENDULUM, outcome, renaming
from test_resume import run as run_process

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install -r benchmark/requirements-jax.txt")
sys.path.insert(0, str(ROOT / "benchmark"))
import jax_ddpg  # noqa: E402

SCRIPT = ROOT / "benchmark/jax_ddpg.py"
OBS_DIM, LOW, HIGH = 5, np.float32([-1, -0.4, 0]), np.float32([1, 0.4, 2.5])
SPACES = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,)), gym.spaces.Box(LOW, HIGH)
NETWORKS = "actor", "qf", "target_actor", "target_qf"


def agent(script=jax_ddpg, **flags):
    return script.DDPG(script.Args(**flags), *SPACES, CPU)


def random_rows(n=32) -> np.ndarray:
    """A batch as the replay buffer holds it, with a fifth of terminal states."""
    action = np.random.default_rng(n).uniform(LOW, HIGH, (n, len(LOW)))
    discount = 0.99 * (torch.rand(n, 1) > 0.2)
    parts = [torch.randn(n, OBS_DIM), torch.tensor(action), torch.randn(n, 1), torch.randn(n, OBS_DIM), discount]
    return torch.cat(parts, 1).float().numpy()


def torch_batch(rows) -> tuned.Batch:
    parts = torch.tensor(rows).split([OBS_DIM, len(LOW), 1, OBS_DIM, 1], 1)
    return tuned.Batch(*(part.squeeze(1) if part.shape[1] == 1 else part for part in parts))


def parameters(network) -> dict:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


# The same algorithm


@pytest.mark.parametrize("flags", [{}, dict(policy_frequency=2, learning_rate=1e-3, tau=0.1)], ids=str)
def test_ten_updates_are_the_torch_scripts(flags):
    """All that is logged, the parameters of all four networks, and both moments of both optimisers."""
    mine, torchs = agent(**flags), agent(tuned, **flags, matmul="mkl")
    mine.load_state_dict({name: parameters(getattr(torchs, name)) for name in NETWORKS})
    first = mine.state_dict()
    for i in range(10):
        rows, update_actor = random_rows(), i % mine.args.policy_frequency == 0
        for one in mine, torchs:
            one.act(np.ones(OBS_DIM))
        logged = mine.update(rows, update_actor) | mine.diagnostics(rows)
        expected = torchs.update(torch_batch(rows), update_actor) | torchs.diagnostics(torch_batch(rows))
        logged, expected = ({tag: float(value) for tag, value in each.items()} for each in (logged, expected))
        differences = [each.pop("charts/exploration_difference") for each in (logged, expected)]
        assert logged == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert 0 < min(differences) and max(differences) < 0.5  # each has noise of its own

    state = mine.state_dict()
    for name in NETWORKS:
        expected = parameters(getattr(torchs, name))
        assert mine.state[name].keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(state[name][key], value, rtol=0, atol=1e-5, err_msg=f"{name}.{key}")
        assert max((first[name][key] - value).abs().max() for key, value in expected.items()) > 5e-5  # it has learnt
    for name in "actor", "qf":
        optimizer, names = getattr(torchs, f"{name}_optimizer"), list(parameters(getattr(torchs, name)))
        steps, *moments = state[f"{name}_optimizer"].values()
        theirs = optimizer.state_dict()["state"]
        assert steps == theirs[0]["step"]
        for found, moment in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
            expected = torch.cat([theirs[names.index(each)][moment].flatten() for each in sorted(names)])
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_initial_weights_are_distributed_as_torchs():
    mine, torchs = agent(), agent(tuned)
    state, other = mine.state_dict(), agent(seed=2).state_dict()
    for name in "actor", "qf":
        for key, expected in parameters(getattr(torchs, name)).items():
            bound = getattr(getattr(torchs, name), key.split(".")[0]).in_features ** -0.5
            found = state[name][key]
            assert found.shape == expected.shape and found.dtype == expected.dtype
            assert found.abs().max() <= bound and not torch.equal(found, other[name][key])
            if found.numel() > 200:
                assert found.abs().max() > 0.95 * bound
                assert found.std() == pytest.approx(bound / 3**0.5, rel=0.15) and found.mean().abs() < 0.15 * bound
        assert all(torch.equal(state[name][key], value) for key, value in state[f"target_{name}"].items())


def test_exploration_noise_is_normal_in_halves_of_the_range_and_clipped_to_it():
    mine, obs = agent(exploration_noise=0.01), np.zeros(OBS_DIM)
    greedy = mine.actor(torch.zeros(1, OBS_DIM)).numpy()[0]
    noise = np.array([mine.act(obs) - greedy for _ in range(3000)]) / ((HIGH - LOW) / 2)
    assert noise.std(0) == pytest.approx([0.01] * 3, rel=0.1) and np.abs(noise.mean(0)).max() < 1e-3
    assert np.abs(np.corrcoef(noise[:-1].T, noise[1:].T)).max(where=~np.eye(6, dtype=bool), initial=0) < 0.1
    loud = agent(exploration_noise=1.0)
    actions = np.array([loud.act(obs) for _ in range(300)])
    assert (actions.min(0) == LOW).all() and (actions.max(0) == HIGH).all() and actions.dtype == np.float32


def test_the_replay_buffer_holds_the_last_rows_and_samples_all_of_them():
    np.random.seed(0)
    buffer = jax_ddpg.ReplayBuffer(4, 2, 1, CPU)
    for i in range(6):
        buffer.add(np.array([i, i]), np.array([-i]), 10.0 * i, np.array([i + 1, i + 1]), 0.99)
    rows = buffer.sample(200)
    assert rows.shape == (200, 7) and rows.dtype == np.float32
    last = [[i, i, -i, 10 * i, i + 1, i + 1, np.float32(0.99)] for i in (2, 3, 4, 5)]
    np.testing.assert_allclose(np.unique(rows, axis=0), last)


# Runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("whole")
    ended = run_process(cwd, SCRIPT, PENDULUM)
    assert ended.code == 0, ended.output
    return cwd / "runs/x"


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, whole):
    assert run_process(tmp_path, SCRIPT, PENDULUM, renaming("checkpoint.pt", 3, KILL)).code == -signal.SIGKILL
    checkpoint = torch.load(tmp_path / "runs/x/checkpoint.pt", weights_only=True)
    assert checkpoint["script"] == "jax_ddpg" and checkpoint["global_step"] == 400
    held = renaming("eval.csv", 1, "print('held:', 'checkpoint.pt' in open('/proc/self/maps').read())")
    ended = run_process(tmp_path, SCRIPT, "--resume runs/x", held)
    assert ended.code == 0 and "held: False" in ended.output, ended.output
    assert outcome(tmp_path / "runs/x") == outcome(whole)


def test_a_run_is_recorded_evaluated_and_reported(whole, cli, capsys):
    record = json.loads((whole / "args.json").read_text())
    assert record["script"] == model(whole)["script"] == "jax_ddpg" and "jax" in record["versions"]
    assert record["sha256"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert record["defaults"]["matmul"] == "XLA"
    cli(jax_ddpg, "--evaluate", whole)
    assert f" {eval_rows(whole)[-1]['mean']:.2f} ± " in capsys.readouterr().out
    made = run_report(whole, "--out", "report")
    assert made.returncode == 0 and "| Pendulum-v1 | 700 | 1 |" in made.stdout, made


def test_its_model_is_loaded_by_it_and_by_torchs_networks(whole, refused, monkeypatch):
    obs_space, action_space = (gym.spaces.Box(-2, 2, (n,)) for n in (3, 1))
    bounds = torch.tensor([[-2.0], [2.0]])
    torchs = {"actor": tuned.Actor(3, *bounds), "qf": tuned.QNetwork(3, *bounds)}
    contents, mine = model(whole), jax_ddpg.DDPG(jax_ddpg.Args(seed=5), obs_space, action_space, CPU)
    monkeypatch.setattr(tuned, "SCRIPT", "jax_ddpg")
    tuned.load_model(mine, whole)  # as --warm-start does
    line = refused(tuned.load_model, jax_ddpg.DDPG(jax_ddpg.Args(), SPACES[0], action_space, CPU), whole)
    assert "does not fit this environment and these flags: fc1.weight is (256, 3), not (256, 5)" in line
    obs, action = torch.randn(9, 3), torch.rand(9, 1)
    for name, inputs in ("actor", [obs]), ("qf", [obs, action]):
        torchs[name].load_state_dict(contents[name])
        np.testing.assert_allclose(getattr(mine, name)(*inputs), torchs[name](*inputs).detach(), rtol=1e-5, atol=1e-6)
        for key, value in mine.state[f"target_{name}"].items():  # or training on would begin with others
            np.testing.assert_array_equal(value, contents[name][key])


# One thread, flags, what it is made of


THREADS = f"""
import sys, time
sys.path[:0] = [{str(ROOT / "benchmark")!r}]
import gymnasium, jax_ddpg, numpy as np

spaces = gymnasium.spaces.Box(-np.inf, np.inf, (5,)), gymnasium.spaces.Box(-1, 1, (3,))
agent, rows = jax_ddpg.DDPG(jax_ddpg.Args(num_threads=1), *spaces, None), np.random.rand(256, 15).astype(np.float32)
def learn(times):
    for i in range(times):
        agent.act(np.zeros(5))
        agent.update(rows, i % 3 > 0)
learn(10)
process, main = time.process_time(), time.thread_time()
while time.thread_time() - main < 0.5:
    learn(50)
print((time.process_time() - process) / (time.thread_time() - main))
"""


def test_one_thread_is_one_thread(tmp_path):
    """XLA has pools of its own, and more than one way to use them."""
    done = process([sys.executable, "-c", THREADS], tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0.98 < float(done.stdout) < 1.02


NOT_FOR_IT = """--noise ou|--noise parameter|--layer-norm both|--n-step 3|--target-noise 0.2|--target-noise-clip 1|\
--ou-theta 1|--ou-dt 0.01|--noise-anneal-steps 10|--exploration-noise-final 1|--compile|--cudagraphs|--matmul mkl|\
--cuda|--no-torch-deterministic"""


@pytest.mark.parametrize("flags", NOT_FOR_IT.split("|"))
def test_flags_that_are_not_for_it_are_refused(flags, cli, refused, tmp_path):
    line = refused(cli, jax_ddpg, *flags.split())
    assert line.startswith(f"error: {flags.split()[0].replace('--no-torch', '--torch')} is not for jax_ddpg.py")
    assert not list(tmp_path.iterdir())


def test_inline_metadata_is_in_step():
    def dependencies(path):
        block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", path.read_text())[1]
        return tomllib.loads(re.sub(r"(?m)^# ?", "", block))["dependencies"]

    pins = (ROOT / "benchmark/requirements-jax.txt").read_text().split("\n")
    pins = [line for line in pins if line and not line.startswith("#")]
    assert dependencies(SCRIPT) == dependencies(ROOT / "ddpg_continuous_action.py") + pins
