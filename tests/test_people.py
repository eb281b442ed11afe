"""What people run into: environments, wrappers and copies that are not as in the textbook, and notebooks."""

import json
import pathlib
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import people_stubs
import pytest
import torch
from conftest import CPU, agent, eval_rows, model, paper, scalars, tuned
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


def error_of(function, *args, **flags) -> str:
    """The one line with which this call exits with code 1: Python prints it."""
    with pytest.raises(SystemExit) as ended:
        function(*args, **flags)
    line = ended.value.code
    assert isinstance(line, str) and line.startswith("error: ") and len(line.splitlines()) == 1, line
    return line


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


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Random generators: an environment may use and seed whatever it likes


def generators(env: gym.Env | None = None) -> list:
    own = [env.np_random, env.action_space.np_random] if env else []
    states = [np.random.get_state(legacy=False), *(rng.bit_generator.state for rng in own)]
    return [random.getstate(), torch.get_rng_state().tolist(), json.dumps(states, default=np.ndarray.tolist)]


def test_evaluating_and_making_an_environment_leave_the_random_generators_as_they_were(script, short, twist, made):
    """At each step of training they are as they would be without, and when it has ended; filming, too."""
    seen = []

    def look(walk, obs, reward):
        if walk.training():
            seen.append(generators(walk))
        return obs, reward

    twist(look)
    without = dict(env_id="people_stubs:Seeder-v0", eval_interval=0, final_eval_episodes=0, eval_episodes=1)
    evaluating = dict(eval_interval=10, final_eval_episodes=3, capture_video=True)
    for flags in without | dict(run_name="without"), without | evaluating:
        run_dir = short(script, **flags)
        seen.append(generators(made[0]))
        assert len(set(made[0].starts)) == len(made[0].starts) == 8
    assert len(seen) == 2 * 41 and seen[:41] == seen[41:]
    assert len([*run_dir.glob("videos/*.mp4")]) == 4

    people_stubs.seed_globally(3)
    before = generators()
    script.make_env(script.Args(env_id="people_stubs:Seeder-v0"), render=True)
    assert generators() == before


GENERATORS = ['{"kind": "RandomState", "early": true}', '{"kind": "RandomState"}', '{"kind": "MT19937"}']


@pytest.mark.parametrize("kwargs", GENERATORS)
def test_an_environment_without_numpys_new_generator_trains_and_resumes(kwargs, broken_off, capsys):
    run_dir = broken_off(tuned, 30, env_id="people_stubs:OtherGenerator-v0", env_kwargs=kwargs)
    assert checkpoint(run_dir)["global_step"] == 20
    capsys.readouterr()
    resume(tuned, run_dir)
    assert result(run_dir)["global_step"] == 40
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "resuming may not be exact" in notes[0] and "OtherGenerator" in notes[0]


@pytest.mark.parametrize("seed", [0, 1, 429_495, 429_496, 20_261_129, 2**32 - 1])
def test_evaluations_have_starts_of_their_own_below_2_32(seed, short, made):
    """10,000 for each seed, as far as there are so many; seven are taken here, two of them twice."""
    run_dir = short(tuned, seed=seed, eval_interval=21, total_timesteps=42, final_eval_episodes=5)
    assert result(run_dir)["final_eval"]["episodes"] == 5
    seeds = [[seed for seed in env.seeds if seed is not None] for env in made]
    first = 10_000 * (seed + 1) if seed < 429_495 else seeds[1][0]
    assert seeds == [
        [seed],
        [first, first, *range(first + 2, first + 7, 2)],
        [first + 1, first + 1, first + 3, first + 5],
    ]
    assert 0 <= first < 2**32 - 10_000


# Wrappers


def test_evaluations_score_the_environments_own_reward(script, short, capsys, monkeypatch):
    """Whatever wrappers make of it; those that keep a state are named."""

    def wrap(env, args):
        tenfold = gym.wrappers.TransformReward(gym.wrappers.NormalizeObservation(env), lambda reward: 10 * reward)
        return gym.wrappers.MaxAndSkipObservation(tenfold, skip=2)

    monkeypatch.setattr(script, "wrap", wrap)
    run_dir = short(script, keep_checkpoint=True, total_timesteps=42, buffer_size=42, checkpoint_interval=9)
    assert [(row["mean"], row["min"], row["max"]) for row in eval_rows(run_dir)] == [(10, 10, 10)] * 3
    assert result(run_dir)["final_eval"] == dict(mean=10, std=0, min=10, max=10, episodes=2)
    rows = checkpoint(run_dir)["buffer"]["rows"]
    assert set(rows[:, 3].tolist()) == {10, 50, 40}  # after two numbers of the observation and one of the action
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    state = "the state of MaxAndSkipObservation, NormalizeObservation, Walk"
    assert notes == [f"note: resuming may not be exact here: no checkpoint holds {state}"]
    evaluate(script, run_dir)
    assert capsys.readouterr().out.splitlines()[-1].endswith("steps: 10.00 ± 0.00 over 2 episodes")


