"""Kills both scripts at random moments, 20 times in each of two tasks, and compares what is left with whole runs.

python tests/soak.py [seed]
"""

import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from test_resume import PAPER, SMALL, TUNED, Run, outcome

KILLS = 20
RUNS = {
    "HalfCheetah-v5": "--total-timesteps 4000 --learning-starts 1000 --buffer-size 2500 --eval-interval 800",
    "Hopper-v5": "--total-timesteps 2500 --learning-starts 400 --buffer-size 1200 --eval-interval 300",
}


def soak(cwd: Path, script: Path, flags: str, rng: random.Random) -> str:
    start, reference = time.time(), cwd / "uninterrupted"
    reference.mkdir()
    assert Run(reference, script, flags).wait(3600).code == 0
    duration, run_dir, kills, writing, runs, steps = time.time() - start, cwd / "runs/x", 0, 0, 0, []
    while kills < KILLS:  # and again, until there were enough of them
        shutil.rmtree(run_dir, ignore_errors=True)
        while not (run_dir / "result.json").exists():
            process = Run(cwd, script, "--resume runs/x" if (run_dir / "args.json").exists() else flags)
            if kills < KILLS:
                time.sleep(rng.uniform(0.02, 0.3) * duration)
                os.kill(process.pid, signal.SIGKILL)
            ended = process.wait(3600)
            assert ended.code in (0, -signal.SIGKILL), ended.output
            kills += ended.code == -signal.SIGKILL
            writing += len(list(run_dir.glob("*.tmp")))
            checkpoint = run_dir / "checkpoint.pt"
            steps += [torch.load(checkpoint, weights_only=True)["global_step"]] if checkpoint.exists() else []
        assert outcome(run_dir) == outcome(reference / "runs/x")
        runs += 1
    return f"{kills} kills ({writing} while writing), {runs} runs, all the same bytes; resumed from {steps}"


if __name__ == "__main__":
    seed = int(sys.argv[1]) if sys.argv[1:] else random.randrange(10**6)
    rng = random.Random(seed)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports the rows that it hides
    print("seed", seed)
    for script in TUNED, PAPER:
        for env_id, flags in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                result = soak(Path(folder), script, f"{SMALL} --env-id {env_id} {flags}", rng)
            print(f"{script.stem}, {env_id}: {result}", flush=True)
