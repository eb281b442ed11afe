"""What the tuned script can explore with, by hand; the other noises are in test_algorithm.py and test_paper.py."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import HALF_RANGE, HIGH, LOW, agent, model, numpy, randomize, scalars, tuned, weights


def with_parameter_noise(**flags):
    flags = dict(noise="parameter", layer_norm="both", exploration_noise=0.2) | flags
    explorer = agent(tuned, 3, LOW, HIGH, **flags)
    randomize(explorer.actor)
    return explorer


# Parameter noise


def test_perturbed_weights():
    """The actor's plus N(0, sigma^2), other ones in each episode; its normalisations' and the actor itself stay."""
    explorer = with_parameter_noise()
    before, noises = weights(explorer.actor), []
    for sigma in 0.2, 0.2, 0.7:
        explorer.noise.sigma.fill_(sigma)
        explorer.noise.reset()
        perturbed, noise = dict(explorer.noise.perturbed.named_parameters()), []
        for name, parameter in explorer.actor.named_parameters():
            if "norm" in name:
                assert torch.equal(perturbed[name], parameter)
            else:
                noise.append((perturbed[name] - parameter).flatten())
        noises.append(torch.cat(noise))
        assert noises[-1].std().item() == pytest.approx(sigma, rel=0.02)
        assert noises[-1].mean().item() == pytest.approx(0, abs=0.02 * sigma)
        assert all(part.std() > 0.5 * sigma for part in noise if len(part) > 2)  # biases too
    assert abs(torch.corrcoef(torch.stack(noises[:2]))[0, 1]) < 0.02
    assert torch.equal(weights(explorer.actor), before)


def test_an_episode_is_acted_by_the_perturbed_actor():
    explorer, obs = with_parameter_noise(exploration_noise=0.5), np.float32([0.3, -2.0, 5.0])
    explorer.noise.reset()
    first = explorer.act(obs)
    greedy, perturbed = (numpy(net(torch.tensor(obs[None])))[0] for net in (explorer.actor, explorer.noise.perturbed))
    np.testing.assert_allclose(first, perturbed, atol=1e-6)
    assert (first != greedy).all() and (explorer.act(obs) == first).all()  # no other noise
    explorer.noise.reset()
    assert (explorer.act(obs) != first).all()


@pytest.mark.parametrize("sigma, factor", [(0.001, 1.01), (0.7, 1 / 1.01)])
def test_sigma_follows_the_distance(sigma, factor):
    """sqrt(mean of ((mu - perturbed mu) / half range)^2), by a perturbation of its own, against the target 0.2."""
    explorer, obs = with_parameter_noise(), torch.randn(16, 3)
    assert explorer.noise.sigma.item() == pytest.approx(0.2)  # at first
    explorer.noise.reset()
    acting = weights(explorer.noise.perturbed)
    explorer.noise.sigma.fill_(sigma)
    explorer.noise.adapt(obs)
    noise = weights(explorer.noise.probe) - weights(explorer.actor)
    assert noise[noise != 0].std().item() == pytest.approx(sigma, rel=0.02)
    moved = (numpy(explorer.noise.probe(obs)) - numpy(explorer.actor(obs))) / HALF_RANGE
    distance = np.sqrt(np.mean(moved**2))
    assert (distance < 0.2) == (factor > 1)
    assert explorer.noise.distance.item() == pytest.approx(distance, rel=1e-4)
    assert explorer.noise.sigma.item() == pytest.approx(sigma * factor, rel=1e-6)
    assert torch.equal(weights(explorer.noise.perturbed), acting)  # the episode goes on as it was

    target = torch.mul(explorer.noise.distance, explorer.actor.action_scale)  # moved, as by annealing, beyond
    explorer.noise.scale.copy_(target * (0.5 if factor > 1 else 2))
    explorer.noise.adapt(obs)
    assert explorer.noise.sigma.item() == pytest.approx(sigma, rel=1e-6)


def test_a_run_with_parameter_noise(run, made):
    """Adapted every 50 steps of learning, and logged."""
    agents = made(tuned, "DDPG")
    run_dir = run(tuned, noise="parameter", layer_norm="actor", eval_interval=50)
    sigma, distance = (scalars(run_dir)[f"charts/parameter_noise_{name}"] for name in ("sigma", "distance"))
    assert [step for step, _ in sigma] == [50, 100, 120]
    sigmas = [0.1, *(value for _, value in sigma)]
    for old, new in pairwise(sigmas[:3]):
        assert min(abs(new / old - 1.01), abs(old / new - 1.01)) < 1e-5
    assert sigmas[3] == sigmas[2] and distance[-1][1] == pytest.approx(agents[0].noise.distance.item())
    assert not [name for name in model(run_dir) if "noise" in name]  # which acting without exploration doesn't need


# Annealing


@pytest.mark.parametrize("noise", ["gaussian", "ou", "parameter"])
def test_annealing_by_hand(noise):
    """From 0.3 to 0.1 in 200 steps; both end with halves of the range as their unit."""
    flags = dict(exploration_noise=0.3, exploration_noise_final=0.1, noise_anneal_steps=200)
    explorer = agent(tuned, 3, LOW, HIGH, noise=noise, **flags)
    np.testing.assert_allclose(explorer.noise.scale, 0.3 * HALF_RANGE, rtol=1e-6)
    for step, size in (0, 0.3), (50, 0.25), (200, 0.1), (10_000, 0.1):
        explorer.anneal_noise(step)
        np.testing.assert_allclose(explorer.noise.scale, size * HALF_RANGE, rtol=1e-5)
    assert torch.equal(explorer.actor.action_scale, torch.tensor([0.4, 2.0]))
