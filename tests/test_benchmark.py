"""Sweeps, killed and started again; the report against numbers computed here by hand; peers, measurements, models."""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from conftest import CPU, ROOT, SCRIPTS, environment, eval_rows, model, paper, process, scalars, tuned
from matplotlib.testing.compare import compare_images
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "benchmark"))
import baselines
import paper_batch_norm
import plot_noise
import report
import sb3_ddpg
import throughput

FLAGS = "--learning-starts 100 --batch-size 16 --eval-interval 200 --eval-episodes 2 --final-eval-episodes 3"
FLAGS = f"{FLAGS} --checkpoint-interval 200".split()


def sweep_command(*settings, flags=FLAGS):
    return [ROOT / "benchmark/ddpg_continuous_action.sh", f"PYTHON={sys.executable}", *settings, "--", *flags]


def sweep(folder, *settings, flags=FLAGS, **env):
    return process(sweep_command(*settings, flags=flags), folder, **env)


def wait_until(condition, seconds=600):  # only so that a failure ends some day: busy machines are slow
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "timed out"
        time.sleep(0.05)


@pytest.fixture
def hold(tmp_path):
    """The file that makes runs wait; without it, those that a failed test leaves behind come to their end."""
    yield tmp_path / "hold"
    (tmp_path / "hold").unlink(missing_ok=True)


@pytest.fixture
def stand_in(tmp_path):
    """A sweep's setting: an interpreter that only leaves a run's files, waits while there is the file hold, and fails
    in NoSuch-v5. Its command line is in args.json."""
    path = tmp_path / "interpreter"
    path.write_text("""#!/bin/sh
trap 'exit 143' TERM
[ "$3" != NoSuch-v5 ] || { echo "there is no such environment"; exit 1; }
mkdir -p "runs/$7" && printf '%s\\n' "$@" >"runs/$7/args.json"
while [ -e hold ]; do sleep 0.1; done
touch "runs/$7/result.json"
""")
    path.chmod(0o755)
    return f"PYTHON={path}"


def log_of(run_dir):
    return run_dir.with_name(f"{run_dir.name}.log")


def steps_of(run_dir):
    return [row["global_step"] for row in eval_rows(run_dir)]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_sweep_killed_and_started_again(tmp_path, hold, drawings):
    settings = ["ENVS=stubs:Waiting-v0", "SEEDS=1 2", "VARIANT=--tau 0.01", "STEPS=0.6e3", "JOBS=2"]
    flags = [*FLAGS, "--tau", "0.02"]  # over which the variant's wins
    out = tmp_path / "runs/ddpg_continuous_action"
    finished, run_dir = (out / f"stubs-Waiting-v0__{out.name}__tau-0.01__{seed}" for seed in (1, 2))
    finished.mkdir(parents=True)
    (finished / "result.json").touch()
    hold.touch()  # the run of seed 2 waits, with a checkpoint behind it
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed = subprocess.Popen(sweep_command(*settings, flags=flags), cwd=tmp_path, env=environment(), **pipes)
    wait_until((run_dir / "checkpoint.pt").exists)
    killed.send_signal(signal.SIGINT)
    output = killed.communicate(timeout=600)[0]
    assert killed.returncode == 130 and "run the same command again to resume" in output, output
    assert "stopped: ended at step" in log_of(run_dir).read_text() and not (run_dir / "result.json").exists()

    hold.unlink()
    again = sweep(tmp_path, *settings, flags=flags)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 done, 0 running, 0 waiting, 0 failed" in again.stdout and not log_of(finished).exists()
    commands = [line for line in log_of(run_dir).read_text().splitlines() if line.startswith("$ ")]
    assert ["--resume" in line for line in commands] == [False, True]
    assert json.loads((run_dir / "args.json").read_text())["args"]["tau"] == 0.01
    steps, means = zip(*((row["global_step"], row["mean"]) for row in eval_rows(run_dir)), strict=True)
    assert steps == (200, 400, 600)
    made = run_report(out)
    (reported,) = read_csv(out / "report/results.csv")
    assert float(reported["final_return"]) == pytest.approx(statistics.fmean(means), rel=1e-12)
    shown = f"**{statistics.fmean(means):,.0f}**".replace("-", "−")  # below −1,000
    assert shown in (out / "report/results.md").read_text() and shown in made.stdout

    # Other settings in the same folder would mix two experiments in one table; more runs of the same are welcome
    other = sweep(tmp_path, *settings, flags=[*flags, "--gamma", "0.9"])
    assert other.returncode == 2 and "other settings" in other.stderr and other.stderr.count("\n") == 1
    more = sweep(tmp_path, *settings, "VARIANT=default", "SEEDS=1 2 3", "--dry-run", flags=flags)
    assert more.returncode == 0 and len(more.stdout.splitlines()) == 4  # three of the new variant, one of seed 3


def test_sweep_killed_outright_finds_its_run_still_going_and_names_a_failed_run(tmp_path, hold, stand_in):
    command = sweep_command("ENVS=NoSuch-v5 Hopper-v5", "SEEDS=2", "STEPS=2e3", "JOBS=2", "OUT=runs/sweep", stand_in)
    run_dir = tmp_path / "runs/sweep/Hopper-v5__ddpg_continuous_action__2"
    hold.touch()
    killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_until((run_dir / "args.json").exists)
    killed.kill()
    again = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "waiting for another process" in log_of(run_dir).read_text())
    hold.unlink()
    output, errors = again.communicate(timeout=600)
    assert again.returncode == 1 and "1 done, 0 running, 0 waiting, 1 failed" in output
    assert (run_dir / "result.json").exists() and log_of(run_dir).read_text().count("$ ") == 1
    assert "failed: NoSuch-v5__ddpg_continuous_action__2" in errors and "no such environment" in errors  # its log's end


