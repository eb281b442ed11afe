"""Sweeps with the real scripts, killed and started again; the report against numbers computed here by hand."""

import contextlib
import csv
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
from conftest import scalars
from matplotlib.testing.compare import compare_images
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))
import baselines
import paper_batch_norm
import plot_noise
import report
import sb3_ddpg
import throughput

import ddpg_continuous_action as script
import ddpg_paper_faithful as paper

ROOT = Path(__file__).resolve().parents[1]
HELD = os.environ | {"PYTHONPATH": str(ROOT / "tests")}  # for waiting:Waiting-v0
FLAGS = "--learning-starts 100 --batch-size 16 --eval-interval 500 --eval-episodes 2 --final-eval-episodes 3"
FLAGS = f"{FLAGS} --checkpoint-interval 500".split()


def sweep_command(*settings, flags=FLAGS):
    return [ROOT / "benchmark/ddpg_continuous_action.sh", f"PYTHON={sys.executable}", *settings, "--", *flags]


def sweep(folder, *settings, flags=FLAGS, **options):
    options = dict(cwd=folder, capture_output=True, text=True, timeout=600) | options
    return subprocess.run(sweep_command(*settings, flags=flags), **options)


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


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def evaluations(run_dir):
    return [(int(row["global_step"]), float(row["mean"])) for row in read_csv(run_dir / "eval.csv")]


