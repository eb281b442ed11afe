"""--compile: the whole update as one graph, which follows the eager one up to rounding and resumes exactly."""

import signal

import pytest
import torch
from conftest import CPU, agent, command, felt_weights, paper, process, random_batch, tuned
from test_copying import changed
from test_resume import PENDULUM, TUNED, before, outcome, run, send

CASES = {
    "tuned": (tuned, {}),
    "with what can be added": (tuned, dict(noise="parameter", layer_norm="both", target_noise=0.2)),
    "paper": (paper, dict(batch_norm="both")),
}
PENDULUM_STEP = "gymnasium.envs.classic_control.pendulum.PendulumEnv.step"


def after_11_updates(script, **flags):
    """An agent after 11 updates, two of them of the critic alone, and what the last one logs."""
    torch.manual_seed(0)
    learner, buffer = agent(script, **flags), script.ReplayBuffer(200, 3, 1, CPU)
    for obs, action, reward, next_obs, discount in zip(*random_batch(script, n=200), strict=True):
        buffer.add(obs, action, float(reward), next_obs, float(discount))

    def learn(update_actor):
        batch = buffer.sample(32)
        return learner.update(batch, update_actor), batch

    _, learn = script.accelerated(learner, buffer, learn)
    return learner, [learn(step % 5 != 4)[0] for step in range(11)][-1]


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_update_follows_the_eager_one(case):
    script, flags = CASES[case]
    eager, expected = after_11_updates(script, **flags)
    compiled, logged = after_11_updates(script, compile=True, **flags)
    rounding = 2e-5 if script is tuned else 2e-4  # the paper's first gradients are as small as Adam's epsilon
    for name in "actor", "qf", "target_actor", "target_qf":
        one, other = felt_weights(getattr(eager, name)), felt_weights(getattr(compiled, name))
        assert (one - other).abs().max() < rounding * one.abs().max(), name
    for tag, value in expected.items():
        assert float(logged[tag]) == pytest.approx(float(value), rel=1e-3), tag
    for name, updates in ("actor_optimizer", 9), ("qf_optimizer", 11):
        one, other = (getattr(each, name).state_dict()["state"] for each in (eager, compiled))
        assert one.keys() == other.keys() and float(one[0]["step"]) == float(other[0]["step"]) == updates


def test_a_compiled_run_resumes_to_the_same_bytes_in_another_process(tmp_path):
    """Stopped at step 500, with a checkpoint of step 400 and updates from step 301 on."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    flags = f"{PENDULUM} --compile"
    ended = run(whole, TUNED, flags)
    assert ended.code == 0, ended.output
    ended = run(stopped, TUNED, flags, before(PENDULUM_STEP, 500 + 2 * 2 * 200, send(signal.SIGTERM)))
    assert ended.code == 128 + signal.SIGTERM and "goes on from step 400" in ended.output, ended.output
    ended = run(stopped, TUNED, "--resume runs/x")
    assert ended.code == 0, ended.output
    assert outcome(stopped / "runs/x") == outcome(whole / "runs/x")


def test_without_a_compiler_it_says_so_before_training(tmp_path):
    done = process(command(tuned, compile=True, cuda=False), tmp_path, CXX="/no/such/compiler")
    assert done.returncode == 2 and "error: --compile needs a C++ compiler, such as g++" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("runs/*"))


def test_an_update_that_is_no_single_graph_is_named_with_the_way_out(tmp_path):
    """A copy that looks at a number within its update."""
    look = "        losses = {"
    (tmp_path / "mine.py").write_text(changed(tuned, {look: f"        print(qf_loss.item() > 0)\n{look}"}))
    ended = run(tmp_path, tmp_path / "mine.py", f"{PENDULUM} --compile")
    assert ended.code == 1 and "Traceback" not in ended.output, ended.output
    last = ended.output.strip().splitlines()[-1]
    assert last.startswith("error: --compile cannot make this update one graph (") and "leave it away" in last
