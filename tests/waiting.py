"""waiting:Waiting-v0 is Pendulum-v1, but the run with seed 2 waits at the step that a file named hold contains.

It waits in the run's working directory, until the file is gone or the run is asked to stop. With it, a test kills a run
at a known place, however fast the machine is.
"""

import math
import signal
import time
from pathlib import Path

import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv


def held_from() -> float:
    try:
        return int(Path("hold").read_text())
    except FileNotFoundError:  # asking first would be a race with the test that removes it
        return math.inf


def handlers() -> list:
    """A run's, until a signal has come: then it puts back the one that was there before."""
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


class Waiting(PendulumEnv):
    waits, steps = False, 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.handlers = handlers()
            self.waits = seed == 2  # a run's first episode has the run's own seed, its evaluations have larger ones
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.steps += 1
        while self.waits and self.steps >= held_from() and handlers() == self.handlers:
            time.sleep(0.01)
        return super().step(action)


gym.register("Waiting-v0", Waiting, max_episode_steps=200)
