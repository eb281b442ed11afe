"""What people run into: environments, wrappers and copies that are not as in the textbook, and notebooks."""

import dataclasses
import hashlib
import importlib.machinery
import json
import pathlib
import random
import re
import shutil
import signal
import sys
import threading
import types
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import people_stubs
import pytest
import torch
from conftest import CPU, agent, eval_rows, model, paper, process, scalars, tuned
from people_stubs import Walk

SHORT = dict(  # eight episodes, four of them with random actions; it evaluates and saves after four and at the end
    env_id="people_stubs:Walk-v0",
    total_timesteps=40,
    learning_starts=20,
    batch_size=8,
    buffer_size=40,
    eval_interval=20,
    checkpoint_interval=20,
    cuda=False,
)


@pytest.fixture(autouse=True)
def made():
    """The environments of one test."""
    Walk.made.clear()
    return Walk.made


@pytest.fixture
def short(run, made):
    def short(script, **flags):
        made.clear()
        return run(script, **SHORT | flags)

    return short


@pytest.fixture
def twist(monkeypatch):
    """twist(f): from now on, f(walk, obs, reward) makes what a step returns of what it would return."""
    return lambda f: monkeypatch.setattr(Walk, "twist", f)


@pytest.fixture
def broken_off(short, monkeypatch):
    """broken_off(script, step, flag=value, ...) is the folder of a run that failed at this step."""

    def broken_off(script, step, **flags):
        def fail(walk, obs, reward):
            if walk.training() and len(walk.actions) == step:
                raise RuntimeError("broken off")
            return obs, reward

        with monkeypatch.context() as during:
            during.setattr(Walk, "twist", fail)
            with pytest.raises(RuntimeError, match="broken off"):
                short(script, **flags)
        return Path("runs", flags.get("run_name", "tiny")).resolve()

    return broken_off