def test_an_environment_may_count_its_own_episodes(script, short):
    run_dir = short(script, env_id="people_stubs:Counted-v0")
    assert result(run_dir)["final_return"] == 10 and scalars(run_dir)["charts/episodic_return"][0] == (5, 10)


# Warm starts


def test_a_warm_start_begins_with_the_networks_of_a_runs_model(script, short, broken_off):
    """Broken off before its first checkpoint or after, it goes on as if never, then without the first run's folder."""
    saved = model(short(script, run_name="first"))
    flags = dict(warm_start="runs/first", seed=7, gamma=0.5)
    whole = short(script, run_name="whole", **flags)
    assert not same(model(whole)["actor"], saved["actor"])
    early, late = broken_off(script, 3, run_name="early", **flags), broken_off(script, 30, run_name="late", **flags)
    resume(script, early)
    shutil.rmtree("runs/first")
    before_learning = checkpoint(late)
    for name in "actor", "qf":
        assert same(before_learning["agent"][name], saved[name])
        assert same(before_learning["agent"][f"target_{name}"], saved[name])
    assert before_learning["global_step"] == SHORT["learning_starts"]
    resume(script, late)
    for resumed in early, late:
        assert all(same(model(resumed)[name], model(whole)[name]) for name in ("actor", "qf"))
        assert (resumed / "eval.csv").read_bytes() == (whole / "eval.csv").read_bytes()
        own = json.loads((resumed / "args.json").read_text())["args"]
        assert own.items() >= flags.items()


def test_a_warm_start_from_other_shapes_is_one_line_and_leaves_no_folder(script, short, refused):
    short(script, run_name="first", env_kwargs='{"size": 3}')
    assert "runs/first/model.pt does not fit" in refused(short, script, warm_start="runs/first")
    assert "runs/none/model.pt" in refused(short, script, warm_start="runs/none")
    assert not Path("runs/tiny").exists()


# The film's camera


def camera(kwargs: str = "{}", env_id: str = "HalfCheetah-v5") -> int:
    env = tuned.make_env(tuned.Args(env_id=env_id, env_kwargs=kwargs))
    return env.unwrapped.mujoco_renderer.camera_id


def test_the_camera_that_the_user_chose_is_kept_and_else_it_follows_the_robot():
    for kwargs in '{"camera_id": -1}', '{"camera_name": "track"}', '{"default_camera_config": {"distance": 9}}':
        chosen = gym.make("HalfCheetah-v5", **json.loads(kwargs)).unwrapped
        assert camera(kwargs) == chosen.mujoco_renderer.camera_id, kwargs
    track = mujoco.mj_name2id(chosen.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    assert camera() == camera('{"forward_reward_weight": 2.0}') == track >= 0
    assert camera(env_id="InvertedPendulum-v5") == -1  # it has none


# Memory

V2, V1 = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"
LIMITS = {"v2": {V2: "1000000\n"}, "v1 next to v2 without": {V2: "max\n", V1: "1000000\n"}}
NO_LIMITS = {"none": {}, "v1's largest": {V1: f"{2**63 - 4096}\n"}}


@pytest.mark.parametrize("limits", [*LIMITS, *NO_LIMITS])
def test_the_memory_check_respects_a_containers_limit(limits, refused, monkeypatch):
    """Of 1 MB: for rows of 7 float32, 28 bytes; but not for a GPU's buffer."""
    original, files = pathlib.Path.read_text, (LIMITS | NO_LIMITS)[limits]

    def read_text(path, *args, **kwargs):
        if str(path) in (V1, V2) and str(path) not in files:
            raise FileNotFoundError(str(path))
        return files.get(str(path)) or original(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    assert len(tuned.ReplayBuffer(30_000, 2, 1, CPU).rows) == 30_000
    if limits in LIMITS:
        line = refused(tuned.ReplayBuffer, 40_000, 2, 1, CPU)
        assert line == "error: the replay buffer needs 0.00 GiB, 0.00 GiB are free: lower --buffer-size"
    else:
        assert len(tuned.ReplayBuffer(3_000_000, 2, 1, CPU).rows) == 3_000_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (2**40, 2**40))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: "allocated")
    assert tuned.allocate(10**6, 7, device=torch.device("cuda")) == "allocated"