def test_sweep_killed_and_started_again(tmp_path, hold):
    variant = "--tau 0.01 --gamma 0.98"  # its tau wins over the one that all runs share
    settings = [
        "ENVS=waiting:Waiting-v0",
        "SEEDS=1 2",
        "VARIANT=default",
        f"VARIANT={variant}",
        "STEPS=1.2e3",
        "JOBS=2",
    ]
    out, steps = tmp_path / "runs/ddpg_continuous_action", list(range(100, 1201, 100))
    flags = " ".join([*FLAGS, "--tau 0.02"]).replace("--eval-interval 500", "--eval-interval 100").split()
    command = sweep_command(*settings, flags=flags)
    names = {  # by their labels in the report; 0.02 is not the script's default
        "--tau 0.02": [f"waiting-Waiting-v0__ddpg_continuous_action__{seed}" for seed in (1, 2)],
        "--gamma 0.98 --tau 0.01": [
            f"waiting-Waiting-v0__ddpg_continuous_action__gamma-0.98_tau-0.01__{seed}" for seed in (1, 2)
        ],
    }
    seed_1, seed_2 = (set(pair) for pair in zip(*names.values(), strict=True))
    hold.write_text("700")  # where the runs of seed 2 wait, with a checkpoint behind them
    process = subprocess.Popen(command, cwd=tmp_path, env=HELD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(lambda: all((out / name / "result.json").exists() for name in seed_1))
    wait_until(lambda: all((out / name / "checkpoint.pt").exists() for name in seed_2))
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 130, output
    assert "run the same command again to resume" in output
    assert {path.parent.name for path in out.glob("*/result.json")} == seed_1
    for name in seed_2:
        assert "stopped: ended at step" in (out / f"{name}.log").read_text()
    kept = {name: (out / name / "result.json").stat().st_mtime_ns for name in seed_1}

    hold.unlink()
    again = sweep(tmp_path, *settings, flags=flags, env=HELD)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 done, 0 running, 0 waiting, 0 failed" in again.stdout
    for label, pair in names.items():
        for name in pair:
            commands = [line for line in (out / f"{name}.log").read_text().splitlines() if line.startswith("$ ")]
            assert len(commands) == 1 + (name in seed_2)  # nothing is run twice
            assert ("--resume" in commands[-1]) == (name in seed_2)
            assert [step for step, _ in evaluations(out / name)] == steps
            args = json.loads((out / name / "args.json").read_text())["args"]
            assert (args["gamma"], args["tau"]) == ((0.99, 0.02) if label == "--tau 0.02" else (0.98, 0.01))
    assert kept == {name: (out / name / "result.json").stat().st_mtime_ns for name in seed_1}

    # Other settings in the same folder would mix two experiments in one table; more runs of the same are welcome
    other = sweep(tmp_path, *settings, flags=[*flags, "--gamma", "0.9"])
    assert other.returncode == 2 and "other settings" in other.stderr and other.stderr.count("\n") == 1
    more = sweep(tmp_path, *settings, "VARIANT=--gamma 0.9", "SEEDS=1 2 3", "--dry-run", flags=flags)
    assert more.returncode == 0 and len(more.stdout.splitlines()) == 5  # three of the new variant, two of seed 3

    # The report, to the digit
    made = subprocess.run([sys.executable, ROOT / "benchmark/report.py", out], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    rows = read_csv(out / "report/results.csv")
    for label, pair in names.items():
        finals = [statistics.fmean(mean for _, mean in evaluations(out / name)[2:]) for name in pair]  # of 12
        reported = {row["seed"]: float(row["final_return"]) for row in rows if row["variant"] == label}
        assert reported == {"1": pytest.approx(finals[0], rel=1e-12), "2": pytest.approx(finals[1], rel=1e-12)}
        shown = f"**{statistics.fmean(finals):,.1f} ± {statistics.stdev(finals):,.1f}**".replace("-", "−")
        assert shown in (out / "report/results.md").read_text() and shown in made.stdout
    for name in ("learning_curves.png", "q_estimates.png"):
        assert (out / "report" / name).stat().st_size > 1000


def test_sweep_killed_outright_finds_its_run_still_going(tmp_path, hold):
    settings = ["ENVS=waiting:Waiting-v0", "SEEDS=2", "STEPS=2e3", "OUT=runs/sweep"]
    hold.write_text("700")
    quiet = dict(cwd=tmp_path, env=HELD, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(sweep_command(*settings), **quiet)
    run_dir = tmp_path / "runs/sweep/waiting-Waiting-v0__ddpg_continuous_action__2"
    log = run_dir.with_name(f"{run_dir.name}.log")
    wait_until((run_dir / "eval.csv").exists)
    process.kill()
    again = subprocess.Popen(sweep_command(*settings), **quiet | dict(stdout=subprocess.PIPE), text=True)
    wait_until(lambda: "waiting for another process" in log.read_text())
    hold.unlink()
    output = again.communicate(timeout=600)[0]
    assert again.returncode == 0 and "1 done, 0 running, 0 waiting, 0 failed" in output
    assert log.read_text().count("$ ") == 1
    assert [step for step, _ in evaluations(run_dir)] == [500, 1000, 1500, 2000]


def test_failed_run_fails_the_sweep_but_not_the_others(tmp_path):
    failed = sweep(tmp_path, "ENVS=NoSuch-v5 Pendulum-v1", "SEEDS=1", "STEPS=600", "JOBS=2", "OUT=runs/sweep")
    assert failed.returncode == 1
    assert (tmp_path / "runs/sweep/Pendulum-v1__ddpg_continuous_action__1/result.json").exists()
    assert "1 done, 0 running, 0 waiting, 1 failed" in failed.stdout
    assert "failed: NoSuch-v5__ddpg_continuous_action__1" in failed.stderr
    assert "Environment `NoSuch` doesn't exist" in failed.stderr  # the end of its log


def test_dry_run_prints_the_commands_in_their_order_and_writes_nothing(tmp_path):
    settings = ["SEEDS=1 2", "STEPS=300e3", "--dry-run", "--slurm"]  # which submits nothing then
    env = os.environ | {"ENVS": "A B/C", "VARIANTS": "default\n\n  --no-x  --y -1\n"}
    dry = sweep(tmp_path, *settings, flags=["--wandb-entity", "a b"], env=env)
    assert dry.returncode == 0 and not list(tmp_path.iterdir())
    runs = [line.split("--run-name ddpg_continuous_action/")[1].split(" ", 1) for line in dry.stdout.splitlines()]
    assert [name.replace("ddpg_continuous_action", "") for name, _ in runs] == [
        *("A____1", "B-C____1", "A____no-x_y--1__1", "B-C____no-x_y--1__1"),  # all of seed 1 first
        *("A____2", "B-C____2", "A____no-x_y--1__2", "B-C____no-x_y--1__2"),
    ]
    assert "--env-id B/C --seed 2 " in dry.stdout.splitlines()[-1]
    assert runs[0][1].strip() == "--total-timesteps 300000 --num-threads 1 --wandb-entity a\\ b"
    assert runs[-1][1].strip() == "--total-timesteps 300000 --num-threads 1 --wandb-entity a\\ b --no-x --y -1"


def test_a_variant_in_json_is_passed_on_intact_and_names_its_runs_readably(tmp_path):
    json_value = '{"max_episode_steps":500,"xml_file":"/tmp/a_b.xml","range":[1,-2.5e-3],"deep":{"x":true}}'
    settings = ["ENVS=A-v0", "SEEDS=1", "STEPS=300e3", "--dry-run"]
    dry = sweep(tmp_path, *settings, f"VARIANT=--tau 0.1 --env-kwargs {json_value}", "VARIANT=--env-kwargs {}")
    first, second = (shlex.split(line) for line in dry.stdout.splitlines())
    assert first[-4:] == ["--tau", "0.1", "--env-kwargs", json_value] and second[-1] == "{}"
    names = [line[line.index("--run-name") + 1].split("__") for line in (first, second)]
    named = "env-kwargs-max_episode_steps-500-xml_file--tmp-a_b.xml-range-1--2.5e-3-deep-x-true_tau-0.1"
    assert names[0][2:] == [named, "1"] and names[1][2:] == ["env-kwargs-", "1"]


@pytest.mark.parametrize(
    "setting",
    [
        *("SEED=1", "SEEDS=1 1", "OUT=elsewhere", "OUT=runs/../x", "STEPS=many", "STEPS=1.5", "STEPS=0", "JOBS=0"),
        *("THREADS=0", "ENVS= ", "PYTHON=no", "VARIANT=tau 1", "VARIANT=--tau $(id)", "VARIANT=--tau ../x"),
        *("VARIANT=--tau=1", "VARIANT=--seed 1", "VARIANT=--tau 1 --resume x"),
        *(
            'VARIANT=--x {"a": 1}',
            'VARIANT=--x {"a"',
            "VARIANT=--x {'a':1}",
            'VARIANT=--x {"a":$(id)}',
            'VARIANT=--x "a"',
        ),
        *("VARIANT=default VARIANT=", "VARIANT=--a 1 --b 2 VARIANT=--b  2 --a 1"),  # the same one twice
    ],
)
def test_bad_setting_is_one_line(tmp_path, setting):
    bad = sweep(tmp_path, *setting.replace(" VARIANT", "\nVARIANT").split("\n"))
    assert bad.returncode == 2 and not list(tmp_path.iterdir())
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


def test_slurm_submits_what_is_left_and_a_task_passes_signals_on(tmp_path):
    """Against a stand-in for sbatch; tests/slurm.sh tries the real one."""
    stub = tmp_path / "bin/sbatch"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$@" >sbatch_args\ncat >batch_script\necho 7\n')
    stub.chmod(0o755)
    done = tmp_path / "runs/sweep/Pendulum-v1__ddpg_continuous_action__1"
    done.mkdir(parents=True)
    (done / "result.json").touch()
    env = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    settings = ["ENVS=Pendulum-v1", "SEEDS=1", "VARIANT=", "VARIANT=--tau 0.1"]
    settings.insert(3, 'VARIANT=--tau 0.01 --env-kwargs {"max_episode_steps":100}')
    submitted = sweep(tmp_path, *settings, "STEPS=1e6", "OUT=runs/sweep", "--slurm", env=env)
    assert submitted.returncode == 0, submitted.stderr
    assert "job array 7 of 2 runs (3 in the sweep)" in submitted.stdout
    arguments = (tmp_path / "sbatch_args").read_text().split()
    assert {"--array=1,2", "--requeue", "--open-mode=append"} <= set(arguments)

    def task(index):
        return subprocess.Popen(["bash", "batch_script"], cwd=tmp_path, env=env | {"SLURM_ARRAY_TASK_ID": str(index)})

    assert task(0).wait(timeout=600) == 0  # finished: nothing to do
    name = "Pendulum-v1__ddpg_continuous_action__env-kwargs-max_episode_steps-100_tau-0.01__1"
    process = task(1)
    run_dir = tmp_path / "runs/sweep" / name
    wait_until(lambda: (run_dir / "eval.csv").exists() and evaluations(run_dir))
    args = json.loads((run_dir / "args.json").read_text())["args"]
    assert (args["tau"], args["env_kwargs"]) == (0.01, '{"max_episode_steps":100}')
    log = tmp_path / "runs/sweep" / f"{name}.log"
    second = task(1)  # the same run again, while the first goes on: requeued by a cluster in a hurry
    wait_until(lambda: "waiting for another process" in log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 143
    wait_until(lambda: "--resume" in log.read_text().splitlines()[-1])
    wait_until(lambda: log.read_text().count("results in") == 2)
    second.send_signal(signal.SIGTERM)
    assert second.wait(timeout=600) in (143, -signal.SIGTERM)
    assert log.read_text().count("$ ") == 2


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if not shellcheck:
        pytest.skip("no shellcheck")
    scripts = [*ROOT.glob("benchmark/*.sh"), *ROOT.glob("tests/*.sh")]
    assert len(scripts) >= 4
    subprocess.run([shellcheck, *scripts], check=True)


# The report, on runs written by hand

ENTRIES = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "gymnasium": "1.4.0", "mujoco": "4.0.0", "numpy": "2.4.6"},
    "hardware": {"threads": 1, "gpu": None},
}


def write_run(
    folder,
    env_id,
    seed,
    means,
    exp_name="ddpg_continuous_action",
    tail="",
    complete=True,
    final_eval=None,
    defaults=None,
    **flags,
):
    run_dir = folder / "_".join(
        [env_id, exp_name, str(seed), *(re.sub(r"\W", "", str(flag)) for flag in flags.values())]
    )
    run_dir.mkdir(parents=True)
    args = dict(exp_name=exp_name, env_id=env_id, seed=seed, run_name=run_dir.name, learning_starts=0) | flags
    record = {"args": args} | ({"defaults": defaults} if defaults else {}) | ENTRIES
    (run_dir / "args.json").write_text(json.dumps(record))
    (run_dir / ".lock").touch()
    (folder / f"{run_dir.name}.log").write_text("step 5,000: evaluation 1.0\n")
    rows = "".join(f"{5000 * (i + 1)},{mean},1.0,0.0,2.0,10\n" for i, mean in enumerate(means))
    (run_dir / "eval.csv").write_text("global_step,mean,std,min,max,episodes\n" + rows + tail)
    if complete:
        result = {"global_step": 5000 * len(means), "seconds": 3600.0, "steps_per_second": 100.0, "final_eval": None}
        if final_eval is not None:
            result["final_eval"] = {"mean": final_eval, "std": 1.0, "min": 0.0, "max": 2.0, "episodes": 100}
        (run_dir / "result.json").write_text(json.dumps(result))
    return run_dir


def run_report(*arguments):
    """As its command line does, in this process."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            report.main(tyro.cli(report.Args, args=[str(argument) for argument in arguments]))
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def write_log(run_dir, scalars):
    with SummaryWriter(run_dir) as log:
        for tag, values in scalars.items():
            for step, value in values:
                log.add_scalar(tag, value, step)


def read_runs(*folders, **flags):
    return report.read_runs(report.Args(runs=folders, **flags))


def q_estimates(run_dir):
    (evaluations,) = read_runs(run_dir)["evaluations"]
    return evaluations["q_estimate"].dropna()


def rows_of(table):
    """The rows of a table in Markdown, each {column: cell}."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def table_rows(*folders, **flags):
    return rows_of(report.results_table(read_runs(*folders, **flags), report.Args(**flags)))


def test_report_on_odd_input(tmp_path):
    runs = tmp_path / "runs"
    means = list(range(0, 1200, 100))  # 12 evaluations; the last 10 have the mean 650
    write_run(runs, "Hopper-v5", 1, means)
    write_run(runs, "Hopper-v5", 2, [mean + 100 for mean in means])
    write_run(runs, "Hopper-v5", 3, means[:11], tail="60000,12", complete=False)
    (write_run(runs, "Hopper-v5", 4, means) / "args.json").write_text('{"args": {')
    (write_run(runs, "Hopper-v5", 5, means) / "result.json").write_text("{}")
    (write_run(runs, "Hopper-v5", 6, means) / "args.json").write_text('{"args": {"env_id": "Hopper-v5"}}')
    write_run(runs, "Hopper-v5", 7, means, tail="65000,12\n")
    write_run(runs, "Hopper-v5", 8, [])
    broken = write_run(runs, "Hopper-v5", 9, means)
    (broken / "q_estimates.csv").write_text("global_step,q_estimate,discounted_return\n5000,oh\n")
    write_run(runs / "twice", "Hopper-v5", 1, means)
    made = run_report(runs)
    assert made.returncode == 0 and "Traceback" not in made.stderr
    warnings = [line for line in made.stderr.splitlines() if line.startswith("warning: ")]
    expected = [
        f"Hopper-v5_ddpg_continuous_action_{seed}: cannot be read and is left out" for seed in (4, 5, 6, 7, 8, 9)
    ]
    expected.append("Hopper-v5_ddpg_continuous_action_3: incomplete (it has no result.json) and left out")
    expected.append("twice/Hopper-v5_ddpg_continuous_action_1: left out, ")
    for text in expected:
        assert sum(text in line for line in warnings) == 1, (text, warnings)
    assert len(warnings) == len(expected)
    rows = [line for line in made.stdout.splitlines() if line.startswith("| Hopper")]
    assert [row.split(" | ")[1:5] for row in rows] == [["60,000", "2", "**700.0 ± 70.7**", "650, 750"]]


def test_report_without_complete_runs_is_one_line(tmp_path):
    empty = run_report(tmp_path)
    assert empty.returncode == 2 and empty.stderr.startswith("error: no complete runs")
    assert empty.stderr.count("\n") == 1


def test_variants_are_labelled_with_the_flags_in_which_they_differ(tmp_path, capsys):
    write_run(tmp_path / "a", "Hopper-v5", 1, [1] * 10)  # older than the flags of the next ones
    write_run(tmp_path / "a", "Hopper-v5", 1, [1] * 10, learning_rate=1e-3, batch_size=128, num_threads=2)
    write_run(tmp_path / "a", "Hopper-v5", 2, [1] * 10, learning_rate=3e-4, num_threads=1, gamma=0.99)
    for batch_norm, momentum in ("both", 0.001), ("actor", 0.001), ("none", 0.1), ("none", 0.001):
        run = dict(exp_name="ddpg_paper_faithful", critic_lr=1e-2, batch_norm=batch_norm, batch_norm_momentum=momentum)
        write_run(tmp_path / "b", "Hopper-v5", 1, [1] * 10, **run)
    runs = read_runs(tmp_path / "a")
    assert list(zip(runs["variant"], runs["seed"], strict=True)) == [
        ("default", 1),
        ("default", 2),
        ("--learning-rate 0.001 --batch-size 128", 1),
    ]
    assert capsys.readouterr().err == ""
    runs = read_runs(tmp_path / "b")  # the same rate in all of them is no difference
    assert list(runs["variant"]) == ["default", "--batch-norm actor", "--batch-norm none"]
    problem = capsys.readouterr().err
    assert problem.count("\n") == 1 and "left out, another run has its flags and seed" in problem  # no momentum then
    runs = read_runs(tmp_path / "a", tmp_path / "b")
    assert runs["variant"].iloc[0] == "ddpg_continuous_action"
    assert runs["variant"].iloc[-1] == "ddpg_paper_faithful --batch-norm none"


def test_a_copys_runs_are_named_by_its_own_defaults(tmp_path):
    """As its args.json records them: a flag that the copy added is none of the scripts'."""
    defaults = dict(exp_name="my_ddpg", bonus=0.5, tau=0.02)
    for bonus in 0.5, 2.0:
        write_run(tmp_path, "Hopper-v5", 1, [1] * 10, "my_ddpg", bonus=bonus, tau=0.02, defaults=defaults)
    assert list(read_runs(tmp_path)["variant"]) == ["default", "--bonus 2"]
    write_run(tmp_path, "Hopper-v5", 1, [1] * 10)
    expected = ["ddpg_continuous_action", "my_ddpg", "my_ddpg --bonus 2"]
    assert list(read_runs(tmp_path)["variant"]) == expected
    write_run(tmp_path, "Hopper-v5", 1, [1] * 10, "my_ddpg", bonus=0.5, tau=0.005, defaults=defaults)
    assert sorted(read_runs(tmp_path)["variant"]) == [*expected[:2], "my_ddpg --bonus 2", "my_ddpg --tau 0.005"]


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
        tags = ("eval/q_estimate", q), ("eval/discounted_return", discounted), ("charts/episodic_return", episodes)
        write_log(run_dir, dict(tags))
    (row,) = table_rows(tmp_path, solved_above=90.0, training_return=True)
    assert row["steps"] == "60,000" and row["seeds"] == "4"
    assert row["final return"] == "**9.5 ± 3.7**"  # of 10.4, 11.3, 12.2 and 4
    assert row["each seed"] == "10, 11, 12, 4"
    assert (row["lowest of last 10"], row["highest of last 10"]) == ("1", "95")  # seed 1's, and that of three
    assert row["final evaluation"] == "85.0 ± 12.9"
    assert row["solved (seeds)"] == "3 of 4"
    assert row["first solved at step (median)"] == "25,000"  # of 20,000, 25,000 and 50,000
    assert row["training return, last 100 episodes"] == "49.5 ± 0.0"
    assert row["Q − discounted return"] == "29.0 ± 12.9"  # of 14, 24, 34 and 44
    assert row["random"] == "17.0" and row["untrained"] == "48.0" and row["hours"] == "1.00"

    (row,) = table_rows(tmp_path, solved_above=90.0, training_return=True, up_to=20e3)
    assert row["steps"] == "20,000" and row["solved (seeds)"] == "1 of 4"
    assert row["Q − discounted return"] == "24.0 ± 12.9"  # the mean of the first four
    # What was measured at the end says nothing of the first 20,000 steps
    assert not {"final evaluation", "training return, last 100 episodes", "hours"} & row.keys()

    write_run(tmp_path, "Hopper-v5", 5, [1.0] * 12)  # without a final evaluation, as before there was one
    (row,) = table_rows(tmp_path)
    assert row["seeds"] == "5" and "final evaluation" not in row  # four of the seeds are not the row

    on_gpu = write_run(tmp_path, "Hopper-v5", 6, [1.0] * 12)
    record = json.loads((on_gpu / "args.json").read_text())
    (on_gpu / "args.json").write_text(json.dumps(record | {"hardware": {"threads": 1, "gpu": "NVIDIA H100"}}))
    (row,) = table_rows(tmp_path)
    assert row["seeds"] == "6" and not {"steps/s", "hours"} & row.keys()  # of two kinds of hardware


@pytest.mark.parametrize("learning_starts, untrained", [(5_000, "10.0"), (4_999, None)])
def test_untrained_policy_from_pixels_is_the_run_before_learning(tmp_path, learning_starts, untrained):
    flags = dict(pixels=True, critic_lr=1e-3, learning_starts=learning_starts)
    write_run(tmp_path, "Hopper-v5", 1, [10] + [50] * 9, **flags)  # evaluated at 5,000 steps
    (row,) = table_rows(tmp_path)
    assert row.get("untrained") == untrained and "random" not in row


def write_seeds(folder, env_id, finals, steps=1_000_000, **flags):
    """Runs of seeds 1, 2 and so on, whose last ten evaluations are these numbers."""
    for seed, final in enumerate(finals, 1):
        write_run(folder, env_id, seed, [0] * (steps // 5000 - 10) + [final] * 10, **flags)


@pytest.mark.parametrize(
    "finals, std, seeds, difference, verdict",
    [
        # Welch: 30² / 3 twice, 4 degrees of freedom, t = 2.776, so ± 68.0
        ((70, 100, 130), 30, 3, 67.9, "level"),
        ((70, 100, 130), 30, 3, 68.1, "higher"),
        ((70, 100, 130), 30, 3, -67.9, "level"),
        ((70, 100, 130), 30, 3, -68.1, "lower"),
        # 30² / 3 and 60² / 12 are 300 each, so 600² / (300² / 2 + 300² / 11) = 6.77 degrees, t = 2.381, ± 58.3
        ((70, 100, 130), 60, 12, 58.2, "level"),
        ((70, 100, 130), 60, 12, 58.4, "higher"),
        # Of the published only the mean: 2 degrees, t = 4.303, 30 / √3, so ± 74.5
        ((70, 100, 130), math.nan, 10, 74.4, "level"),
        ((70, 100, 130), math.nan, 10, 74.6, "higher"),
        ((70, 100, 130), math.nan, 10, -74.6, "lower"),
        ((70, 100, 130), 30, 1, 74.4, "level"),  # nor has a single seed a spread
        ((1000, 1000, 1000), math.nan, 10, 0.0, "level"),
        ((1000, 1000, 1000), math.nan, 10, 0.1, "higher"),
        ((100,), 30, 3, 1000.0, ""),
    ],
)
def test_verdict_is_by_the_95_percent_interval(finals, std, seeds, difference, verdict):
    best = {"mean": statistics.fmean(finals) - difference, "std": std, "seeds": seeds}
    assert report.verdict(pd.Series(finals, dtype=float), best) == verdict


def test_best_published_returns_are_of_our_protocol():
    """Neither noisy training returns nor maxima over time, and of one number of steps."""
    best = {env: (row["mean"], row["seeds"]) for (env, steps), row in report.BEST.iterrows() if steps == 1_000_000}
    assert best == {
        "HalfCheetah": (11652.89, 10),
        "Walker2d": (2426.0, 3),  # 3,098.11 is a maximum
        "Hopper": (2009.04, 5),
        "Ant": (1243.04, 3),
        "Swimmer": (142.30, 10),
        "Humanoid": (1020.7, 8),  # 1,699.56 is a training return
        "Reacher": (-3.94, 3),
        "InvertedPendulum": (924.53, 10),
        "InvertedDoublePendulum": (8296.89, 10),
    }
    assert report.BEST.loc[("Walker2d", 990_000), "mean"] == 2306.0


def test_best_table_has_a_row_per_task(tmp_path):
    # Published is 2,009.04 ± 869.92 of 5: 100² / 3 + 869.92² / 5, 4.17 degrees of freedom, t = 2.733, so ± 1,074.9
    write_seeds(tmp_path, "Hopper-v5", (2900, 3000, 3100))
    write_seeds(tmp_path, "Hopper-v5", (3000, 3100, 3200), n_step=3)
    write_seeds(tmp_path, "HalfCheetah-v5", (6400, 6500, 6600), steps=300_000)
    write_seeds(tmp_path, "Pusher-v5", (-30,))
    runs = read_runs(tmp_path)
    cheetah, hopper, pusher = rows_of(report.best_table(runs, report.Args(recommended=("Hopper-v5 --n-step 3",))))
    assert hopper == {
        "environment": "Hopper-v5",
        "steps": "1,000,000",
        "untrained": "48.0",
        "ours, default": "3,000.0 ± 100.0 (3 seeds)",
        "recommended": "--n-step 3",
        "ours, recommended": "3,100.0 ± 100.0 (3 seeds)",
        "best published": "2,009.0 ± 869.9",
        "by": "rl-blox, DDPG (learning rate 1e-3), v5, 5 seeds",
        "verdict": "higher",
    }
    assert cheetah["recommended"] == "default" and cheetah["ours, recommended"] == "6,500.0 ± 100.0 (3 seeds)"
    # Published after a million steps, or as training returns only
    for row in cheetah, pusher:
        assert (row["best published"], row["by"], row["verdict"]) == ("—", "", "")
    assert pusher["ours, default"] == "−30.0 (1 seed)"
    (hopper,) = rows_of(report.best_table(runs[runs["environment"] == "Hopper-v5"], report.Args()))
    assert hopper["verdict"] == "level" and hopper["ours, default"] == "3,000.0 ± 100.0"


@pytest.mark.parametrize("recommended", ["Hoper-v5 default", "Hopper-v5", "Hopper-v5 --n-step 4"])
def test_best_table_refuses_what_it_lacks_in_one_line(tmp_path, recommended, capsys):
    write_run(tmp_path, "Hopper-v5", 1, [1] * 10)
    with pytest.raises(SystemExit) as end:
        report.best_table(read_runs(tmp_path), report.Args(recommended=(recommended,)))
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_variants_table_has_a_column_per_variant(tmp_path, capsys):
    write_seeds(tmp_path, "Hopper-v5", (90, 110), steps=100_000, learning_rate=1e-3)
    write_seeds(tmp_path, "Hopper-v5", (100, 200), steps=100_000)
    write_seeds(tmp_path, "Hopper-v5", (200, 300), steps=50_000, n_step=3)
    write_seeds(tmp_path, "Ant-v5", (10, 30), steps=100_000)
    ant = {"environment": "Ant-v5", "steps": "100,000", "default": "20.0 ± 14.1"}
    short = {"environment": "Hopper-v5", "steps": "50,000", "default": ""}
    long = {"environment": "Hopper-v5", "steps": "100,000", "default": "150.0 ± 70.7"}
    rows = rows_of(report.variants_table(read_runs(tmp_path), report.Args()))
    assert rows == [
        ant | {"--learning-rate 0.001": "", "--n-step 3": ""},
        short | {"--learning-rate 0.001": "", "--n-step 3": "250.0 ± 70.7"},
        long | {"--learning-rate 0.001": "100.0 ± 14.1", "--n-step 3": ""},
    ]
    shown = tyro.cli(report.Args, args=["--variant=--learning-rate 0.001", "--variant=default", str(tmp_path)])
    shown.env_ids = ("Hopper-v5", "Ant-v5")
    rows = rows_of(report.variants_table(report.read_runs(shown), shown))
    assert list(rows[0]) == ["environment", "steps", "--learning-rate 0.001", "default"]
    assert [row["environment"] for row in rows] == ["Hopper-v5", "Ant-v5"]

    write_run(tmp_path, "Ant-v5", 3, [20] * 20)
    (ant, *_) = rows_of(report.variants_table(read_runs(tmp_path), report.Args()))
    assert ant["default"] == "20.0 ± 10.0 (3 seeds)"  # where the others have two
    with pytest.raises(SystemExit):
        read_runs(tmp_path, variant=("--n-step 5",))
    expected = "error: no run is of the variant --n-step 5; there are default, --learning-rate 0.001, --n-step 3\n"
    assert capsys.readouterr().err == expected


def test_runs_on_two_machines_are_pooled_on_request(tmp_path, capsys):
    write_seeds(tmp_path / "a", "Hopper-v5", (100, 200), steps=50_000)
    write_run(tmp_path / "b", "Hopper-v5", 1, [600] * 10 + [0] * 10)  # the same seed until step 50,000
    write_run(tmp_path / "b", "Hopper-v5", 2, [200] * 20)  # on the same machine: it says nothing new
    both = tmp_path / "a", tmp_path / "b"
    (row,) = table_rows(*both, up_to=50e3)
    assert row["seeds"] == "2" and row["final return"] == "**150.0 ± 70.7**"
    assert capsys.readouterr().err.count("left out, another run has its flags and seed (see --pool)\n") == 2
    (row,) = table_rows(*both, up_to=50e3, pool=True)
    assert row["seeds"] == "3 runs of 2" and row["each seed"] == "100, 600, 200"
    assert row["final return"] == "**300.0 ± 264.6**" and row["steps"] == "50,000"
    assert "steps/s" not in row  # measured over the whole runs
    assert capsys.readouterr().err.count("\n") == 1
    (row,) = rows_of(report.variants_table(read_runs(*both, up_to=50e3, pool=True), report.Args()))
    assert row["default"] == "300.0 ± 264.6 (3 runs of 2 seeds)"


def test_summary_for_a_paper(tmp_path):
    finals = [-40, 10, 20, 30, 200]
    write_seeds(tmp_path, "Hopper-v5", finals, steps=50_000)
    write_seeds(tmp_path, "Ant-v5", finals[:4], steps=50_000, n_step=3)
    write_seeds(tmp_path, "Pusher-v5", finals[:1], steps=50_000)
    made = run_report(tmp_path)
    assert made.returncode == 0, made.stderr
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
    assert (tmp_path / "report/learning_curves.pdf").read_bytes().startswith(b"%PDF")


def drawn(monkeypatch, runs, folder):
    """The data of the learning curves, and the column that tells their panels apart."""
    draw, calls = report.draw, []

    def spied_draw(data, path, formats, **look):
        calls.append((data, look["col"]))
        draw(data, path, formats, **look)

    with monkeypatch.context() as patch:
        patch.setattr(report, "draw", spied_draw)
        report.draw_returns(runs, folder)
    return calls[0]


def test_a_panel_has_at_most_six_curves(tmp_path, monkeypatch):
    for i, tau in enumerate((0.005, 0.01, 0.02, 0.03, 0.04, 0.05)):
        write_run(tmp_path, "Hopper-v5", 1, [i] * 10, tau=tau)
    write_run(tmp_path, "Ant-v5", 1, [9] * 10)
    data, panel = drawn(monkeypatch, read_runs(tmp_path), tmp_path)
    assert panel == "environment" and data["variant"].nunique() == 6 + 2  # untrained and random policies

    write_run(tmp_path, "Hopper-v5", 1, [6] * 10, tau=0.06)
    data, panel = drawn(monkeypatch, read_runs(tmp_path), tmp_path)
    assert panel == "panel" and list(data["panel"].unique()) == [
        *(f"Hopper-v5\n{variant}" for variant in ("default", "--tau 0.01", "--tau 0.02", "--tau 0.03", "--tau 0.04")),
        *("Hopper-v5\n--tau 0.05", "Hopper-v5\n--tau 0.06", "Ant-v5\ndefault"),
    ]
    shown = data[data["panel"] == "Hopper-v5\n--tau 0.03"].groupby("variant")["return"].mean()
    assert dict(shown) == pytest.approx({"default": 0, "as in the title": 3, "untrained": 48.03, "random": 17.04})


def test_reference_line_is_of_as_many_steps(tmp_path, monkeypatch):
    write_seeds(tmp_path, "Hopper-v5", [1])
    write_seeds(tmp_path, "Ant-v5", [1], steps=300_000)
    runs = read_runs(tmp_path)
    data, _ = drawn(monkeypatch, runs, tmp_path)
    lines = data[data["variant"] == "best published"]
    assert list(zip(lines["environment"], lines["steps"], lines["return"], strict=True)) == [
        ("Hopper-v5", 0, 2009.04),
        ("Hopper-v5", 1_000_000, 2009.04),
    ]
    data, _ = drawn(monkeypatch, read_runs(tmp_path, up_to=300e3), tmp_path)
    assert "best published" not in set(data["variant"])


def test_published_returns_are_of_gymnasiums_own_tasks(tmp_path):
    write_seeds(tmp_path, "Hopper-v5", [1.0])
    write_seeds(tmp_path, "Hopper-v5", [1.0], env_kwargs='{"max_episode_steps": 500}')
    for env_id in "Hopper-v5-heavy-v0", "Hopper-v0", "mine:Hopper-v5":
        write_seeds(tmp_path, env_id, [1.0])
    runs = read_runs(tmp_path)
    known = runs[(runs["environment"] == "Hopper-v5") & (runs["variant"] == "default")]
    assert len(runs) == 5 and len(known) == 1 and known[list(report.LEVELS)].notna().all(axis=None)
    assert runs.drop(known.index)[list(report.LEVELS)].isna().all(axis=None)


def test_published_table_has_every_figure():
    cells = report.published_table()
    for row in read_csv(ROOT / "benchmark/published_returns.csv"):
        spread = f" ± {float(row['std']):,.1f}" if row["std"] else ""
        assert f"| {float(row['mean']):,.1f}{spread} ({row['env_version']}) |".replace("-", "−") in cells


def test_exports_of_a_sweep_as_it_grows(tmp_path):
    data, runs = tmp_path / "data", tmp_path / "runs"
    write_run(runs, "Hopper-v5", 1, [1] * 10)
    unfinished = write_run(runs, "Hopper-v5", 2, [1] * 9, complete=False)
    report.export(read_runs(runs), data)
    assert list(read_runs(data)["seed"]) == [1] and not (data / unfinished.name).exists()
    shutil.rmtree(runs)  # another machine goes on
    (write_run(runs, "Hopper-v5", 2, [2] * 10) / "checkpoint.pt").touch()
    report.export(read_runs(runs), data)
    assert [run.evaluations["mean"].iloc[-1] for run in read_runs(data).itertuples()] == [1, 2]
    assert not list(data.rglob("checkpoint.pt"))


def test_export_neither_mixes_nor_deletes(tmp_path, capsys):
    data, runs = tmp_path / "data", tmp_path / "runs"
    name = write_run(runs, "Hopper-v5", 1, [1] * 10).name
    report.export(read_runs(runs), data)
    write_run(tmp_path / "other", "Hopper-v5", 1, [2] * 10)
    write_run(tmp_path / "twins", "Hopper-v5", 1, [1] * 10)
    write_run(tmp_path / "twins/again", "Hopper-v5", 1, [1] * 10, tau=0.01).rename(tmp_path / "twins/again" / name)
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    for folder in "other", "twins":
        with pytest.raises(SystemExit):
            report.export(read_runs(tmp_path / folder), data)
        assert "holds another run of that name" in capsys.readouterr().err
    report.export(read_runs(data), data)
    assert before == {path: path.read_bytes() for path in data.rglob("*.*")}


def test_page_is_made_from_the_exported_data(tmp_path):
    run_dir = write_run(tmp_path / "runs", "Hopper-v5", 1, range(0, 1000, 100))
    q, discounted = [(5000, 50.0), (10000, 100.0)], [(5000, 40.5), (10000, 40.5)]
    episodes = [(step, float(step)) for step in range(100)]
    tags = ("eval/q_estimate", q), ("eval/discounted_return", discounted), ("charts/episodic_return", episodes)
    write_log(run_dir, dict(tags))
    data = tmp_path / "benchmark/results/short"
    assert run_report(tmp_path / "runs", "--export", data).returncode == 0
    assert (tmp_path / "runs/report/q_estimates.pdf").read_bytes().startswith(b"%PDF")
    exported = data / run_dir.name
    assert (exported / "eval.csv").read_bytes() == (run_dir / "eval.csv").read_bytes()
    assert (exported / "q_estimates.csv").read_text() == (
        "global_step,q_estimate,discounted_return\n5000,50,40.5\n10000,100,40.5\n"
    )
    assert (exported / "training_return.csv").read_text() == "episodes,mean\n100,49.5\n"
    assert table_rows(data, training_return=True) == table_rows(tmp_path / "runs", training_return=True)

    page, other = tmp_path / "README.md", tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- results:short:begin -->\nold\n<!-- results:short:end -->\nafter\n")
    (tmp_path / "table.md").write_text("| a | b |\n")
    other.write_text("<!-- results:decisions:begin --show file table.md -->\n<!-- results:decisions:end -->\n")
    write_run(tmp_path / "runs", "Hopper-v5", 2, range(0, 1000, 100))
    other.open("a").write("<!-- results:seeds:begin --show variants runs/*_[13] -->\n<!-- results:seeds:end -->\n")
    made = run_report("--pages", page, other)
    assert made.returncode == 0, made.stderr
    assert "| Hopper-v5 | 50,000 | 450.0 |" in other.read_text()  # of seeds 1 and 3 there is the one
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "**450.0**" in text
    assert "begin --show file table.md -->\n| a | b |\n<!--" in other.read_text()
    assert (data / "learning_curves.png").exists() and (data / "q_estimates.png").exists()
    assert report.rendered(page, tmp_path) == text
    eval_csv = exported / "eval.csv"
    eval_csv.write_text(eval_csv.read_text().replace("900,1.0", "901,1.0"))
    assert report.rendered(page, tmp_path) != text  # what the next test would notice
    page.write_text(text := "<!-- results:shorts:begin -->\n<!-- results:shorts:end -->\n")
    made = run_report("--pages", page)
    assert made.returncode == 2 and "section shorts: there is nothing at benchmark/results/shorts" in made.stderr
    assert page.read_text() == text


def test_pages_and_tables_are_the_same_in_any_locale(tmp_path):
    """Here in one that knows neither ± nor −."""
    runs = tmp_path / "benchmark/results/runs"
    write_run(runs, "Hopper-v5", 1, [-5.0] * 10, final_eval=-5.0)
    page = tmp_path / "page.md"
    page.write_text("± before\n<!-- results:runs:begin -->\n<!-- results:runs:end -->\n", encoding="utf-8")
    ascii_only = os.environ | dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    for arguments in ["--pages", page], [runs]:
        command = [sys.executable, ROOT / "benchmark/report.py", *arguments]
        done = subprocess.run(command, env=ascii_only, capture_output=True)
        assert done.returncode == 0, done.stderr
    for path in page, runs / "report/results.md":
        assert "| **−5.0** |" in path.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").startswith("± before\n") and not list(tmp_path.glob("*.tmp"))


def test_pages_agree_with_the_committed_data(tmp_path):
    for name in ("README.md", "RESULTS.md"):
        page = ROOT / name
        assert report.rendered(page, tmp_path) == page.read_text(), (
            "run: python benchmark/report.py --pages README.md RESULTS.md"
        )
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}"
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    committed = ROOT / "benchmark/results"
    assert drawn == sorted(path.relative_to(committed) for path in committed.glob("*/*.png"))
    for figure in drawn:
        different = compare_images(str(committed / figure), str(tmp_path / figure), tol=1)
        assert different is None, different


def test_committed_baselines_cover_the_published_set_up():
    measured = {(row["env_id"], row["policy"]) for row in read_csv(ROOT / "benchmark/baselines.csv")}
    for name in ("ddpg_continuous_action", "ddpg_paper_faithful"):
        shell = (ROOT / f"benchmark/{name}.sh").read_text()
        env_ids = shell.split("ENVS:-")[1].split("}")[0].split()
        assert len(env_ids) == 6
        assert {(env_id, policy) for env_id in env_ids for policy in ("random", f"untrained {name}")} <= measured


def test_baselines_are_measured():
    returns = baselines.random_returns("Pendulum-v1", 3)
    assert len(returns) == 3 and returns == baselines.random_returns("Pendulum-v1", 3)
    for name in ("ddpg_continuous_action", "ddpg_paper_faithful"):
        (mean,) = baselines.untrained_returns(name, "Pendulum-v1", 10)
        assert -2000 < mean < -500


def test_committed_baselines_are_what_the_command_measures(tmp_path):
    args = baselines.Args(env_ids=("InvertedPendulum-v5",), out=tmp_path / "baselines.csv")
    baselines.main(args)
    committed = read_csv(ROOT / "benchmark/baselines.csv")
    assert read_csv(args.out) == [row for row in committed if row["env_id"] in args.env_ids]


def test_noise_figure_is_the_committed_one(tmp_path):
    plot_noise.main(plot_noise.Args(out=tmp_path / "noise.png"))
    assert compare_images(str(ROOT / "benchmark/results/noise.png"), str(tmp_path / "noise.png"), tol=1) is None


def run_peer(*flags):
    """The peer's __main__ block, in this process and in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in "SCRIPT", "__file__", "Args", "provenance":
            patch.setattr(script, name, getattr(sb3_ddpg, name))
        patch.setattr(sys, "argv", ["sb3_ddpg.py", *map(str, flags)])
        sb3_ddpg.main(script.parse_args())


def test_peer_leaves_the_same_files_and_starts_over_when_interrupted(tmp_path):
    env = os.environ | {"SCRIPT": "benchmark/sb3_ddpg.py", "ENVS": "Pendulum-v1", "SEEDS": "1", "STEPS": "600"}
    command = [ROOT / "benchmark/sweep.sh", f"PYTHON={sys.executable}", "--", *FLAGS]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=600)
    run_dir = tmp_path / "runs/sb3_ddpg/Pendulum-v1__sb3_ddpg__1"
    assert [step for step, _ in evaluations(run_dir)] == [500, 600]
    result = json.loads((run_dir / "result.json").read_text())
    assert result["evaluations"] == 2 and result["final_eval"]["episodes"] == 3
    record = json.loads((run_dir / "args.json").read_text())
    assert record["script"] == "sb3_ddpg" and "stable_baselines3" in record["versions"]
    assert record["args"]["matmul"] == record["defaults"]["matmul"] == "mkl"  # it has no say in that
    assert not (run_dir / "model.pt").exists()
    assert len(q_estimates(run_dir)) == 2
    assert [step for step, _ in scalars(run_dir)["charts/episodic_return"]] == [200, 400, 600]

    finished = (run_dir / "eval.csv").read_bytes()
    (run_dir / "result.json").unlink()
    (run_dir / "eval.csv").write_text("global_step,mean,std,min,max,episodes\n500,1,1,1,1,2\n")  # as if killed there
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=600)
    assert (run_dir / "eval.csv").read_bytes() == finished
    assert len(q_estimates(run_dir)) == 2  # nothing is in the log twice


def test_peer_is_evaluated_after_each_update_as_ours_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--env-id stubs:Point-v0 --num-threads 1 --learning-starts 20 --batch-size 16 --eval-interval 50"
    for steps in 50, 100:
        run_peer(
            *f"{flags} --eval-episodes 2 --final-eval-episodes 3".split(),
            "--run-name",
            steps,
            "--total-timesteps",
            steps,
        )
    assert evaluations(Path("runs/50")) == evaluations(Path("runs/100"))[:1]


def test_peer_resumes_only_its_own_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = dict(env_id="stubs:Point-v0", total_timesteps=60, learning_starts=20, batch_size=16, eval_interval=0)
    script.main(script.Args(**flags, run_name="ours", final_eval_episodes=0, num_threads=1))
    ours = Path("runs/ours")
    (ours / "result.json").unlink()  # as if interrupted, before its first checkpoint
    before = {path: path.read_bytes() for path in ours.iterdir()}
    with pytest.raises(SystemExit) as end:
        run_peer("--resume", ours)
    assert end.value.code == 2 and "holds a run of ddpg_continuous_action.py" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in ours.iterdir()}


@pytest.mark.parametrize(
    "flag, value",
    [
        *(("noise", "ou"), ("noise_anneal_steps", 10), ("layer_norm", "critic"), ("n_step", 3), ("target_noise", 0.2)),
        *(("policy_frequency", 2), ("matmul", "onednn"), ("evaluate", "runs/x")),
        *(("track", True), ("cudagraphs", True), ("compile", True), ("save_model", True), ("warm_start", "runs/x")),
    ],
)
def test_peer_refuses_what_it_has_not_in_one_line(tmp_path, monkeypatch, capsys, flag, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        sb3_ddpg.main(sb3_ddpg.Args(**{flag: value}))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and f"--{flag.replace('_', '-')}" in error
    assert "stable-baselines3" in error and not list(tmp_path.iterdir())


def test_peer_acts_and_judges_in_our_evaluation_as_by_itself():
    env = script.make_env(script.Args(env_id="Pendulum-v1"))
    model = sb3_ddpg.DDPG("MlpPolicy", env, seed=1, buffer_size=10)
    agent = sb3_ddpg.as_agent(model, script.Args())
    obs = torch.randn(5, 3)
    with torch.no_grad():
        action = agent.actor(obs)
        q = agent.qf(obs, action)
        their_q = model.critic(obs, model.actor(obs))[0]
    assert action.numpy() == pytest.approx(model.predict(obs.numpy(), deterministic=True)[0], abs=1e-6)
    assert action.abs().max() > 0.01  # within -2 and 2, where SB3's own network says half of that
    assert q.numpy() == pytest.approx(their_q.squeeze(1).numpy(), abs=1e-6)


# The modes of batch normalisation in the paper's script


@pytest.mark.parametrize("target, in_targets", [("batch", [-1, 1]), ("copied", [-1 / 3, 1]), ("slow", [-1 / 3, 1])])
@pytest.mark.parametrize("loss, in_actor_loss", [("batch", [-1, 1]), ("running", [-1 / 3, 1])])
def test_modes_of_batch_normalisation(target, in_targets, loss, in_actor_loss):
    """Observations 0 and 4, by their own mean 2 and variance 4, or by running averages of 1 and 9 set here."""
    flags = dict(target_statistics=target, actor_loss_statistics=loss, tau=0.25, batch_norm_momentum=0.0)
    args = paper_batch_norm.Args(batch_size=2, **flags)
    box = gym.spaces.Box(-1, 1, (1,), np.float32)
    agent, normalised = paper_batch_norm.DDPG(args, box, box, torch.device("cpu")), {}
    for name in "actor", "qf", "target_actor", "target_qf":
        norm, seen = getattr(agent, name).input, normalised.setdefault(name, [])
        norm.running_mean.fill_(1.0)
        norm.running_var.fill_(9.0)
        norm.register_forward_hook(lambda _, __, x, seen=seen: seen.append(x.detach().flatten().tolist()))
    obs, zeros = torch.tensor([[0.0], [4.0]]), torch.zeros(2)
    agent.update(paper.Batch(obs, torch.zeros(2, 1), zeros, obs, zeros))
    about = dict(abs=0.01)  # the first step of Adam has changed the scale by 0.001
    assert normalised["target_actor"] == [pytest.approx(in_targets, **about)]
    assert normalised["target_qf"] == [pytest.approx(in_targets, **about)]
    assert normalised["actor"] == [pytest.approx([-1, 1], **about)]
    assert normalised["qf"] == [pytest.approx([-1, 1], **about), pytest.approx(in_actor_loss, **about)]
    assert not agent.actor.training  # acting is by running averages

    for online, slow in (agent.actor, agent.target_actor), (agent.qf, agent.target_qf):
        online.norm1.running_mean.fill_(5.0)
        slow.norm1.running_mean.fill_(1.0)
        online.norm1.running_var.fill_(9.0)
        slow.norm1.running_var.fill_(1.0)
    agent.update_targets()
    for network in agent.target_actor, agent.target_qf:
        mean, variance = {"batch": (1, 1), "copied": (5, 9), "slow": (2, 3)}[target]  # a quarter of the way
        assert (network.norm1.running_mean == mean).all() and (network.norm1.running_var == variance).all()


def test_mode_of_batch_normalisation_killed_and_resumed_gives_the_same_bytes(tmp_path, hold, capsys):
    flags = "--env-id waiting:Waiting-v0 --seed 2 --num-threads 1 --total-timesteps 450 --learning-starts 50 "
    flags += "--batch-size 8 --eval-interval 150 --eval-episodes 2 --final-eval-episodes 0 --checkpoint-interval 200 "
    flags += "--target-statistics slow --actor-loss-statistics running --run-name run"
    command = [sys.executable, ROOT / "benchmark/paper_batch_norm.py"]
    (tmp_path / "whole").mkdir()
    run_dir = tmp_path / "runs/run"
    hold.write_text("250")
    killed = subprocess.Popen([*command, *flags.split()], cwd=tmp_path, env=HELD, stderr=subprocess.DEVNULL)
    subprocess.run([*command, *flags.split()], cwd=tmp_path / "whole", env=HELD, check=True)
    wait_until((run_dir / "checkpoint.pt").exists)
    killed.send_signal(signal.SIGTERM)
    assert killed.wait(timeout=600) == 143 and not (run_dir / "result.json").exists()
    hold.unlink()
    subprocess.run([*command, "--resume", "runs/run"], cwd=tmp_path, env=HELD, check=True)

    whole = tmp_path / "whole/runs/run"
    assert (run_dir / "eval.csv").read_bytes() == (whole / "eval.csv").read_bytes()
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (run_dir, whole)]
    assert models[0]["args"]["target_statistics"] == "slow" and models[0]["script"] == "paper_batch_norm"
    for network in "actor", "qf":
        for one, other in zip(*(model[network].values() for model in models), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(SystemExit):
        paper.main(paper.Args(evaluate=str(run_dir)))
    assert "its script is paper_batch_norm, not ddpg_paper_faithful" in capsys.readouterr().err


# Throughput


def write_speed_log(folder, steps_per_second):
    with SummaryWriter(folder) as log:
        for step in 1200, 1400, 2200:
            log.add_scalar("charts/SPS", 0.0, step, walltime=step / steps_per_second)


def test_throughput_reads_the_clock_of_the_log(tmp_path):
    write_speed_log(tmp_path, 100)
    assert throughput.logged_speed(tmp_path) == 100.0


@pytest.mark.parametrize("module", [script, paper], ids=lambda module: module.SCRIPT)
def test_throughput_compares_the_update_with_the_fastest_product(monkeypatch, module):
    clock, products_by, updates_by, update = itertools.cycle([3.0, 1.0, 2.0, 50.0, 40.0]), [], [], module.DDPG.update

    def timed(function, repeats):
        products_by.append(torch.get_float32_matmul_precision())
        function()
        return next(clock)

    def spied_update(*args):
        updates_by.append(torch.get_float32_matmul_precision())
        return update(*args)

    monkeypatch.setattr(throughput, "seconds_each", timed)
    monkeypatch.setattr(module.DDPG, "update", spied_update)
    figures = throughput.time_update(module.SCRIPT, rounds=1)
    assert figures["mkl"] == [50.0] and figures["onednn"] == [40.0]
    assert products_by[:2] == ["highest", "medium"]  # "medium" hands products to oneDNN
    assert updates_by == ["highest"] + ["highest", "medium"] * 2  # the first one counts the operations

    # Multiply-adds of an update, a row: five forward passes; each gradient of weights; those of inputs that are needed
    # for it, all columns of them
    if module is script:
        actor, critic = 17 * 256 + 256 * 256 + 256 * 6, 23 * 256 + 256 * 256 + 256
        inputs = (critic - 23 * 256) + critic + (actor - 17 * 256)
        batch_size, product = 256, 2 * 256 * 256 * 256
    else:
        actor, critic = 17 * 400 + 400 * 300 + 300 * 6, 17 * 400 + 406 * 300 + 300
        inputs = critic + (critic - 17 * 400) + actor  # what is before the first layer learns too
        batch_size, product = 64, 2 * 64 * 400 * 300
    flops = 2 * batch_size * (2 * actor + 3 * critic + critic + actor + inputs)
    assert figures["limit"] == pytest.approx([flops / product])  # at a second a product, the fastest of the three
    assert figures["NumPy"] == pytest.approx([product / 2 / 1e9])


TRAINER = """
import argparse, pathlib, shutil
class Args:
    learning_starts: int = 0
    eval_interval: int = 0
    checkpoint_interval: int = 0
    save_model: bool = True
    {own_flag}: int = 0
parser = argparse.ArgumentParser()
for flag in "env-id seed run-name total-timesteps num-threads learning-starts eval-interval".split():
    parser.add_argument(f"--{{flag}}", required=True)
parser.add_argument("--checkpoint-interval", required=True)
parser.add_argument("--no-save-model", action="store_true", required=True)
parser.add_argument("--" + "{own_flag}".replace("_", "-"), required={required})
run_dir = pathlib.Path("runs", parser.parse_args().run_name)
shutil.copytree("{log}", run_dir)
(run_dir / "args.json").touch()
(run_dir / "result.json").touch()
"""


def test_throughput_of_a_steps_parts(monkeypatch):
    """On the CPU, where there is nothing to wait for."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    entry = throughput.parse_entry("PYTHON=~/bin/python X=1 ddpg_continuous_action.py --n-step 3")
    assert entry.label == "X=1 ddpg_continuous_action.py --n-step 3" and entry.environment == {"X": "1"}
    assert entry.python == str(Path("~/bin/python").expanduser())
    parts = throughput.time_parts("ddpg_continuous_action", [*entry.flags, "--matmul", "mkl"], 1, "cpu")
    launched, update, action, step = (seconds for (seconds,) in parts.values())
    assert tuple(parts) == throughput.PARTS and update >= launched > 0 and action > 0 and step > 0


def test_throughput_of_today_and_of_an_older_commit(tmp_path, monkeypatch, capsys):
    """Stand-ins for the scripts: the older one lacks a flag, and does half as many steps a second."""
    root, name = tmp_path / "repository", "ddpg_continuous_action.py"
    (root / "benchmark").mkdir(parents=True)
    shutil.copy(ROOT / "benchmark/sweep.sh", root / "benchmark")
    (root / "benchmark/jax_ddpg.py").write_text("import no_such_library")
    write_speed_log(tmp_path / "slow", 100)
    write_speed_log(tmp_path / "fast", 200)
    git = ["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
    (root / name).write_text(TRAINER.format(own_flag="unknown_today", required=False, log=tmp_path / "slow"))
    for command in ["init", "-q"], ["add", "."], ["commit", "-qm", "older"]:
        subprocess.run([*git, *command], check=True)
    (root / name).write_text(TRAINER.format(own_flag="final_eval_episodes", required=True, log=tmp_path / "fast"))

    monkeypatch.setattr(throughput, "ROOT", root)
    monkeypatch.setattr(throughput, "update_tables", lambda args, scripts: [f"updates of {scripts}"])
    scripts = name, f"{name} --final-eval-episodes 1", "benchmark/jax_ddpg.py", "benchmark/missing.py"
    out = tmp_path / "page.md"
    args = throughput.Args(scripts=scripts, against="HEAD", steps=1000, rounds=1, threads=(1,), cores=2, out=out)
    throughput.main(args)
    page = capsys.readouterr().out
    assert out.read_text() == page
    assert f"\n| {name} | 200 (200 to 200) |\n" in page
    assert f"\n| {name} at HEAD | 100 (100 to 100) |\n" in page
    assert f"\n| {name} / {name} at HEAD | 2.00 (2.00 to 2.00) |\n" in page
    assert f"\n| {name} --final-eval-episodes 1 / {name} at HEAD | 2.00 (2.00 to 2.00) |\n" in page
    assert page.count(f"\n| {name} at HEAD | ") == 1  # measured once, though compared twice
    assert "\n| 2 | 400 (400 to 400) | 2.00 (2.00 to 2.00) |\n" in page  # side by side
    assert "Left out: benchmark/jax_ddpg.py: ModuleNotFoundError: No module named 'no_such_library'\n" in page
    assert "Left out: benchmark/missing.py: no such file\n" in page

    with pytest.raises(SystemExit) as end:
        throughput.main(throughput.Args(scripts=scripts, against="no-such-commit"))
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: --against no-such-commit: ")


def test_threads_are_limited_for_every_library(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # put back at the end
    assert throughput.in_own_process(2, os.getenv, "OMP_NUM_THREADS") == "2"
    assert throughput.in_own_process(2, torch.get_num_threads) == 2


@pytest.mark.parametrize(
    "main, args", [(throughput.main, throughput.Args(steps=300)), (baselines.main, baselines.Args(episodes=5))]
)
def test_measuring_commands_refuse_bad_flags_in_one_line(main, args, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "model, script, run",
    [
        ("HalfCheetah-v5", "ddpg_continuous_action", "ddpg_continuous_action/HalfCheetah-v5__{}__1"),
        ("Hopper-v5", "ddpg_continuous_action", "ddpg_continuous_action/Hopper-v5__{}__3"),
        ("InvertedPendulum-v5", "ddpg_continuous_action", "ddpg_continuous_action/InvertedPendulum-v5__{}__2"),
        (
            "Pendulum-v1",
            "ddpg_continuous_action",
            "pendulum/Pendulum-v1__{}__learning-starts-1000_noise-anneal-steps-29800__3",
        ),
        ("million/HalfCheetah-v5", "ddpg_continuous_action", "million/HalfCheetah-v5__{}__2"),
        ("million/Hopper-v5", "ddpg_continuous_action", "million/Hopper-v5__{}__3"),
        ("million/Walker2d-v5", "ddpg_continuous_action", "million/Walker2d-v5__{}__3"),
        ("million/Ant-v5", "ddpg_continuous_action", "million/Ant-v5__{}__2"),
        (
            "million/learning-rate-1e-3/HalfCheetah-v5",
            "ddpg_continuous_action",
            "million/HalfCheetah-v5__{}__learning-rate-1e-3__1",
        ),
        (
            "million/learning-rate-1e-3/Hopper-v5",
            "ddpg_continuous_action",
            "million/Hopper-v5__{}__learning-rate-1e-3__1",
        ),
        (
            "million/learning-rate-1e-3/Walker2d-v5",
            "ddpg_continuous_action",
            "million/Walker2d-v5__{}__learning-rate-1e-3__2",
        ),
        (
            "million/learning-rate-1e-3_n-step-3/HalfCheetah-v5",
            "ddpg_continuous_action",
            "million/HalfCheetah-v5__{}__learning-rate-1e-3_n-step-3__1",
        ),
        (
            "million/learning-rate-1e-3_n-step-3/Hopper-v5",
            "ddpg_continuous_action",
            "million/Hopper-v5__{}__learning-rate-1e-3_n-step-3__3",
        ),
        (
            "million/learning-rate-1e-3_n-step-3/Walker2d-v5",
            "ddpg_continuous_action",
            "million/Walker2d-v5__{}__learning-rate-1e-3_n-step-3__2",
        ),
        ("paper/HalfCheetah-v5", "ddpg_paper_faithful", "paper/HalfCheetah-v5__{}__1"),
        ("paper/Hopper-v5", "ddpg_paper_faithful", "paper/Hopper-v5__{}__2"),
        ("paper/InvertedPendulum-v5", "ddpg_paper_faithful", "paper/InvertedPendulum-v5__{}__batch-norm-actor__1"),
    ],
)
def test_a_shipped_model_reproduces_its_published_evaluation(model, script, run, tmp_path):
    """The last row of its run's eval.csv; to the cent on a CPU like the one it was trained on, else near it."""
    rows = (ROOT / "benchmark/results" / run.format(script) / "eval.csv").read_text().splitlines()
    steps, mean, std = map(float, rows[-1].split(",")[:3])
    line = [sys.executable, ROOT / f"{script}.py", "--evaluate", ROOT / "benchmark/models" / model]
    shown = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = re.fullmatch(rf"{model.split('/')[-1]} after {steps:,.0f} steps: (.+) ± .+ over 10 episodes\n", shown)
    assert abs(float(found[1]) - mean) <= std  # rounding grows to other trajectories, but not to another policy


def test_every_shipped_model_is_tested():
    (tested,) = [mark.args[1] for mark in test_a_shipped_model_reproduces_its_published_evaluation.pytestmark]
    models = ROOT / "benchmark/models"
    shipped = {str(path.parent.relative_to(models)) for path in models.rglob("model.pt")}
    assert shipped == {model for model, *_ in tested}