@pytest.fixture
def refused(capsys):
    """refused(f, ...) is the one line with which this call exits with code 2."""

    def refused(function, *args, **flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            function(*args, **flags)
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (ended.value, lines)
        return lines[0]

    return refused


def error_of(function, *args, **flags) -> str:
    """The one line with which this call exits with code 1: Python prints it."""
    with pytest.raises(SystemExit) as ended:
        function(*args, **flags)
    assert isinstance(ended.value.code, str) and len(ended.value.code.splitlines()) == 1, ended.value.code
    return ended.value.code


def resume(script, run_dir: Path, **changes):
    Walk.made.clear()
    script.main(script.args_of(str(run_dir), **changes))


def evaluate(script, run_dir: Path, **changes):
    Walk.made.clear()
    script.main(script.args_of(str(run_dir), evaluate=True, **changes))


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# Random generators: an environment may use and seed whatever it likes


def generators(env: gym.Env | None = None) -> list:
    own = [env.np_random, env.action_space.np_random] if env else []
    states = [np.random.get_state(legacy=False), *(rng.bit_generator.state for rng in own)]
    return [random.getstate(), torch.get_rng_state().tolist(), json.dumps(states, default=np.ndarray.tolist)]


WITHOUT = dict(eval_interval=0, final_eval_episodes=0, eval_episodes=1)
EVALUATING = {
    "evaluations": dict(eval_interval=10),
    "the final evaluation": dict(final_eval_episodes=3),
    "films": dict(eval_interval=20, capture_video=True),
}


@pytest.mark.parametrize("evaluating, env", [*((name, "Seeder") for name in EVALUATING), ("evaluations", "Normal")])
def test_evaluating_leaves_the_random_generators_as_they_were(script, evaluating, env, short, twist, made):
    """At each step of training they are as they would be without, and when it has ended."""
    seen = []

    def look(walk, obs, reward):
        if walk.training():
            seen.append(generators(walk))
        return obs, reward

    twist(look)
    for name, flags in ("without", WITHOUT), ("with", WITHOUT | EVALUATING[evaluating]):
        run_dir = short(script, env_id=f"people_stubs:{env}-v0", run_name=name, **flags)
        seen.append(generators(made[0]))
        assert len(set(made[0].starts)) == len(made[0].starts) == 8
    assert len(seen) == 2 * 41 and seen[:41] == seen[41:]
    assert len([*run_dir.glob("videos/*.mp4")]) == (2 if evaluating == "films" else 0)


@pytest.mark.parametrize("env, render", [("ConstructorDraws", False), ("ConstructorSeeds", False), ("Seeder", True)])
def test_making_an_environment_leaves_the_random_generators_as_they_were(script, env, render):
    args = script.Args(env_id=f"people_stubs:{env}-v0")
    people_stubs.seed_globally(3)
    before = generators()
    script.make_env(args, render=render)
    assert generators() == before


# What people add to the replay buffer


def with_priorities(script):
    class Prioritised(script.ReplayBuffer):
        def __init__(self, capacity, *args):
            super().__init__(capacity, *args)
            self.priorities, self.beta = torch.zeros(capacity), 0.4

        def add(self, obs, action, reward, next_obs, discount):
            super().add(obs, action, reward, next_obs, discount)
            self.priorities[(self.added - 1) % len(self.priorities)] = 1 + reward
            self.beta += 0.01

    return Prioritised


def test_what_is_added_to_the_replay_buffer_survives_resuming(script, short, broken_off, monkeypatch):
    monkeypatch.setattr(script, "ReplayBuffer", with_priorities(script))
    whole = short(script, run_name="whole", keep_checkpoint=True)
    resumed = broken_off(script, 30, keep_checkpoint=True)
    resume(script, resumed)
    one, other = checkpoint(whole), checkpoint(resumed)
    assert same(one["buffer"], other["buffer"]) and same(one["agent"], other["agent"])
    assert one["buffer"]["priorities"].tolist() == [1, 2, 3, 4, 5] * 8 and one["buffer"]["beta"] == pytest.approx(0.8)


@pytest.mark.parametrize("part", ["ReplayBuffer", "DDPG"])
def test_what_cannot_be_saved_is_refused_at_the_start(script, part, short, refused, monkeypatch, made):
    class Mine(getattr(script, part)):
        def __init__(self, *args):
            super().__init__(*args)
            self.dice = np.random.default_rng(0)

    monkeypatch.setattr(script, part, Mine)
    line = refused(short, script)
    assert "dice of Mine, a Generator" in line
    assert not Path("runs").exists() and not made[0].actions


def test_what_cannot_be_saved_and_first_appears_in_update_is_refused_right_after_it(
    script, short, refused, monkeypatch, made
):
    class Mine(script.DDPG):
        def update(self, *args):
            self.dice = np.random.default_rng(0)
            return super().update(*args)

    monkeypatch.setattr(script, "DDPG", Mine)
    assert "dice of Mine, a Generator" in refused(short, script, checkpoint_interval=0)
    assert len(made[0].actions) == SHORT["learning_starts"] + 1


# Reward wrappers


class Twice(gym.Wrapper):
    """Repeats each action."""

    def step(self, action):
        total, steps, over = 0.0, 0, False
        while steps < 2 and not over:
            obs, reward, terminated, truncated, info = self.env.step(action)
            total, steps, over = total + reward, steps + 1, terminated or truncated
        return obs, total, terminated, truncated, info


def tenfold(env, args):
    return gym.wrappers.TransformReward(env, lambda reward: 10 * reward)


WRAPS = {  # and the rewards that are learnt from
    "a factor": (tenfold, {0, 10, 20, 30, 40}),
    "an action repeat": (lambda env, args: Twice(env), {0 + 1, 2 + 3, 4}),
    "a factor within an action repeat": (lambda env, args: Twice(tenfold(env, args)), {10, 50, 40}),
    "a factor around an action repeat": (lambda env, args: tenfold(Twice(env), args), {10, 50, 40}),
}


@pytest.mark.parametrize("wrap, learnt", WRAPS.values(), ids=WRAPS)
def test_evaluations_score_the_environments_own_reward(script, wrap, learnt, short, capsys, monkeypatch):
    monkeypatch.setattr(script, "wrap", wrap)
    run_dir = short(script, keep_checkpoint=True, total_timesteps=42, buffer_size=42, checkpoint_interval=9)
    assert [(row["mean"], row["min"], row["max"]) for row in eval_rows(run_dir)] == [(10, 10, 10)] * 3
    assert result(run_dir)["final_eval"] == dict(mean=10, std=0, min=10, max=10, episodes=2)
    rows = checkpoint(run_dir)["buffer"]["rows"]
    assert set(rows[:, 3].tolist()) == learnt  # after two numbers of the observation and one of the action
    capsys.readouterr()
    evaluate(script, run_dir)
    assert capsys.readouterr().out.splitlines()[-1].endswith("steps: 10.00 ± 0.00 over 2 episodes")


def test_a_wrapper_that_keeps_state_is_named_in_one_line_at_the_start(script, short, capsys, monkeypatch, twist):
    before = []
    twist(lambda walk, obs, reward: before.append(capsys.readouterr()) or (obs, reward))
    monkeypatch.setattr(script, "wrap", lambda env, args: gym.wrappers.NormalizeObservation(env))
    short(script)
    lines = [line for line in before[0].out.splitlines() if "NormalizeObservation" in line]
    assert len(lines) == 1 and "resuming may not be exact" in lines[0]


# Warm starts


def compare_at_the_first_step(twist, monkeypatch, script) -> list:
    """The states of the networks at a run's first step."""
    agents, states, original = [], [], script.DDPG

    def look(walk, obs, reward):
        if walk.training() and len(walk.actions) == 1:
            networks = "actor", "qf", "target_actor", "target_qf"
            states.append({name: getattr(agents[-1], name).state_dict() for name in networks})
            states[-1] = {name: {key: x.clone() for key, x in state.items()} for name, state in states[-1].items()}
        return obs, reward

    class Spy(original):
        def __init__(self, *args):
            super().__init__(*args)
            agents.append(self)

    monkeypatch.setattr(script, "DDPG", Spy)
    twist(look)
    return states


def assert_from(saved: dict, state: dict):
    assert same(state["actor"], saved["actor"]) and same(state["qf"], saved["qf"])
    assert same(state["target_actor"], saved["actor"]) and same(state["target_qf"], saved["qf"])


def test_a_warm_start_begins_with_the_networks_of_a_runs_model(script, short, twist, monkeypatch):
    saved = model(short(script, run_name="first"))
    states = compare_at_the_first_step(twist, monkeypatch, script)
    run_dir = short(script, warm_start="runs/first", seed=7, gamma=0.5, total_timesteps=35)
    assert_from(saved, states[0])
    flags = json.loads((run_dir / "args.json").read_text())["args"]
    assert (flags["seed"], flags["gamma"], flags["total_timesteps"]) == (7, 0.5, 35)
    assert flags["warm_start"] == "runs/first" and result(run_dir)["global_step"] == 35
    assert not same(model(run_dir)["actor"], saved["actor"])


def test_a_warm_started_run_resumes_when_the_first_ones_folder_is_gone(script, short, broken_off):
    short(script, run_name="first")
    whole = short(script, run_name="whole", warm_start="runs/first")
    resumed = broken_off(script, 30, warm_start="runs/first")
    shutil.rmtree("runs/first")
    resume(script, resumed)
    one, other = model(whole), model(resumed)
    assert same(one["actor"], other["actor"]) and same(one["qf"], other["qf"])
    assert (whole / "eval.csv").read_bytes() == (resumed / "eval.csv").read_bytes()


def test_a_warm_started_run_that_has_no_checkpoint_yet_is_still_warm_started(
    script, short, broken_off, twist, monkeypatch
):
    saved = model(short(script, run_name="first"))
    resumed = broken_off(script, 3, warm_start="runs/first")
    states = compare_at_the_first_step(twist, monkeypatch, script)
    resume(script, resumed)
    assert_from(saved, states[0])


def test_a_warm_start_from_other_shapes_is_one_line_and_leaves_no_folder(script, short, refused):
    short(script, run_name="first", env_kwargs='{"size": 3}')
    line = refused(short, script, warm_start="runs/first")
    assert "runs/first/model.pt does not fit" in line
    assert "runs/none/model.pt" in refused(short, script, warm_start="runs/none")
    assert not Path("runs/tiny").exists()


def test_load_model_leaves_no_targets_behind(script, short):
    run_dir = short(script)
    fresh = agent(script, obs_dim=2, **({"batch_norm": "both"} if script is paper else {}))
    script.load_model(fresh, str(run_dir))
    assert_from(model(run_dir), {name: getattr(fresh, name).state_dict() for name in model_and_targets(fresh)})


def model_and_targets(agent):
    return [name for name, part in vars(agent).items() if isinstance(part, torch.nn.Module) and name != "noise"]


# The film's camera


def camera(env) -> int:
    return env.unwrapped.mujoco_renderer.camera_id


CAMERAS = ['{"camera_id": -1}', '{"camera_name": "track"}', '{"default_camera_config": {"distance": 9}}']


@pytest.mark.parametrize("kwargs", CAMERAS)
def test_the_camera_that_the_user_chose_is_kept(script, kwargs):
    chosen = script.make_env(script.Args(env_kwargs=kwargs))
    assert camera(chosen) == camera(gym.make("HalfCheetah-v5", **json.loads(kwargs)))


def test_without_a_choice_the_camera_follows_the_robot(script):
    env = script.make_env(script.Args())
    track = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    assert camera(env) == track >= 0
    assert camera(script.make_env(script.Args(env_kwargs='{"forward_reward_weight": 2.0}'))) == track
    assert camera(script.make_env(script.Args(env_id="InvertedPendulum-v5"))) == -1  # it has none


# Memory

V2, V1 = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"
LIMITS = {"v2": {V2: "1000000\n"}, "v1": {V1: "1000000\n"}, "v1 next to v2 without": {V2: "max\n", V1: "1000000\n"}}
NO_LIMITS = {"none": {}, "max": {V2: "max\n"}, "v1's largest": {V1: f"{2**63 - 4096}\n"}, "large": {V2: f"{2**40}\n"}}


@pytest.fixture
def container(monkeypatch):
    original = pathlib.Path.read_text

    def container(limits):
        def read_text(path, *args, **kwargs):
            if str(path) not in (V1, V2):
                return original(path, *args, **kwargs)
            if str(path) not in limits:
                raise FileNotFoundError(str(path))
            return limits[str(path)]

        monkeypatch.setattr(pathlib.Path, "read_text", read_text)

    return container


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_the_memory_check_respects_a_containers_limit(script, limits, container, refused):
    container(limits)
    line = refused(script.ReplayBuffer, 100_000, 2, 1, CPU)
    assert "needs 0.00 GiB, 0.00 GiB are free" in line and "--buffer-size" in line
    assert len(script.ReplayBuffer(1_000, 2, 1, CPU).rows) == 1_000


@pytest.mark.parametrize("limits", NO_LIMITS.values(), ids=NO_LIMITS)
def test_limits_that_are_none(script, limits, container):
    container(limits)
    assert len(script.ReplayBuffer(3_000_000, 2, 1, CPU).rows) == 3_000_000


def test_the_start_says_what_the_full_buffer_takes(script, run, capsys):
    run(script, buffer_size=3_000_000, total_timesteps=50)  # rows of 7 float32
    assert "\nthe replay buffer takes 0.08 GiB when it is full\n" in capsys.readouterr().out


def test_a_containers_limit_is_not_the_gpus(script, container, monkeypatch):
    container({V2: "1000000\n"})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (2**40, 2**40))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: "allocated")
    assert script.allocate(10**6, 7, device=torch.device("cuda")) == "allocated"