def test_dry_run_prints_the_commands_in_their_order_and_writes_nothing(tmp_path):
    settings = ["SEEDS=1 2", "STEPS=300e3", "--dry-run", "--slurm"]  # which submits nothing then
    json_value = '{"max_episode_steps":500,"xml_file":"/tmp/a_b.xml","range":[1,-2.5e-3],"deep":{"x":true}}'
    variants = f"default\n\n  --no-x  --tau -1 --env-kwargs {json_value}\n"
    dry = sweep(tmp_path, *settings, flags=["--wandb-entity", "a b"], ENVS="A B/C", VARIANTS=variants)
    assert dry.returncode == 0 and not list(tmp_path.iterdir())
    commands = [shlex.split(line)[2:] for line in dry.stdout.splitlines()]
    named = "__env-kwargs-max_episode_steps-500-xml_file--tmp-a_b.xml-range-1--2.5e-3-deep-x-true_no-x_tau--1"
    name, shared = tuned.SCRIPT, ["--total-timesteps", "300000", "--num-threads", "1", "--wandb-entity", "a b"]
    own = ["--no-x", "--tau", "-1", "--env-kwargs", json_value]  # last, so that they win
    assert commands == [
        ["--env-id", env, "--seed", seed, "--run-name", f"{name}/{run}__{name}{variant}__{seed}", *shared, *flags]
        for seed in "12"  # all of seed 1 first
        for variant, flags in (("", []), (named, own))
        for env, run in (("A", "A"), ("B/C", "B-C"))
    ]


BAD_SETTINGS = """SEED=1|SEEDS=1 1|OUT=elsewhere|OUT=runs/../x|STEPS=many|STEPS=1.5|STEPS=0|JOBS=0|THREADS=0|ENVS= |\
PYTHON=no|VARIANT=tau 1|VARIANT=--tau $(id)|VARIANT=--tau ../x|VARIANT=--tau=1|VARIANT=--seed 1|\
VARIANT=--tau 1 --resume x|VARIANT=--x {"a": 1}|VARIANT=--x {"a"|VARIANT=--x {'a':1}|VARIANT=--x {"a":$(id)}|\
VARIANT=--x "a"|VARIANT=default VARIANT=|VARIANT=--a 1 --b 2 VARIANT=--b  2 --a 1"""  # the last ones: the same twice


@pytest.mark.parametrize("setting", BAD_SETTINGS.split("|"))
def test_bad_setting_is_one_line(tmp_path, setting):
    bad = sweep(tmp_path, *setting.replace(" VARIANT", "\nVARIANT").split("\n"))
    assert bad.returncode == 2 and not list(tmp_path.iterdir())
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


def test_slurm_submits_what_is_left_and_a_task_passes_signals_on(tmp_path, hold, stand_in):
    """Against a stand-in for sbatch too; tests/slurm.sh tries the real one."""
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "$@" >sbatch_args\ncat >batch_script\necho 7\n')
    sbatch.chmod(0o755)
    done = tmp_path / "runs/sweep/Hopper-v5__ddpg_continuous_action__1"
    done.mkdir(parents=True)
    (done / "result.json").touch()
    env = environment(PATH=f"{sbatch.parent}:{os.environ['PATH']}")
    variant = ["--tau", "0.01", "--env-kwargs", '{"max_episode_steps":100}']
    settings = ["ENVS=Hopper-v5", "SEEDS=1", "VARIANT=", f"VARIANT={' '.join(variant)}", "VARIANT=--tau 0.1"]
    submitted = sweep(tmp_path, *settings, "STEPS=1e6", "OUT=runs/sweep", stand_in, "--slurm", **env)
    assert submitted.returncode == 0, submitted.stderr
    assert "job array 7 of 2 runs (3 in the sweep)" in submitted.stdout
    arguments = (tmp_path / "sbatch_args").read_text().split()
    assert {"--array=1,2", "--requeue", "--open-mode=append"} <= set(arguments)

    def task(index):
        return subprocess.Popen(["bash", "batch_script"], cwd=tmp_path, env=env | {"SLURM_ARRAY_TASK_ID": str(index)})

    hold.touch()
    assert task(0).wait(timeout=600) == 0  # finished: nothing to do
    run_dir = done.with_name("Hopper-v5__ddpg_continuous_action__env-kwargs-max_episode_steps-100_tau-0.01__1")
    log, first = log_of(run_dir), task(1)
    wait_until((run_dir / "args.json").exists)
    second = task(1)  # the same run again, while the first goes on: requeued by a cluster in a hurry
    wait_until(lambda: "waiting for another process" in log.read_text())
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=600) == 143
    wait_until(lambda: "--resume" in log.read_text().splitlines()[-1])
    hold.unlink()
    assert second.wait(timeout=600) == 0 and log.read_text().count("$ ") == 2
    resumed = (run_dir / "args.json").read_text().splitlines()
    assert resumed[-6:] == [*variant, "--resume", f"runs/sweep/{run_dir.name}"]


# The report, on runs written by hand