# No evaluations


def test_a_run_without_evaluations_makes_one_environment_and_ends_without_a_warning(short, made, recwarn, capsys):
    run_dir = short(tuned, eval_interval=0, final_eval_episodes=0)
    assert len(made) == 1 and result(run_dir)["final_return"] is None and result(run_dir)["final_eval"] is None
    assert re.search(r"\ncomplete after 40 steps in [0-9:]+\n$", capsys.readouterr().out)
    assert not [warning.message for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
    evaluate(tuned, run_dir, eval_episodes=1)
    assert len(made) == 1


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


ENVIRONMENTS = "the environment's reward must be finite and of shape (), but is"
OBSERVATION = "the observation must be finite and of shape (2,), but is"
BAD = {  # what is bad and what is said; at which step: within an episode, at one's end, in an evaluation
    "a NaN reward": (lambda obs, reward: (obs, np.nan), f"{ENVIRONMENTS} nan", 28),
    "a reward in an array": (lambda obs, reward: (obs, np.full(1, 2.0)), f"{ENVIRONMENTS} [2.]", 29),
    "a NaN observation": (lambda obs, reward: (obs * np.nan, reward), f"{OBSERVATION} [nan nan]", 30),
    "an infinite reward": (lambda obs, reward: (obs, -np.inf), f"{ENVIRONMENTS} -inf", 40),
    "an infinite observation": (lambda obs, reward: (np.float32([1, np.inf]), reward), f"{OBSERVATION} [ 1. inf]", 40),
}


@pytest.mark.parametrize("bad, said, step", BAD.values(), ids=BAD)
def test_a_number_that_is_not_finite_ends_the_run_where_it_arrives(script, bad, said, step, short, twist, made):
    def spoil(walk, obs, reward):
        here = walk.training() != (step == 40)
        return bad(obs, reward) if here and len(made[0].actions) == step else (obs, reward)

    twist(spoil)
    line = error_of(short, script)
    assert line == f"error: {said}; ended at step {step}; --resume runs/tiny goes on from step 20"
    run_dir = Path("runs/tiny")
    assert_all_saved_is_finite(run_dir, 20)
    twist(lambda walk, obs, reward: (obs, reward))
    resume(script, run_dir)
    assert result(run_dir)["global_step"] == 40 and eval_rows(run_dir)[-1]["global_step"] == 40


@pytest.mark.parametrize("loss, when", [("actor_loss", 3), ("actor_loss", 10), ("critic_loss", 10)])
def test_weights_that_become_nan_are_named_and_not_saved(script, loss, when, short, monkeypatch):
    """In a step that saves the losses show it, in another the next action."""
    original, calls = getattr(script.DDPG, loss), []

    def broken(self, given):
        returned = original(self, given)
        calls.append(given)
        factor = torch.nan if len(calls) == when else 1.0
        return returned * factor if loss == "actor_loss" else (returned[0] * factor, returned[1])

    monkeypatch.setattr(script.DDPG, loss, broken)
    line = error_of(short, script, checkpoint_interval=10, eval_interval=10)
    said, step = ("the action must be finite", 24) if when == 3 else ("not finite: ", 30)
    assert line.startswith(f"error: {said}") and "nan" in line and f"ended at step {step}" in line
    assert_all_saved_is_finite(Path("runs/tiny"), 20)


def test_a_vector_among_the_logged_scalars_is_named(script, short, monkeypatch):
    original = script.DDPG.diagnostics
    monkeypatch.setattr(script.DDPG, "diagnostics", lambda *args: original(*args) | {"charts/mine": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"charts/mine .*\(3,\)"):
        short(script)


# Errors of the environment

CAUSES = {  # the environment, its kwargs, and what it says where
    "a bare assert": ("Unmakeable", {}, "AssertionError", "assert len(kwargs) > 9"),
    "a type": ("Unmakeable", dict(of_type="any"), "TypeError: object of type 'int' has no len()", "len(7)"),
}


@pytest.mark.parametrize("name, kwargs, kind, text", CAUSES.values(), ids=CAUSES)
def test_an_error_of_the_environment_keeps_its_cause(name, kwargs, kind, text, short, refused):
    lines = [line.strip() for line in Path(people_stubs.__file__).read_text().splitlines()]
    place = f"(people_stubs.py, line {1 + lines.index(text)})"
    env = dict(env_id=f"people_stubs:{name}-v0", env_kwargs=json.dumps(kwargs))
    line = refused(short, tuned, **env)
    assert f"cannot make people_stubs:{name}-v0 with" in line and kind in line and place in line


# Notebooks


def test_main_works_in_any_thread(script, short):
    with ThreadPoolExecutor(1) as pool:
        run_dir = pool.submit(short, script).result()
    assert result(run_dir)["global_step"] == 40


def test_after_an_error_at_the_start_the_next_try_works(short, refused, monkeypatch):
    """Also where a notebook keeps the error, and with it whatever the run has opened."""
    unfilmable = dict(env_id="stubs:Unrendered-v0")
    assert "cannot make" in refused(short, tuned, **unfilmable, capture_video=True)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) as kept:
        patch.setattr(tuned, "SummaryWriter", lambda *args, **kwargs: 1 / 0)
        short(tuned, **unfilmable)
    run_dir = short(tuned, **unfilmable)
    assert kept.tb and result(run_dir)["global_step"] == 40 and len([*run_dir.glob("events*")]) == 1


# Observations, and options of the environment


@pytest.mark.parametrize("env, size", [("Grid", 4 * 4 * 3), ("Parts", 3 + 2 + 2 * 2)])
def test_observations_of_many_parts_are_made_flat_and_said_to_be(script, env, size, broken_off, capsys):
    """They train, resume and are evaluated."""
    run_dir = broken_off(script, 30, env_id=f"people_stubs:{env}-v0")
    resume(script, run_dir)
    assert model(run_dir)["obs_shape"] == (size,) and result(run_dir)["final_return"] == 10
    lines = [line for line in capsys.readouterr().out.splitlines() if "flat" in line]
    assert len(lines) == 2 and "FlattenObservation" in lines[0]  # in each of the two processes
    evaluate(script, run_dir)
    assert capsys.readouterr().out.splitlines()[-1].endswith("after 40 steps: 10.00 ± 0.00 over 2 episodes")


THREE = '{"length": 3}'


def test_env_kwargs_reach_all_environments_and_are_kept(script, broken_off, refused, made, capsys):
    run_dir = broken_off(script, 30, env_kwargs=THREE)
    assert len(made) == 3 and {walk.length for walk in made} == {3}
    assert json.loads((run_dir / "args.json").read_text())["args"]["env_kwargs"] == THREE
    assert "env_kwargs" in refused(resume, script, run_dir, env_kwargs="{}")
    resume(script, run_dir)
    assert len(made) == 3 and {walk.length for walk in made} == {3}
    assert [row["mean"] for row in eval_rows(run_dir)] == [0 + 1 + 2] * 2
    capsys.readouterr()
    evaluate(script, run_dir)
    assert len(made) == 2 and {walk.length for walk in made} == {3}
    assert capsys.readouterr().out == "people_stubs:Walk-v0 after 40 steps: 3.00 ± 0.00 over 2 episodes\n"


@pytest.mark.parametrize("text", ["length=3", "{'length': 3}", "", "[3]", "3", "null", '"length"'])
def test_env_kwargs_that_are_no_json_object_are_one_clear_line(text, refused):
    assert f"with --env-kwargs {text}: " in refused(tuned.make_env, tuned.Args(env_kwargs=text))


def test_another_environment_can_be_evaluated_and_is_said_to_be_another(script, short, capsys, refused):
    run_dir = short(script)
    for changes, score in [(dict(env_id="people_stubs:Counted-v0"), 10), (dict(env_kwargs=THREE), 3)]:
        capsys.readouterr()
        evaluate(script, run_dir, **changes)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and "another environment" in lines[0] and "people_stubs:Walk-v0" in lines[0]
        env_id = changes.get("env_id", "people_stubs:Walk-v0")
        assert lines[1] == f"{env_id} after 40 steps: {score:.2f} ± 0.00 over 2 episodes"
    larger = refused(evaluate, script, run_dir, env_kwargs='{"size": 3}')
    assert "does not fit this environment" in larger


# Beyond the scripts


@pytest.mark.parametrize(
    "script, flags", [(tuned, {}), (tuned, {"layer_norm": "both"}), (paper, {"batch_norm": "both"})]
)
def test_an_actor_can_be_exported(script, flags):
    actor = agent(script, low=(-2.0, 0.0), high=(2.0, 1.0), **flags).actor
    obs = torch.randn(5, 3)
    exported = torch.export.export(actor, (obs,)).module()
    torch.testing.assert_close(exported(obs), actor(obs), rtol=0, atol=1e-6)
