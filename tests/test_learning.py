"""Both scripts learn Pendulum-v1."""

import math
import subprocess
import time

import pytest
from conftest import command, environment, eval_rows, paper, tuned

CASES = {  # sooner done than with the defaults
    tuned: dict(total_timesteps=10_000, batch_size=32, learning_rate=2e-3),
    paper: dict(total_timesteps=10_000, batch_size=64, actor_lr=1e-3),
}
COMMON = dict(env_id="Pendulum-v1", tau=0.02, gamma=0.95, learning_starts=500, buffer_size=20_000)
COMMON |= dict(eval_interval=500, eval_episodes=5, checkpoint_interval=0, run_name="x")


def check_learns_pendulum(line: list[str], run_dir):
    """Swinging up and standing costs 150 an episode, hanging about 1,200."""
    run = subprocess.Popen(line, cwd=run_dir.parents[1], env=environment(), stdout=subprocess.DEVNULL)
    means = []
    while run.poll() is None:
        time.sleep(0.2)
        if (run_dir / "eval.csv").exists():
            means = [row["mean"] for row in eval_rows(run_dir)]
        if max(means, default=-math.inf) > -200:
            run.terminate()  # it has learnt
    assert max(means, default=-math.inf) > -200, means
    assert means[0] < -500, means  # that was no accident of the environment


@pytest.mark.parametrize("script", CASES, ids=lambda script: script.SCRIPT)
def test_learns_pendulum(script, tmp_path):
    check_learns_pendulum(command(script, **COMMON | CASES[script]), tmp_path / "runs/x")