def write_run(folder, env_id, seed, means, exp_name=tuned.SCRIPT, final_eval=None, defaults=None, **flags):
    """A finished run with these means of evaluations, one every 5,000 steps."""
    name = "_".join(map(str, [env_id, exp_name, seed, *flags.values()]))
    run_dir = folder / re.sub(r"[^\w.-]", "", name)
    run_dir.mkdir(parents=True)
    args = dict(exp_name=exp_name, env_id=env_id, seed=seed, run_name=run_dir.name, learning_starts=0) | flags
    versions = dict(python="3.11.7", torch="2.13.0", gymnasium="1.4.0", mujoco="4.0.0", numpy="2.4.6")
    record = dict(args=args, defaults=defaults or {}, versions=versions, hardware=dict(threads=1, gpu=None))
    (run_dir / "args.json").write_text(json.dumps(record))
    rows = "".join(f"{5000 * (i + 1)},{mean},1.0,0.0,2.0,10\n" for i, mean in enumerate(means))
    (run_dir / "eval.csv").write_text("global_step,mean,std,min,max,episodes\n" + rows)
    result = dict(global_step=5000 * len(means), seconds=3600.0, steps_per_second=100.0)
    result["final_eval"] = final_eval and dict(mean=final_eval, std=1.0, min=0.0, max=2.0, episodes=100)
    (run_dir / "result.json").write_text(json.dumps(result))
    return run_dir


