"""MountainCarContinuous-v0 with observations rescaled to [-1, 1], for --env-id mountain_car:RescaledMountainCar-v0.

    PYTHONPATH=benchmark python ddpg_continuous_action.py --env-id mountain_car:RescaledMountainCar-v0

As it comes, the velocity is at most 0.07 where the position reaches 1.2: a network with perturbed parameters barely
responds to it, and a car that is driven by its position alone never gains energy.
"""

import gymnasium as gym

gym.register(
    "RescaledMountainCar-v0",
    "gymnasium.envs.classic_control.continuous_mountain_car:Continuous_MountainCarEnv",
    max_episode_steps=999,
    additional_wrappers=(gym.wrappers.RescaleObservation.wrapper_spec(min_obs=-1.0, max_obs=1.0),),
)
