"""Small environments: scripted ones, where every number is known, and unsuitable ones. Used as stubs:EnvId."""

import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.spaces import Box, Dict, Discrete, Sequence

LOW, HIGH = np.array([-0.4, -3], np.float32), np.array([0.4, 1], np.float32)


class Point(gym.Env):
    """A point that starts anywhere in [-1, 1], is moved by the action, and is paid for being near 0, ten steps long."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None, obs=None, action=None, bad_reward=False):
        self.render_mode = render_mode
        self.observation_space = obs or Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = action or Box(-1, 1, (1,), np.float32)
        self.bad_reward, self.steps_in_all = bad_reward, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1), 0
        return np.array([self.x, self.t / 10], np.float32), {}

    def step(self, action):
        self.x += 0.3 * float(action[0])
        self.t += 1
        self.steps_in_all += 1
        bad = self.bad_reward and self.steps_in_all > 150  # training gets there, evaluation does not
        reward = np.nan if bad else -(self.x**2)
        return np.array([self.x, self.t / 10], np.float32), reward, False, self.t == 10, {}

    def render(self):
        return np.full((64, 64, 3), 127 + 100 * np.tanh(self.x), np.uint8)


class Scripted(gym.Env):
    """Observes (episode, step), pays 10 x episode + step, and ends its episodes as ENDINGS says, again and again."""

    ENDINGS = [(3, "truncated"), (2, "terminated"), (4, "both"), (1, "terminated"), (1, "truncated")]
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    made = []  # every instance since the list was last emptied; the first is the one that a run trains on

    def __init__(self, render_mode=None, size=64):
        self.render_mode, self.size = render_mode, size
        self.observation_space = Box(0, np.inf, (2,), np.float32)
        self.action_space = Box(LOW, HIGH)
        self.episode, self.actions, self.seeds = -1, [], []
        self.made.append(self)

    def observe(self):
        return np.array([self.episode, self.t], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        self.actions.append(np.array(action))
        reward = 10 * self.episode + self.t
        self.t += 1
        length, kind = self.ENDINGS[self.episode % len(self.ENDINGS)]
        over = self.t == length
        return self.observe(), reward, over and kind != "truncated", over and kind != "terminated", {}

    def render(self):
        """A picture with the episode in red, the step in green and a blue mark in the corner."""
        picture = np.full((self.size, self.size, 3), [self.episode, self.t, 0], np.uint8)
        picture[: self.size // 2, : self.size // 4, 2] = 200
        return picture


class InPlace(Scripted):
    """Hands out one and the same array every time, and overwrites the action it was given."""

    obs = np.zeros(2, np.float32)

    def observe(self):
        self.obs[:] = super().observe()
        return self.obs

    def step(self, action):
        result = super().step(action)
        action[:] = 99
        return result


class Unrendered(Point):
    metadata = {"render_modes": []}

    def __init__(self, render_mode=None):
        super().__init__(render_mode)

    def render(self):
        raise RuntimeError("no GL\nhere")


class RenderModeless(Point):
    """Takes no render_mode at all."""

    def __init__(self):
        super().__init__()


class Waiting(PendulumEnv):
    """Waits at its 300th step while there is a file named hold and the run has not been asked to stop."""

    steps = 0

    def step(self, action):
        self.steps += 1
        handler = signal.getsignal(signal.SIGTERM)  # a run puts the earlier one back when a signal has come
        while self.steps >= 300 and Path("hold").exists() and signal.getsignal(signal.SIGTERM) == handler:
            time.sleep(0.01)
        return super().step(action)


UNSUITABLE = {
    "DiscreteAction": dict(action=Discrete(3)),
    "IntegerAction": dict(action=Box(0, 5, (2,), np.int64)),
    "DictAction": dict(action=Dict(a=Box(-1, 1, (1,)))),
    "UnboundedAction": dict(action=Box(-np.inf, np.inf, (1,), np.float32)),
    "HalfBoundedAction": dict(action=Box(-1, np.inf, (1,), np.float32)),
    "HugeAction": dict(action=Box(-3e38, 3e38, (1,), np.float32)),
    "PointAction": dict(action=Box(np.float32([0, 1]), np.float32([1, 1]))),
    "MatrixAction": dict(action=Box(-1, 1, (2, 2), np.float32)),
    "NumberAction": dict(action=Box(-1, 1, (), np.float32)),
    "SequenceObs": dict(obs=Sequence(Box(-1, 1, (1,)))),
    "ImageObs": dict(obs=Box(0, 255, (64, 64, 3), np.uint8)),
    "FloatImageObs": dict(obs=Box(0, 255, (64, 64, 3), np.float32)),
}
for name, kwargs in UNSUITABLE.items():
    gym.register(f"{name}-v0", Point, kwargs=kwargs)
gym.register("Point-v0", Point)
gym.register("NanReward-v0", Point, kwargs=dict(bad_reward=True))
gym.register("Scripted-v0", Scripted)
gym.register("InPlace-v0", InPlace, disable_env_checker=True)  # it would warn of this
gym.register("Unrendered-v0", Unrendered)
gym.register("Waiting-v0", Waiting, max_episode_steps=200)
gym.register("RenderModeless-v0", RenderModeless)