def write_seeds(folder, env_id, finals, steps=1_000_000, **flags):
    """Runs of seeds 1, 2 and so on, whose last ten evaluations are these numbers."""
    for seed, final in enumerate(finals, 1):
        write_run(folder, env_id, seed, [0] * (steps // 5000 - 10) + [final] * 10, **flags)


def write_log(run_dir, *scalars):
    tags = "eval/q_estimate", "eval/discounted_return", "charts/episodic_return", "charts/saturated_actions"
    with SummaryWriter(run_dir) as log:
        for tag, values in zip(tags, scalars, strict=False):
            for step, value in values:
                log.add_scalar(tag, value, step)


def run_report(*arguments):
    """As its command line does, in this process."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            report.main(tyro.cli(report.Args, args=[str(argument) for argument in arguments]))
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def read_runs(*folders, **flags):
    return report.read_runs(report.Args(runs=folders, **flags))


def rows_of(table):
    """The rows of a table in Markdown, each {column: cell}."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def table_rows(*folders, **flags):
    return rows_of(report.results_table(read_runs(*folders, **flags), report.Args(**flags)))


@pytest.fixture
def drawings(monkeypatch):
    """The data of each figure that the report would draw from now on, which takes its time."""
    drawings = []
    monkeypatch.setattr(report, "draw", lambda data, path, formats, **look: drawings.append(data))
    return drawings


def test_report_on_odd_input(tmp_path, drawings):
    empty = run_report(tmp_path)
    assert empty.returncode == 2 and empty.stderr.startswith("error: no complete runs")
    assert empty.stderr.count("\n") == 1

    means = list(range(0, 1200, 100))  # 12 evaluations; the last 10 have the mean 650
    write_run(tmp_path, "Hopper-v5", 1, means)
    write_run(tmp_path, "Hopper-v5", 2, [mean + 100 for mean in means])
    (write_run(tmp_path, "Hopper-v5", 3, means) / "result.json").unlink()
    (write_run(tmp_path, "Hopper-v5", 4, means) / "args.json").write_text('{"args": {')
    (write_run(tmp_path, "Hopper-v5", 5, means) / "result.json").write_text("{}")
    (write_run(tmp_path, "Hopper-v5", 6, means) / "args.json").write_text('{"args": {"env_id": "Hopper-v5"}}')
    with open(write_run(tmp_path, "Hopper-v5", 7, means) / "eval.csv", "a") as file:
        file.write("65000,12\n")
    write_run(tmp_path, "Hopper-v5", 8, [])
    broken = write_run(tmp_path, "Hopper-v5", 9, means)
    (broken / "q_estimates.csv").write_text("global_step,q_estimate,discounted_return\n5000,oh\n")
    write_run(tmp_path / "twice", "Hopper-v5", 1, means)
    made = run_report(tmp_path)
    assert made.returncode == 0
    expected = [f"Hopper-v5_ddpg_continuous_action_{seed}: cannot be read and is left out" for seed in range(4, 10)]
    expected.append("Hopper-v5_ddpg_continuous_action_3: incomplete (it has no result.json) and left out")
    expected.append("twice/Hopper-v5_ddpg_continuous_action_1: left out, ")
    warnings = [line for line in made.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(expected)
    for text in expected:
        assert sum(text in line for line in warnings) == 1, (text, warnings)
    (row,) = rows_of(made.stdout)
    assert (row["steps"], row["seeds"]) == ("60,000", "2")
    assert (row["final return"], row["each seed"]) == ("**700.0 ± 70.7**", "650, 750")


def test_variants_are_labelled_with_the_flags_in_which_they_differ(tmp_path, capsys):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    write_run(a, "Hopper-v5", 1, [1] * 10)  # older than the flags of the next ones
    write_run(a, "Hopper-v5", 1, [1] * 10, learning_rate=1e-3, batch_size=128, num_threads=2)
    write_run(a, "Hopper-v5", 2, [1] * 10, learning_rate=3e-4, num_threads=1, gamma=0.99)
    for batch_norm, momentum in ("both", 0.001), ("actor", 0.001), ("none", 0.1), ("none", 0.001):
        flags = dict(critic_lr=1e-2, batch_norm=batch_norm, batch_norm_momentum=momentum)
        write_run(b, "Hopper-v5", 1, [1] * 10, "ddpg_paper_faithful", **flags)
    runs = read_runs(a)
    assert list(runs["variant"]) == ["default", "default", "--learning-rate 1e-3 --batch-size 128"]
    assert list(runs["seed"]) == [1, 2, 1] and capsys.readouterr().err == ""
    # The same rate in all of them is no difference; nor is a momentum where there is nothing that it is of
    assert list(read_runs(b)["variant"]) == ["default", "--batch-norm actor", "--batch-norm none"]
    problem = capsys.readouterr().err
    assert problem.count("\n") == 1 and "left out, another run has its flags and seed" in problem
    # A copy's runs by its own defaults, as args.json records them: a flag that it added is none of the scripts'
    defaults = dict(exp_name="my_ddpg", bonus=0.5, tau=0.02)
    for bonus, tau in (0.5, 0.02), (2.0, 0.02), (0.5, 0.005):
        write_run(c, "Hopper-v5", 1, [1] * 10, "my_ddpg", bonus=bonus, tau=tau, defaults=defaults)
    assert list(read_runs(c)["variant"]) == ["default", "--bonus 2", "--tau 5e-3"]
    variants = list(read_runs(a, b, c)["variant"].unique())
    assert variants[0] == "ddpg_continuous_action" and variants[-1] == "my_ddpg --tau 5e-3"


def test_returns_of_random_actions_are_no_final_returns(tmp_path):
    """As in result.json: of the last ten evaluations those after learning started."""
    write_run(tmp_path, "Hopper-v5", 1, [1000] * 5 + [10, 20, 30], learning_starts=25_000)
    write_run(tmp_path, "Walker2d-v5", 1, [1000] * 5, learning_starts=25_000)
    runs = read_runs(tmp_path)
    assert list(runs["environment"]) == ["Hopper-v5"] and list(runs["final_return"]) == [20.0]
    assert list(runs["lowest_evaluation"]) == [10.0] and list(runs["highest_evaluation"]) == [30.0]


def test_columns_of_the_table(tmp_path):
    for seed, first_above, final_eval in (1, 3, 80.0), (2, 4, 90.0), (3, 9, 70.0), (4, None, 100.0):
        means = [95.0 if i == first_above else float(seed) for i in range(12)]
        run_dir = write_run(tmp_path, "Hopper-v5", seed, means, final_eval=final_eval)
        q = [(5000 * (i + 1), 10.0 * seed + i) for i in range(12)]  # the last 10 have the mean 10 seed + 6.5
        discounted = [(step, 2.5) for step, _ in q]
        episodes = [(7 * i, float(max(i - 20, 0))) for i in range(120)]  # the last 100: 0 to 99
        write_log(run_dir, q, discounted, episodes)
    (row,) = table_rows(tmp_path, solved_above=90.0, training_return=True)
    assert row["steps"] == "60,000" and row["seeds"] == "4"
    assert row["final return"] == "**9.5 ± 3.7**"  # of 10.4, 11.3, 12.2 and 4
    assert row["each seed"] == "10, 11, 12, 4.0"
    assert (row["lowest of last 10"], row["highest of last 10"]) == ("1.0", "95")  # seed 1's, and that of three
    assert row["final evaluation"] == "85.0 ± 12.9"
    assert row["solved (seeds)"] == "3 of 4"
    assert row["first solved at step (median)"] == "25,000"  # of 20,000, 25,000 and 50,000
    assert row["training return, last 100 episodes"] == "49.5 ± 0.0"
    assert row["Q − discounted return"] == "29.0 ± 12.9"  # of 14, 24, 34 and 44
    assert row["random"] == "17.0" and row["untrained"] == "48.0" and row["hours"] == "1.00"

    (row,) = table_rows(tmp_path, solved_above=90.0, training_return=True, up_to=(20e3,))
    assert row["steps"] == "20,000" and row["solved (seeds)"] == "1 of 4"
    assert row["Q − discounted return"] == "24.0 ± 12.9"  # the mean of the first four
    # What was measured at the end says nothing of the first 20,000 steps
    assert not {"final evaluation", "training return, last 100 episodes", "hours"} & row.keys()

    write_run(tmp_path, "Hopper-v5", 5, [1.0] * 12)  # without a final evaluation, as before there was one
    (row,) = table_rows(tmp_path)
    assert row["seeds"] == "5" and "final evaluation" not in row  # four of the seeds are not the row

    on_gpu = write_run(tmp_path, "Hopper-v5", 6, [1.0] * 12) / "args.json"
    on_gpu.write_text(on_gpu.read_text().replace('"gpu": null', '"gpu": "NVIDIA H100"'))
    (row,) = table_rows(tmp_path)
    assert row["seeds"] == "6" and not {"steps/s", "hours"} & row.keys()  # of two kinds of hardware


@pytest.mark.parametrize(
    "finals, std, seeds, half",
    [
        ((70, 100, 130), 30, 3, 68.0),  # Welch: 30² / 3 twice, 4 degrees of freedom, t = 2.776
        # 30² / 3 and 60² / 12 are 300 each, so 600² / (300² / 2 + 300² / 11) = 6.77 degrees, t = 2.381
        ((70, 100, 130), 60, 12, 58.3),
        ((70, 100, 130), math.nan, 10, 74.5),  # of the published only the mean: 2 degrees, t = 4.303, 30 / √3
        ((70, 100, 130), 30, 1, 74.5),  # nor has a single seed a spread
        ((1000, 1000, 1000), math.nan, 10, 0.0),
    ],
)
def test_verdict_is_by_the_95_percent_interval(finals, std, seeds, half):
    def verdict(finals, difference):
        best = {"mean": statistics.fmean(finals) - difference, "std": std, "seeds": seeds}
        return report.verdict(pd.Series(finals, dtype=float), best)

    interval = f"± {report.number(half)})"
    for sign, side in (1, "higher"), (-1, "lower"):
        beyond, within = sign * (half + 0.1), sign * (half - 0.1)
        assert verdict(finals, beyond) == f"{side} ({report.number(beyond)} {interval}"
        assert half == 0 or verdict(finals, within) == f"level ({report.number(within)} {interval}"
    assert verdict((100,), 1000.0) == ""


def test_tables_with_a_row_per_task(tmp_path, refused):
    # Published is 2,009.04 ± 869.92 of 5: 100² / 3 + 869.92² / 5, 4.17 degrees of freedom, t = 2.733, so ± 1,074
    write_seeds(tmp_path, "Hopper-v5", (2900, 3000, 3100))
    write_seeds(tmp_path, "Hopper-v5", (3000, 3100, 3200), n_step=3)
    write_seeds(tmp_path / "short", "Hopper-v5", (700, 800), n_step=3, steps=300_000)
    write_seeds(tmp_path, "Pusher-v5", (-30,))
    runs, args = read_runs(tmp_path), report.Args(recommended=("Hopper-v5 --n-step 3",))
    hopper, pusher = rows_of(report.best_table(runs, args))
    assert list(hopper.values()) == [
        *("Hopper-v5", "`--n-step 3`", "48.0", "3,000 ± 100", "750.0 ± 70.7 (2 seeds)", "3,100 ± 100"),
        *("2,009 ± 870", "rl-blox, v5, 5 seeds", "higher (1,091 ± 1,074)"),
    ]
    assert pusher["default, 1,000,000 steps"] == "−30.0 (1 seed)" and pusher["recommended"] == "default"
    assert (pusher["best published"], pusher["verdict"]) == ("", "")  # published as training returns only
    hoppers = runs[runs["environment"] == "Hopper-v5"]
    (hopper,) = rows_of(report.best_table(hoppers, report.Args()))
    assert hopper["verdict"] == "level (991 ± 1,074)" and hopper["default, 1,000,000 steps"] == "3,000 ± 100"
    short, hopper, pusher = rows_of(report.variants_table(runs, report.Args()))
    assert hopper["--n-step 3"] == "3,100 ± 100" and pusher["--n-step 3"] == short["default"] == ""

    for lacking in "Hoper-v5 default", "Hopper-v5", "Hopper-v5 --n-step 4":
        refused(report.best_table, hoppers, report.Args(recommended=(lacking,)))
    line = refused(read_runs, tmp_path, variant=("--n-step 5",))
    assert line == "error: no run is of the variant --n-step 5; there are default, --n-step 3"


def test_runs_on_two_machines_are_pooled_on_request(tmp_path, capsys):
    both = a, b = tmp_path / "a", tmp_path / "b"
    write_seeds(a, "Hopper-v5", (100, 200), steps=50_000)
    write_run(b, "Hopper-v5", 1, [600] * 10 + [0] * 10)  # the same seed until step 50,000
    write_run(b, "Hopper-v5", 2, [200] * 20)  # on the same machine: it says nothing new
    (row,) = table_rows(*both, up_to=(50e3,))
    assert row["seeds"] == "2" and row["final return"] == "**150.0 ± 70.7**"
    assert capsys.readouterr().err.count("left out, another run has its flags and seed (see --pool)\n") == 2
    (row,) = table_rows(*both, up_to=(50e3,), pool=True)
    assert row["seeds"] == "3 runs of 2" and row["each seed"] == "100, 600, 200"
    assert row["final return"] == "**300.0 ± 264.6**" and row["steps"] == "50,000"
    assert "steps/s" not in row  # measured over the whole runs
    assert capsys.readouterr().err.count("\n") == 1
    (row,) = rows_of(report.variants_table(read_runs(*both, up_to=(50e3,), pool=True), report.Args()))
    assert row["default"] == "300.0 ± 264.6 (3 runs of 2 seeds)"


def test_summary_for_a_paper(tmp_path, drawings):
    finals = [-40, 10, 20, 30, 200]
    write_seeds(tmp_path, "Hopper-v5", finals, steps=50_000)
    write_seeds(tmp_path, "Ant-v5", finals[:4], steps=50_000, n_step=3)
    write_seeds(tmp_path, "Pusher-v5", finals[:1], steps=50_000)
    assert run_report(tmp_path).returncode == 0
    ant, hopper, pusher = read_csv(tmp_path / "report/summary.csv")
    assert hopper["runs"] == "5" and float(hopper["mean"]) == 44 and float(hopper["IQM"]) == 20  # of 10, 20 and 30
    # Sample standard deviation 91.27, 4 degrees of freedom: 2.776 · 91.27 / √5 = 113.3
    assert float(hopper["mean low"]) == pytest.approx(44 - 113.3, abs=0.1)
    assert float(hopper["mean high"]) == pytest.approx(44 + 113.3, abs=0.1)
    resamples = itertools.product(finals, repeat=5)  # all there are
    means = sorted(statistics.fmean(sorted(resample)[1:4]) for resample in resamples)
    assert float(hopper["IQM low"]) == pytest.approx(means[round(0.025 * len(means))], abs=2)
    assert float(hopper["IQM high"]) == pytest.approx(means[round(0.975 * len(means))], abs=2)
    assert ant["IQM"] == ant["IQM low"] == "" and float(ant["mean"]) == 5  # of four runs
    assert pusher["mean"] == "-40.0" and pusher["mean low"] == pusher["mean high"] == ""

    lines = (tmp_path / "report/summary.tex").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(r"\begin{tabular}") and lines[-1] == r"\end{tabular}"
    # Sample standard deviation 31.09, 3 degrees of freedom: 3.182 · 31.09 / √4 = 49.5
    assert r"Ant-v5 & -{}-n-step 3 & 50000 & 4 & 5.0 & $-$44.5 & 54.5 &  &  &  \\" in lines


def test_levels_are_of_gymnasiums_own_tasks_and_as_many_steps(tmp_path, drawings):
    write_seeds(tmp_path, "Hopper-v5", [1.0])
    write_seeds(tmp_path, "Hopper-v5", [1.0], env_kwargs='{"max_episode_steps": 500}')
    for env_id in "Hopper-v5-heavy-v0", "Hopper-v0", "mine:Hopper-v5":
        write_seeds(tmp_path / env_id[:4], env_id, [1.0])
    runs = read_runs(tmp_path)
    known = runs[(runs["environment"] == "Hopper-v5") & (runs["variant"] == "default")]
    assert len(runs) == 5 and len(known) == 1 and known[list(report.LEVELS)].notna().all(axis=None)
    assert runs.drop(known.index)[list(report.LEVELS)].isna().all(axis=None)

    report.draw_returns(runs, tmp_path)
    report.draw_returns(read_runs(tmp_path, up_to=(300e3,)), tmp_path)
    whole, part = (data[data["variant"] == "best published"] for data in drawings)
    assert whole["steps"].tolist() == [0, 1_000_000] and whole["return"].tolist() == [2009.04] * 2 and part.empty


def test_an_export_grows_with_its_sweep_and_neither_mixes_nor_deletes(tmp_path, capsys):
    data, runs = tmp_path / "data", tmp_path / "runs"
    first = write_run(runs, "Hopper-v5", 1, [1] * 10)
    unfinished = write_run(runs, "Hopper-v5", 2, [1] * 9)
    (unfinished / "result.json").unlink()
    report.export(read_runs(runs), data)
    assert list(read_runs(data)["seed"]) == [1] and not (data / unfinished.name).exists()
    shutil.rmtree(runs)  # another machine goes on
    (write_run(runs, "Hopper-v5", 2, [2] * 10) / "checkpoint.pt").touch()
    report.export(read_runs(runs), data)
    assert [run.evaluations["mean"].iloc[-1] for run in read_runs(data).itertuples()] == [1, 2]
    assert not list(data.rglob("checkpoint.pt"))

    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    write_run(tmp_path / "other", "Hopper-v5", 1, [2] * 10)
    namesake = write_run(tmp_path / "namesake", "Hopper-v5", 1, [1] * 10, tau=0.01)
    namesake.rename(namesake.with_name(first.name))
    for folder in "other", "namesake":
        with pytest.raises(SystemExit):
            report.export(read_runs(tmp_path / folder), data)
        assert "holds another run of that name" in capsys.readouterr().err
    report.export(read_runs(data), data)
    assert before == {path: path.read_bytes() for path in data.rglob("*.*")}


def test_page_is_made_from_the_exported_data(tmp_path):
    run_dir = write_run(tmp_path / "runs", "Hopper-v5", 1, range(0, 1000, 100))
    q, discounted = [(5000, 50.0), (10000, 100.0)], [(5000, 40.5), (10000, 40.5)]
    episodes = [(step, float(step)) for step in range(100)]
    write_log(run_dir, q, discounted, episodes, [(5200, 1.0), (10000, 0.25)])  # of the steps in eval.csv, 10,000 alone
    data = tmp_path / "benchmark/results/short"
    exported = data / run_dir.name
    assert run_report(tmp_path / "runs", "--export", data).returncode == 0
    for figure in "learning_curves", "q_estimates":
        assert (tmp_path / f"runs/report/{figure}.pdf").read_bytes().startswith(b"%PDF")
    assert (exported / "eval.csv").read_bytes() == (run_dir / "eval.csv").read_bytes()
    q_estimates = "global_step,q_estimate,discounted_return\n5000,50,40.5\n10000,100,40.5\n"
    assert (exported / "q_estimates.csv").read_text() == q_estimates
    assert (exported / "saturated_actions.csv").read_text() == "global_step,saturated_actions\n10000,0.25\n"
    assert (exported / "training_return.csv").read_text() == "episodes,mean\n100,49.5\n"
    (row,) = table_rows(data, training_return=True)
    assert [row] == table_rows(tmp_path / "runs", training_return=True)
    assert row["saturated actions (%)"] == "25.0"

    page, other = tmp_path / "README.md", tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- results:short:begin -->\nold\n<!-- results:short:end -->\nafter\n")
    other.write_text("<!-- results:decisions:begin --show file README.md -->\n<!-- results:decisions:end -->\n")
    made = run_report("--pages", page, other)
    assert made.returncode == 0, made.stderr
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "**450.0**" in text
    assert text in other.read_text()
    assert (data / "learning_curves.png").exists() and (data / "q_estimates.png").exists()

    page.write_text(text := "<!-- results:shorts:begin -->\n<!-- results:shorts:end -->\n")
    made = run_report("--pages", page)
    assert made.returncode == 2 and "section shorts: there is nothing at benchmark/results/shorts" in made.stderr
    assert page.read_text() == text


def test_pages_and_tables_are_the_same_in_any_locale(tmp_path):
    """Here in one that knows neither ± nor −."""
    runs = tmp_path / "benchmark/results/runs"
    write_run(runs, "Hopper-v5", 1, [-5.0] * 10, final_eval=-5.0)
    page = tmp_path / "page.md"
    page.write_text("± before\n<!-- results:runs:begin --show table -->\n<!-- results:runs:end -->\n", encoding="utf-8")
    lines = [["report.py", "--pages", str(page)], ["report.py", str(runs)]]
    code = f"import runpy, sys\nfor sys.argv in {lines}: runpy.run_path({str(report.__file__)!r}, run_name='__main__')"
    done = process([sys.executable, "-c", code], tmp_path, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    for path in page, runs / "report/results.md":
        assert "| **−5.0** |" in path.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").startswith("± before\n") and not list(tmp_path.glob("*.tmp"))


# What is committed


def test_pages_agree_with_the_committed_data(tmp_path):
    for name in ("README.md", "RESULTS.md"):
        page = ROOT / name
        hint = "run: python benchmark/report.py --pages README.md RESULTS.md"
        assert report.rendered(page, tmp_path) == page.read_text(), hint
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}"
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    committed = ROOT / "benchmark/results"
    assert drawn == sorted(path.relative_to(committed) for path in committed.glob("*/*.png"))
    for figure in drawn:
        different = compare_images(str(committed / figure), str(tmp_path / figure), tol=1)
        assert different is None, different


def test_committed_baselines_are_what_the_command_measures(tmp_path):
    args = baselines.Args(env_ids=("InvertedPendulum-v5",), out=tmp_path / "baselines.csv")
    baselines.main(args)
    committed = read_csv(ROOT / "benchmark/baselines.csv")
    assert read_csv(args.out) == [row for row in committed if row["env_id"] in args.env_ids]


def test_noise_figure_is_the_committed_one(tmp_path):
    plot_noise.main(plot_noise.Args(out=tmp_path / "noise.png"))
    assert compare_images(str(ROOT / "benchmark/results/noise.png"), str(tmp_path / "noise.png"), tol=1) is None


@functools.cache
def committed_flags():
    paths = ROOT.glob("benchmark/results/*/*/args.json")
    return {path.parent: json.loads(path.read_text())["args"] for path in paths}


def same_flags(one, other):
    """But for those that tell machines apart, and for the names of sweeps."""
    return all(one[name] == other[name] for name in (one.keys() & other.keys()) - {"run_name", "num_threads"})


MODELS = ROOT / "benchmark/models"


@pytest.mark.parametrize("name", sorted(str(path.parent.relative_to(MODELS)) for path in MODELS.rglob("model.pt")))
def test_a_shipped_model_reproduces_its_published_evaluation(name, cli, capsys):
    """The last row of its run's eval.csv; to the cent on a CPU like the one it was trained on, else near it."""
    saved = model(MODELS / name)
    (run_dir,) = [run_dir for run_dir, flags in committed_flags().items() if same_flags(flags, saved["args"])]
    *_, last = eval_rows(run_dir)
    (script,) = [script for script in SCRIPTS if script.SCRIPT == saved["script"]]
    cli(script, "--evaluate", MODELS / name)
    shown = rf"{name.split('/')[-1]} after {last['global_step']:,.0f} steps: (.+) ± .+ over 10 episodes\n"
    mean = float(re.fullmatch(shown, capsys.readouterr().out)[1])
    assert abs(mean - last["mean"]) <= last["std"]  # rounding grows to other trajectories, but not to another policy


# Peers: stable-baselines3's DDPG, and the modes of batch normalisation in the paper's script


POINT = "--env-id stubs:Point-v0 --num-threads 1 --learning-starts 20 --batch-size 16 --buffer-size 100 "
POINT += "--eval-interval 50 --eval-episodes 2 --final-eval-episodes 3"


def test_peer_leaves_the_same_files_and_starts_over_when_interrupted(tmp_path, cli):
    settings = dict(SCRIPT="benchmark/sb3_ddpg.py", ENVS="Pendulum-v1", SEEDS="1", STEPS="500")
    done = process([ROOT / "benchmark/sweep.sh", f"PYTHON={sys.executable}", "--", *FLAGS], tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs/sb3_ddpg/Pendulum-v1__sb3_ddpg__1"
    assert steps_of(run_dir) == [200, 400, 500]
    result = json.loads((run_dir / "result.json").read_text())
    assert result["evaluations"] == 3 and result["final_eval"]["episodes"] == 3
    record = json.loads((run_dir / "args.json").read_text())
    assert record["script"] == "sb3_ddpg" and "stable_baselines3" in record["versions"]
    assert record["args"]["matmul"] == record["defaults"]["matmul"] == "mkl"  # it has no say in that
    assert not (run_dir / "model.pt").exists()
    assert [step for step, _ in scalars(run_dir)["charts/episodic_return"]] == [200, 400]

    finished = (run_dir / "eval.csv").read_bytes()
    (run_dir / "result.json").unlink()
    (run_dir / "eval.csv").write_text("global_step,mean,std,min,max,episodes\n200,1,1,1,1,2\n")  # as if killed there
    cli(sb3_ddpg, "--resume", run_dir)
    assert (run_dir / "eval.csv").read_bytes() == finished
    (evaluations,) = read_runs(run_dir)["evaluations"]
    assert evaluations["q_estimate"].notna().tolist() == [True] * 3  # nothing is in the log twice


def test_peer_is_evaluated_after_each_update_as_ours_is(cli):
    for steps in 50, 100:
        cli(sb3_ddpg, *POINT.split(), "--run-name", steps, "--total-timesteps", steps)
    assert eval_rows(Path("runs/50")) == eval_rows(Path("runs/100"))[:1]


NOT_FOR_SB3 = """--noise ou|--noise-anneal-steps 10|--layer-norm critic|--n-step 3|--target-noise 0.2|--track|\
--compile|--policy-frequency 2|--matmul onednn|--cudagraphs|--save-model|--warm-start runs/x"""


@pytest.mark.parametrize("flags", NOT_FOR_SB3.split("|"))
def test_peer_refuses_what_it_has_not_in_one_line(flags, cli, refused, tmp_path):
    line = refused(cli, sb3_ddpg, *flags.split())
    assert line.startswith(f"error: {flags.split()[0]} is not for stable-baselines3's DDPG")
    assert not list(tmp_path.iterdir())


def test_peer_acts_and_judges_in_our_evaluation_as_by_itself():
    env = tuned.make_env(tuned.Args(env_id="Pendulum-v1"))
    theirs = sb3_ddpg.DDPG("MlpPolicy", env, seed=1, buffer_size=10)
    agent = sb3_ddpg.as_agent(theirs, tuned.Args())
    obs = torch.randn(5, 3)
    with torch.no_grad():
        action = agent.actor(obs)
        q = agent.qf(obs, action)
        their_q = theirs.critic(obs, theirs.actor(obs))[0]
    assert action.numpy() == pytest.approx(theirs.predict(obs.numpy(), deterministic=True)[0], abs=1e-6)
    assert action.abs().max() > 0.01  # within -2 and 2, where SB3's own network says half of that
    assert q.numpy() == pytest.approx(their_q.squeeze(1).numpy(), abs=1e-6)


@pytest.mark.parametrize(
    "target, loss, averages", [("batch", "batch", (1, 1)), ("copied", "running", (5, 9)), ("slow", "running", (2, 3))]
)
def test_modes_of_batch_normalisation(target, loss, averages):
    """Observations 0 and 4, by their own mean 2 and variance 4, or by running averages of 1 and 9 set here."""
    flags = dict(target_statistics=target, actor_loss_statistics=loss, tau=0.25, batch_norm_momentum=0.0)
    box, normalised = gym.spaces.Box(-1, 1, (1,), np.float32), {}
    agent = paper_batch_norm.DDPG(paper_batch_norm.Args(batch_size=2, **flags), box, box, CPU)
    for name in "actor", "qf", "target_actor", "target_qf":
        norm, seen = getattr(agent, name).input, normalised.setdefault(name, [])
        norm.running_mean.fill_(1.0)
        norm.running_var.fill_(9.0)
        norm.register_forward_hook(lambda _, __, x, seen=seen: seen.append(x.detach().flatten().tolist()))
    obs, zeros = torch.tensor([[0.0], [4.0]]), torch.zeros(2)
    agent.update(paper.Batch(obs, torch.zeros(2, 1), zeros, obs, zeros))
    # The first step of Adam has changed the scale by 0.001
    by_batch, by_running = (pytest.approx(values, abs=0.01) for values in ([-1, 1], [-1 / 3, 1]))
    in_targets, in_actor_loss = (by_batch if mode == "batch" else by_running for mode in (target, loss))
    assert [in_targets] == normalised["target_actor"] and [in_targets] == normalised["target_qf"]
    assert normalised["actor"] == [by_batch] and normalised["qf"] == [by_batch, in_actor_loss]
    assert not agent.actor.training  # acting is by running averages

    for online, slow in (agent.actor, agent.target_actor), (agent.qf, agent.target_qf):
        for network, mean, variance in (online, 5.0, 9.0), (slow, 1.0, 1.0):
            network.norm1.running_mean.fill_(mean)
            network.norm1.running_var.fill_(variance)
    agent.update_targets()
    for network in agent.target_actor, agent.target_qf:  # slow: a quarter of the way
        assert (network.norm1.running_mean == averages[0]).all() and (network.norm1.running_var == averages[1]).all()


def test_mode_of_batch_normalisation_is_recorded(cli):
    cli(paper_batch_norm, *POINT.split(), "--total-timesteps", 50, "--run-name", "x", "--target-statistics", "slow")
    saved = model(Path("runs/x"))
    assert saved["script"] == "paper_batch_norm" and saved["args"]["target_statistics"] == "slow"


# Throughput


def test_throughput_reads_the_clock_of_the_log(tmp_path):
    with SummaryWriter(tmp_path) as log:
        for step in 1200, 1400, 2200:
            log.add_scalar("charts/SPS", 0.0, step, walltime=step / 100)
    assert throughput.logged_speed(tmp_path) == 100.0


def test_throughput_of_today_and_of_an_older_commit(tmp_path, monkeypatch, capsys):
    """The older script lacks most flags, and does half as many steps a second."""
    root, name = tmp_path / "repository", "ddpg_continuous_action.py"
    (root / "benchmark").mkdir(parents=True)
    shutil.copy(ROOT / "benchmark/sweep.sh", root / "benchmark")
    (root / "benchmark/jax_ddpg.py").write_text("import no_such_library")
    (root / name).write_text("class Args:\n    learning_starts: int = 0\n")
    git = ["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    for command in ["init", "-q"], ["add", "."], ["commit", "-qm", "older"]:
        subprocess.run([*git, *command], check=True)

    def train(args, entry, threads, copies=1):
        assert entry.root == root or entry.flags == ["--learning-starts", "1000"]
        return [200.0 if entry.root == root else 100.0] * copies

    monkeypatch.setattr(throughput, "ROOT", root)
    monkeypatch.setattr(throughput, "train", train)
    monkeypatch.setattr(throughput, "update_tables", lambda args, scripts: [f"updates of {scripts}"])
    scripts, out = (name, f"{name} --n-step 3", "benchmark/jax_ddpg.py", "benchmark/missing.py"), tmp_path / "page.md"
    throughput.main(throughput.Args(scripts, "HEAD", steps=1000, rounds=1, threads=(1,), cores=2, out=out))
    page = capsys.readouterr().out
    assert out.read_text() == page
    assert f"\n| {name} | 200 (200 to 200) |\n" in page
    assert page.count(f"\n| {name} at HEAD | 100 (100 to 100) |\n") == 1  # measured once, though compared twice
    for today in scripts[:2]:
        assert f"\n| {today} / {name} at HEAD | 2.00 (2.00 to 2.00) |\n" in page
    assert "\n| 2 | 400 (400 to 400) | 2.00 (2.00 to 2.00) |\n" in page  # side by side
    assert "Left out: benchmark/jax_ddpg.py: ModuleNotFoundError: No module named 'no_such_library'\n" in page
    assert "Left out: benchmark/missing.py: no such file\n" in page
    with pytest.raises(SystemExit) as end:
        throughput.main(throughput.Args(scripts=scripts, against="no-such-commit"))
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: --against no-such-commit: ")