# What a run records


def test_args_json_records_the_scripts_defaults_and_its_sha256(script, short, monkeypatch):
    monkeypatch.setattr(script.Args.__init__, "__defaults__", changed_defaults(script, gamma=0.75))
    record = json.loads((short(script, gamma=0.9) / "args.json").read_text())
    assert record["sha256"] == hashlib.sha256(Path(script.__file__).read_bytes()).hexdigest()
    assert record["defaults"] == json.loads(json.dumps(dataclasses.asdict(script.Args())))
    assert (record["defaults"]["gamma"], record["args"]["gamma"]) == (0.75, 0.9)
    assert record["defaults"]["total_timesteps"] == 1_000_000


def changed_defaults(script, **changed) -> tuple:
    return tuple(changed.get(field.name, field.default) for field in dataclasses.fields(script.Args))


def test_the_final_return_leaves_out_evaluations_before_learning(script, short, capsys, monkeypatch):
    scores = iter(range(100))

    monkeypatch.setattr(script, "evaluate", lambda *args: (np.array([float(next(scores))]),) * 3)
    run_dir = short(script, eval_interval=5, final_eval_episodes=0)  # 0, 1, 2 and 3 up to step 20, and 4, 5, 6 and 7
    assert [row["mean"] for row in eval_rows(run_dir)] == [*range(8)]
    assert result(run_dir)["final_return"] == 5.5
    assert "final return 5.5, the mean of 4 evaluations\n" in capsys.readouterr().out


