"""It learns: Pendulum-v1, two seeds at once, each in a process of its own with one thread."""

import math
import subprocess
import time

import pytest
from conftest import command, environment, eval_rows, paper, tuned

CASES = {  # sooner done than with the defaults: a smaller batch for the tuned script, greater steps for the paper's
    tuned: dict(total_timesteps=15_000, learning_starts=1000, batch_size=64),
    paper: dict(total_timesteps=10_000, learning_starts=500, actor_lr=1e-3, tau=0.01),
}
COMMON = dict(env_id="Pendulum-v1", buffer_size=20_000, eval_interval=500, eval_episodes=10, checkpoint_interval=0)


@pytest.mark.parametrize("script", CASES, ids=lambda script: script.SCRIPT)
def test_learns_pendulum_from_two_seeds(script, tmp_path):
    """Swinging up and standing costs 150 an episode, hanging about 1,200."""
    seeds = 1, 2
    flags = COMMON | CASES[script]
    runs = [
        subprocess.Popen(
            command(script, **flags, seed=seed, run_name=f"seed{seed}"),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
        )
        for seed in seeds
    ]
    means = [[], []]
    while any(process.poll() is None for process in runs):
        time.sleep(0.2)
        for i, process in enumerate(runs):
            if (tmp_path / f"runs/seed{seeds[i]}/eval.csv").exists():
                means[i] = [row["mean"] for row in eval_rows(tmp_path / f"runs/seed{seeds[i]}")]
            if max(means[i], default=-math.inf) > -200:
                process.terminate()  # it has learnt: leave the cores to the others
    assert all(max(each) > -200 for each in means), means
    assert all(each[0] < -500 for each in means), means  # that was no accident of the environment