def test_the_mean_of_one_evaluation_is_said_in_the_singular(script, short, capsys):
    assert result(short(script))["final_return"] == 10
    assert capsys.readouterr().out.endswith("final return 10.0, the mean of 1 evaluation\n")


def test_a_run_without_evaluations_ends_without_a_warning(script, short, recwarn, capsys):
    assert result(short(script, eval_interval=0, final_eval_episodes=0))["final_return"] is None
    assert re.search(r"\ncomplete after 40 steps in [0-9:]+\n$", capsys.readouterr().out)
    assert not [warning.message for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


# Numbers that are not finite


def finite(part) -> bool:
    if isinstance(part, dict | list | tuple):
        return all(map(finite, part.values() if isinstance(part, dict) else part))
    return bool(torch.as_tensor(part).isfinite().all()) if isinstance(part, torch.Tensor | float) else True


def assert_all_saved_is_finite(run_dir, step):
    assert not (run_dir / "result.json").exists() and not [*run_dir.glob("*.tmp")]
    saved, evaluated = checkpoint(run_dir), model(run_dir)
    assert saved["global_step"] == evaluated["global_step"] == step and finite([saved, evaluated])
    rows = eval_rows(run_dir)
    assert rows[-1]["global_step"] == step and np.isfinite([[*row.values()] for row in rows]).all()
    assert finite([[value for _, value in values] for values in scalars(run_dir).values()])


BAD = {  # what is bad, how, and at which step: within an episode, at one's end
    "a NaN reward": ("reward", lambda obs, reward: (obs, np.nan), 28),
    "an infinite reward": ("reward", lambda obs, reward: (obs, -np.inf), 30),
    "a NaN observation": ("observation", lambda obs, reward: (obs * np.nan, reward), 30),
    "an infinite observation": ("observation", lambda obs, reward: (np.float32([1, np.inf]), reward), 28),
}


@pytest.mark.parametrize("what, bad, step", BAD.values(), ids=BAD)
def test_a_number_that_is_not_finite_ends_the_run_where_it_arrives(script, what, bad, step, short, twist):
    def spoil(walk, obs, reward):
        return bad(obs, reward) if walk.training() and len(walk.actions) == step else (obs, reward)

    twist(spoil)
    line = error_of(short, script, eval_interval=10)
    assert line.startswith("error: ") and what in line and ("nan" in line or "inf" in line)
    assert f"ended at step {step}; --resume runs/tiny goes on from step 20" in line
    run_dir = Path("runs/tiny")
    assert_all_saved_is_finite(run_dir, 20)
    twist(lambda walk, obs, reward: (obs, reward))
    resume(script, run_dir)
    assert result(run_dir)["global_step"] == 40 and [row["global_step"] for row in eval_rows(run_dir)][-1] == 40


@pytest.mark.parametrize("what, bad, _", BAD.values(), ids=BAD)
def test_a_number_that_is_not_finite_in_an_evaluation_ends_the_run_too(script, what, bad, _, short, twist, made):
    def spoil(walk, obs, reward):
        late = len(made[0].actions) == 40
        return bad(obs, reward) if late and not walk.training() else (obs, reward)

    twist(spoil)
    line = error_of(short, script)
    assert line.startswith("error: ") and what in line and "ended at step 40; --resume runs/tiny" in line
    assert_all_saved_is_finite(Path("runs/tiny"), 20)


def test_weights_that_become_nan_are_said_to_be_the_actors(script, short, monkeypatch):
    class Broken(script.DDPG):
        def update(self, *args):
            losses = super().update(*args)
            self.updates = getattr(self, "updates", 0) + 1
            if self.updates == 3:
                self.actor.fc_mu.weight.data.fill_(torch.nan)
            return losses

    monkeypatch.setattr(script, "DDPG", Broken)
    line = error_of(short, script, checkpoint_interval=5)
    assert line.startswith("error: the action must be finite") and "ended at step 24" in line
    assert_all_saved_is_finite(Path("runs/tiny"), 20)


@pytest.mark.parametrize("loss", ["actor_loss", "critic_loss"])
def test_weights_that_become_nan_in_a_step_that_saves_are_not_saved(script, loss, short, monkeypatch):
    original, calls = getattr(script.DDPG, loss), []

    def broken(self, given):
        returned = original(self, given)
        calls.append(given)
        factor = torch.nan if len(calls) == 10 else 1.0
        return returned * factor if loss == "actor_loss" else (returned[0] * factor, returned[1])

    monkeypatch.setattr(script.DDPG, loss, broken)
    line = error_of(short, script, checkpoint_interval=10, eval_interval=10)
    assert line.startswith("error: not finite: ") and "nan" in line and "ended at step 30" in line
    assert_all_saved_is_finite(Path("runs/tiny"), 20)


# Errors of the environment


def line_of(text: str) -> int:
    lines = Path(people_stubs.__file__).read_text().splitlines()
    return 1 + next(i for i, line in enumerate(lines) if line.strip() == text)


CAUSES = {
    "BareAssert": ("AssertionError", "assert len(kwargs) > 9"),
    "MissingGoal": ("KeyError: 'goal'", 'kwargs["goal"]'),
    "WrongType": ("TypeError: object of type 'int' has no len()", "len(7)"),
    "Unfilmable": ("RuntimeError: no GL here", 'raise RuntimeError("no GL\\nhere")'),
}


@pytest.mark.parametrize("name", CAUSES)
def test_an_error_of_the_environment_keeps_its_cause(script, name, short, refused):
    kind, text = CAUSES[name]
    line = refused(short, script, env_id=f"people_stubs:{name}-v0", capture_video=name == "Unfilmable")
    assert f"people_stubs:{name}-v0" in line and kind in line and f"people_stubs.py, line {line_of(text)}" in line


# Seeds


@pytest.mark.parametrize("seed", [429_496, 20_261_129, 2**32 - 1])
def test_any_seed_runs_through_all_evaluations(script, seed, short, made):
    run_dir = short(script, seed=seed, eval_interval=0, total_timesteps=25, final_eval_episodes=5)
    assert result(run_dir)["final_eval"]["episodes"] == 5
    seeds = [[seed for seed in env.seeds if seed is not None] for env in made]
    assert seeds[0] == [seed]
    assert len({seed for own in seeds[1:] for seed in own}) == 5 and all(0 <= s < 2**32 for own in seeds for s in own)


@pytest.mark.parametrize("seed", [0, 1, 428_999])
def test_small_seeds_have_the_starts_that_they_always_had(script, seed, made):
    args = script.Args(env_id="people_stubs:Walk-v0", seed=seed)
    envs = [script.make_env(args) for _ in range(3)]
    evaluated = agent(script, obs_dim=2, seed=seed)
    script.evaluate(evaluated, envs)
    script.evaluate(evaluated, envs, 10)
    first = 10_000 * (seed + 1)
    assert [env.seeds for env in made] == [[first, first + 10], [first + 1, first + 11], [first + 2, first + 12]]
    script.evaluate(agent(script, obs_dim=2, seed=20_261_129), envs)  # where they no longer fit
    assert all(env.seeds[-1] < 2**32 for env in made)


@pytest.mark.parametrize("env", ["OldGenerator", "LateOldGenerator", "LateOtherGenerator", "NoGenerator"])
def test_an_environment_without_numpys_new_generator_trains_and_resumes(script, env, broken_off, capsys):
    run_dir = broken_off(script, 30, env_id=f"people_stubs:{env}-v0")
    assert checkpoint(run_dir)["global_step"] == 20
    capsys.readouterr()
    resume(script, run_dir)
    assert result(run_dir)["global_step"] == 40
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "resuming may not be exact" in notes[0] and env in notes[0]


# Notebooks


def test_main_works_in_any_thread(script, short):
    run_dirs, errors = [], []

    def train():
        try:
            run_dirs.append(short(script))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors and result(run_dirs[0])["global_step"] == 40


def no_network(monkeypatch):
    """Weights & Biases is installed, and does not work."""

    def init(**kwargs):
        raise RuntimeError("no network")

    wandb = types.ModuleType("wandb")
    wandb.__spec__, wandb.init = importlib.machinery.ModuleSpec("wandb", None), init
    monkeypatch.setitem(sys.modules, "wandb", wandb)


def test_after_an_error_at_the_start_the_next_try_works(script, short, monkeypatch, capsys):
    """Also where a notebook keeps the error, and with it whatever the run has opened."""
    no_network(monkeypatch)
    with pytest.raises(SystemExit) as kept:
        short(script, env_id="people_stubs:Unfilmable-v0", capture_video=True)
    assert kept.value.code == 2 and "no GL here" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no network") as kept_too:
        short(script, env_id="people_stubs:Unfilmable-v0", track=True)
    run_dir = short(script, env_id="people_stubs:Unfilmable-v0")
    assert kept.tb and kept_too.tb
    assert result(run_dir)["global_step"] == 40 and len([*run_dir.glob("events*")]) == 1


def test_the_second_ctrl_c_goes_to_the_callers_handler(script, short, broken_off, twist):
    """And so do all that come after main, however it ends."""
    caught, before_the_run = [], []

    def mine(number, frame):
        caught.append(number)

    def interrupt(walk, obs, reward):
        if walk.training() and len(walk.actions) == 7:
            signal.raise_signal(signal.SIGINT)
            before_the_run.append(len(caught))
            assert signal.getsignal(signal.SIGINT) is mine  # or the next one would kill this process
            signal.raise_signal(signal.SIGINT)
        return obs, reward

    def assert_handlers_are_back():
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is mine
        assert threading.excepthook is hook

    hook = threading.excepthook
    signal.signal(signal.SIGINT, mine), signal.signal(signal.SIGTERM, mine)
    short(script, run_name="complete")
    assert_handlers_are_back()
    broken_off(script, 7, run_name="broken off")
    assert_handlers_are_back()
    twist(interrupt)
    with pytest.raises(SystemExit) as ended:
        short(script)
    assert ended.value.code == 128 + signal.SIGINT and before_the_run == [0] and caught == [signal.SIGINT]
    assert_handlers_are_back()


def test_an_environment_may_count_its_own_episodes(script, short):
    run_dir = short(script, env_id="people_stubs:Counted-v0")
    assert result(run_dir)["final_return"] == 10 and scalars(run_dir)["charts/episodic_return"][0] == (5, 10)


def test_a_score_can_be_printed_where_there_is_no_plus_minus(script, short, tmp_path):
    run_dir = short(script)
    done = process([sys.executable, script.__file__, "--evaluate", str(run_dir)], tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.endswith("10.00 ? 0.00 over 2 episodes\n"), done.stderr


def test_no_more_environments_are_made_than_needed(script, short, made):
    run_dir = short(script, eval_interval=0, final_eval_episodes=0)
    assert len(made) == 1
    evaluate(script, run_dir, eval_episodes=1)
    assert len(made) == 1


# Observations and actions


@pytest.mark.parametrize("env", ["UnitGrid", "SignedGrid", "Dict", "Tuple"])
def test_observations_of_many_parts_are_made_flat_and_said_to_be(script, env, broken_off, capsys):
    """They train, resume and are evaluated."""
    run_dir = broken_off(script, 30, env_id=f"people_stubs:{env}-v0")
    resume(script, run_dir)
    size = gym.spaces.flatdim(people_stubs.OBSERVATIONS[env])
    assert model(run_dir)["obs_shape"] == (size,) and result(run_dir)["final_return"] == 10
    lines = [line for line in capsys.readouterr().out.splitlines() if "flat" in line]
    assert len(lines) == 2 and "FlattenObservation" in lines[0]  # in each of the two processes
    evaluate(script, run_dir)
    assert capsys.readouterr().out.splitlines()[-1].endswith("after 40 steps: 10.00 ± 0.00 over 2 episodes")


@pytest.mark.parametrize("env", ["Image", "FloatImage"])
def test_an_image_is_refused_with_the_way_out(script, env, short, refused):
    line = refused(short, script, env_id=f"people_stubs:{env}-v0")
    assert f"people_stubs:{env}-v0 observes images: ddpg_paper_faithful.py --pixels learns from pixels" in line
    assert not Path("runs").exists()
    short(script, env_id="people_stubs:UnitGrid-v0")  # which looks alike


@pytest.mark.parametrize("env", ["MatrixAction", "NumberAction"])
def test_an_action_that_is_no_vector_is_refused_by_name(script, env, short, refused):
    line = refused(short, script, env_id=f"people_stubs:{env}-v0")
    assert f"people_stubs:{env}-v0" in line and "continuous action space" in line
    assert str(gym.spec(f"{env}-v0").kwargs["action"]) in line
    assert not Path("runs").exists()


# Options of the environment

THREE = '{"length": 3}'


def test_env_kwargs_reach_all_environments_and_are_kept(script, short, broken_off, refused, made, capsys):
    short(script, env_kwargs=THREE, run_name="whole")
    assert len(made) == 3 and {walk.length for walk in made} == {3}
    run_dir = broken_off(script, 30, env_kwargs=THREE)
    assert json.loads((run_dir / "args.json").read_text())["args"]["env_kwargs"] == THREE
    assert "env_kwargs" in refused(resume, script, run_dir, env_kwargs="{}")
    resume(script, run_dir)
    assert len(made) == 3 and {walk.length for walk in made} == {3}
    assert [row["mean"] for row in eval_rows(run_dir)] == [0 + 1 + 2] * 2
    capsys.readouterr()
    evaluate(script, run_dir)
    assert len(made) == 2 and {walk.length for walk in made} == {3}
    assert capsys.readouterr().out == "people_stubs:Walk-v0 after 40 steps: 3.00 ± 0.00 over 2 episodes\n"


def test_env_kwargs_from_the_command_line(script, cli, made):
    flags = "--env-id people_stubs:Walk-v0 --total-timesteps 9 --learning-starts 8 --buffer-size 300 --no-cuda"
    cli(script, *flags.split(), "--eval-episodes", 1, "--num-threads", 1, "--env-kwargs", THREE)
    assert len(made) == 2 and {walk.length for walk in made} == {3}


def test_an_unknown_option_of_the_environment_is_one_clear_line(script, short, refused):
    line = refused(short, script, env_kwargs='{"gravity": 3}')
    assert "people_stubs:Walk-v0" in line and "unexpected keyword argument 'gravity'" in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("text", ["length=3", "{'length': 3}", "", "[3]", "3", "null", '"length"'])
def test_env_kwargs_that_are_no_json_object_are_one_clear_line(script, text, short, refused):
    assert "--env-kwargs" in refused(short, script, env_kwargs=text)
    assert not Path("runs").exists()


def test_another_environment_can_be_evaluated_and_is_said_to_be_another(script, short, capsys, refused):
    run_dir = short(script)
    for changes, score in [(dict(env_id="people_stubs:OtherWalk-v0"), 10), (dict(env_kwargs=THREE), 3)]:
        capsys.readouterr()
        evaluate(script, run_dir, **changes)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and "another environment" in lines[0] and "people_stubs:Walk-v0" in lines[0]
        env_id = changes.get("env_id", "people_stubs:Walk-v0")
        assert lines[1] == f"{env_id} after 40 steps: {score:.2f} ± 0.00 over 2 episodes"
    larger = refused(evaluate, script, run_dir, env_kwargs='{"size": 3}')
    assert "does not fit this environment" in larger


# Mistakes


@pytest.mark.parametrize("size", [1, 2])
def test_a_reward_that_is_an_array_is_said_to_be_the_reward(script, size, short, twist):
    twist(lambda walk, obs, reward: (obs, np.full(size, reward)))
    line = error_of(short, script)
    assert line.startswith("error: ") and "reward" in line and "ended at step 1;" in line


def test_a_choice_that_is_none_is_refused_with_the_choices(script, short, refused):
    name, value = ("noise", "OU") if script is tuned else ("batch_norm", "Both")
    line = refused(short, script, **{name: value})
    choices = ("gaussian", "ou", "parameter") if script is tuned else ("both", "actor", "critic", "none")
    assert f"--{name.replace('_', '-')}" in line and value in line and all(f"'{choice}'" in line for choice in choices)


def test_what_is_said_about_learning_starts_shows_both_numbers(script, short, refused):
    line = refused(short, script, learning_starts=25_000, total_timesteps=10_000)
    assert "--learning-starts 25,000" in line and "--total-timesteps 10,000" in line


def test_a_vector_among_the_logged_scalars_is_named(script, short, monkeypatch):
    class Mine(script.DDPG):
        def diagnostics(self, batch):
            return super().diagnostics(batch) | {"charts/mine": torch.zeros(3)}

    monkeypatch.setattr(script, "DDPG", Mine)
    with pytest.raises(ValueError, match=r"charts/mine .*\(3,\)"):
        short(script)


@pytest.mark.parametrize("flag", ["--learning-rate 1e-3", "--learning-rate=1e-3", "--learning_rate 1e-3"])
def test_the_papers_script_says_which_learning_rates_it_has(flag, cli, refused):
    line = refused(cli, paper, "--env-id", "people_stubs:Walk-v0", *flag.split())
    assert "--actor-lr" in line and "--critic-lr" in line


def test_every_whole_number_can_be_typed(script, monkeypatch):
    """And is one then: --batch-size, too, whose default depends on another flag."""
    defaults = dataclasses.asdict(script.Args())
    numbers = {name: value for name, value in defaults.items() if type(value) is int}
    assert {"batch_size", "seed", "buffer_size", "policy_frequency"} <= numbers.keys()
    flags = [word for name, value in numbers.items() for word in (f"--{name.replace('_', '-')}", f"{value:e}")]
    monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py", *flags])
    args = script.parse_args()
    script.set_up(args)
    for name, value in numbers.items():
        assert getattr(args, name) == value and type(getattr(args, name)) is int, name


# Beyond the scripts


@pytest.mark.parametrize(
    "script, flags", [(tuned, {}), (tuned, {"layer_norm": "both"}), (paper, {"batch_norm": "both"})]
)
def test_an_actor_can_be_exported(script, flags):
    actor = agent(script, low=(-2.0, 0.0), high=(2.0, 1.0), **flags).actor
    obs = torch.randn(5, 3)
    exported = torch.export.export(actor, (obs,)).module()
    torch.testing.assert_close(exported(obs), actor(obs), rtol=0, atol=1e-6)
