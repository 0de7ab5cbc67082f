"""Run a claim: its arms in pairs over seeds, judged by the rule, with the file and the picture that it leaves.

Finished arms are kept under `runs/claims/<claim>/<data>/<arm>/`, a file per seed, named by all that it depends on in the claim's
file: the same command goes on where it was stopped, and an arm that was changed is run again. Code is no part of that name:
who changes what an arm does removes the folder.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from contralto.claims.arms import Task, fingerprint, load, run_tasks
from contralto.claims.judge import RULE, check_measured, judge, mean_of
from contralto.claims.outputs import demand_plots, draw
from contralto.claims.plan import DEVELOPMENT_SEED, Claim, claims, find_claim, load_claim
from contralto.errors import ContraltoError, DataError, UsageError
from contralto.files import remove_leftovers, write_atomically, write_json
from contralto.pipelines.outputs import environment

__all__ = ["parse_seeds", "reproduce", "smoke", "tune"]


def reproduce(
    claim: str | Path,
    out: str | Path | None = "results/claims",
    *,
    data: str | None = None,
    seeds: Sequence[int] | None = None,
    budget: Mapping[str, Any] | None = None,
    device: str = "cpu",
    quick: bool = False,
    jobs: int | None = None,
    work: str | Path = "runs/claims",
    progress: bool = True,
) -> dict[str, Any]:
    """Train and measure all arms of a claim over seeds, judge, and write `<claim>.json` and `<claim>.png`.

    Parameters
    ----------
    claim : str or path
        Name of a claim, or a claim's file.
    out : path, optional
        Folder of results; None writes none.
    data : str, optional
        One of the claim's data sets; default: all that are there.
    seeds : sequence of int, optional
        Default: as many as the claim says, from 0.
    budget : mapping, optional
        Changes to the claim's budget.
    device : str
        Where arms are trained.
    quick : bool
        One seed, the first data set and the claim's quick budget: a look at the machinery that judges and writes nothing.
    jobs : int, optional
        Processes at a time, one thread each; default: one per core, and one on another device than the CPU.
    work : path
        Where finished arms are kept.
    progress : bool

    Returns
    -------
    dict
        What the JSON file holds.

    Raises
    ------
    DataError
        The claim's file is wrong, or none of its data is there.
    ContraltoError
        Arms failed: names each, with its seed. The others are kept.
    """
    plan = _loaded(claim, budget)
    _check(device, jobs)
    console = Console(stderr=True, quiet=not progress)
    names, left_out = _present(plan, data)
    for told in left_out:
        console.print(f"left out: {told}", highlight=False, markup=False)
    chosen = [0] if quick else list(range(plan.seeds)) if seeds is None else list(seeds)
    if quick and data is None:
        names = names[:1]
    spent = {**plan.budget, **(plan.quick if quick else {}), **(budget or {})}
    if quick:
        with tempfile.TemporaryDirectory() as passing:
            found = _measure(
                _tasks(plan, names, chosen, spent, device, Path(passing)), plan, jobs, Path(passing), console
            )
            return _result(plan, found, chosen, spent, device, left_out, judged=False)
    if max(chosen) >= DEVELOPMENT_SEED:
        console.print(f"seeds from {DEVELOPMENT_SEED} are for development: no result is written", highlight=False)
        out = None
    if out is not None:
        demand_plots()
    folder = Path(work) / plan.name
    _note_plan(plan, names, chosen, spent, device, folder)
    found = _measure(_tasks(plan, names, chosen, spent, device, folder), plan, jobs, folder, console)
    result = _result(plan, found, chosen, spent, device, left_out)
    result["command"] = _command(plan, data, seeds, budget, device)
    if out is not None:
        write_json(_made(Path(out)) / f"{plan.name}.json", result)
        draw(result, Path(out) / f"{plan.name}.png")
    return result


def tune(
    claim: str | Path,
    setting: str,
    grid: Sequence[Any],
    metric: str,
    *,
    data: str,
    seeds: Sequence[int] = (DEVELOPMENT_SEED,),
    macro: bool = False,
    budget: Mapping[str, Any] | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    work: str | Path = "runs/claims",
    progress: bool = True,
) -> dict[str, dict[Any, float]]:
    """Try values of a setting alike in all arms that have it, on seeds that are not reported.

    Parameters
    ----------
    claim : str or path
    setting : str
        Of the arms, a learning rate for instance.
    grid : sequence
        Values to try.
    metric : str
        The measurement that is looked at.
    data : str
        One of the claim's data sets.
    seeds : sequence of int
        From 100 on.
    macro : bool
        Mean over classes.
    budget, device, jobs, work, progress
        As in `reproduce`.

    Returns
    -------
    dict
        Arm -> value -> mean of the metric over seeds. The best is for the claim's file, with all arms tuned alike.
    """
    plan = _loaded(claim, budget)
    _check(device, jobs)
    _present(plan, data)
    if not seeds or min(seeds) < DEVELOPMENT_SEED:
        raise UsageError(f"values are chosen on seeds from {DEVELOPMENT_SEED} on: smaller ones are reported")
    tried = {(arm, v): {**plan.arms[arm], setting: v} for arm in plan.arms if setting in plan.arms[arm] for v in grid}
    if not tried:
        raise UsageError(f"no arm of {plan.name} has {setting!r}")
    numbered = replace(plan, arms={f"{arm}, {setting} {v}": settings for (arm, v), settings in tried.items()})
    folder = Path(work) / plan.name / "tuning"
    tasks = _tasks(numbered, [data], seeds, {**plan.budget, **(budget or {})}, device, folder)
    found = _measure(tasks, numbered, jobs, folder, Console(stderr=True, quiet=not progress))[data]
    scores: dict[str, dict[Any, float]] = {}
    for (arm, v), runs in zip(tried, found.values(), strict=True):
        scores.setdefault(arm, {})[v] = mean_of(runs, metric, macro=macro)
    return scores


def smoke(*, jobs: int | None = None, device: str = "cpu", progress: bool = True) -> dict[str, str]:
    """Run every claim that ships, quickly: the machinery only. Claims whose data are not there are left out, which is said.

    Returns
    -------
    dict
        Claim -> "ran", or why it was left out.

    Raises
    ------
    ContraltoError
        Names the claims that failed.
    """
    outcome, tasks = {}, []
    plans = {name: load_claim(path) for name, path in claims().items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans.items():
            names, left_out = _present(plan, None, strict=False)
            outcome[name] = "ran" if names else f"left out: {'; '.join(left_out)}"
            budget = {**plan.budget, **plan.quick}
            tasks += _tasks(plan, names[:1], [0], budget, device, Path(folder) / name)
        _check(device, jobs)
        _train(tasks, len(tasks), plans, jobs, Console(stderr=True, quiet=not progress))
        for name, plan in plans.items():
            runs = {task.arm: [load(task.path)] for task in tasks if task.claim == name}
            if runs:
                judge(plan, runs, [0])
    return outcome


def parse_seeds(text: str | None) -> list[int] | None:
    """Seeds of a command line: a number of them, or a list.

    Examples
    --------
    >>> parse_seeds("3"), parse_seeds("100,101")
    ([0, 1, 2], [100, 101])
    """
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*,?", text) or text == "0":
        raise UsageError(f"seeds must be their number above 0, or a list like 0,1,2; got {text!r}")
    seeds = [int(s) for s in text.split(",") if s]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"a seed is named twice in {text!r}")
    return seeds if "," in text else list(range(seeds[0]))


def _loaded(claim: str | Path, budget: Mapping[str, Any] | None) -> Claim:
    plan = load_claim(claim) if isinstance(claim, Path) else find_claim(claim)
    plan.function()
    for name in budget or {}:
        if name not in plan.budget:
            raise UsageError(f"the budget has no {name!r}; there are: {', '.join(plan.budget) or 'none'}")
    return plan


def _check(device: str, jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs must be a number above 0, got {jobs}")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"device must be one of torch, like cpu or cuda, got {device!r}") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, True):
        raise UsageError(f"device must be there, and torch finds no {kind}; see `contralto doctor`")


def _present(plan: Claim, data: str | None, *, strict: bool = True) -> tuple[list[str], list[str]]:
    """The names of data that are there, and what is left out and why."""
    if data is not None and data not in plan.data:
        raise UsageError(f"the claim of {plan.name} runs on {' or '.join(map(repr, plan.data))}, not on {data!r}")
    lacking = {name: _lacking(plan.data[name]) for name in (plan.data if data is None else [data])}
    left_out = [f"{name}: {what} was not found under CONTRALTO_DATA" for name, what in lacking.items() if what]
    left_out += [f"{name}: not asked for" for name in plan.data if name not in lacking]
    names = [name for name, what in lacking.items() if what is None]
    if strict and not names:
        raise DataError(f"{'; '.join(left_out)}: set CONTRALTO_DATA to the folder that holds it")
    return names, left_out


def _lacking(needs: Sequence[str]) -> str | None:
    folder = os.environ.get("CONTRALTO_DATA", "")
    return next((n for n in needs if not folder or not (Path(folder) / n).exists()), None)


def _note_plan(
    plan: Claim, names: Sequence[str], seeds: Sequence[int], budget: Mapping[str, Any], device: str, folder: Path
) -> None:
    """Add what will be run, and the rule, to `plans.jsonl`, before it is run."""
    listed, file = {
        "claim": plan.file.read_text(encoding="utf-8"), "rule": RULE, "data": list(names), "seeds": list(seeds),
        "budget": dict(budget), "device": device,
    }, _made(folder) / "plans.jsonl"  # fmt: skip
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if lines and {k: v for k, v in json.loads(lines[-1]).items() if k != "at"} == listed:
        return
    lines.append(json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds"), **listed}))
    write_atomically(file, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def _measure(
    tasks: Sequence[Task], plan: Claim, jobs: int | None, folder: Path, console: Console
) -> dict[str, dict[str, list[Any]]]:
    """Measurements by data, arm and seed; what is not there yet is run."""
    missing = [task for task in tasks if not task.path.exists()]
    if len(missing) < len(tasks):
        console.print(
            f"{plan.name}: {len(tasks) - len(missing)} of {len(tasks)} trainings were there already in {folder}; "
            "remove it to train them again",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    remove_leftovers(folder)
    try:
        _train(missing, len(tasks), {plan.name: plan}, jobs, console)
    finally:
        remove_leftovers(folder)  # of processes that were ended while they wrote
    found: dict[str, dict[str, list[Any]]] = {}
    for task in tasks:
        found.setdefault(task.data, {}).setdefault(task.arm, []).append(load(task.path))
        shutil.rmtree(task.shared, ignore_errors=True)
    return found


def _train(tasks: Sequence[Task], of: int, plans: Mapping[str, Claim], jobs: int | None, console: Console) -> None:
    """Run what is missing of so many trainings, with a bar; failures are named when all others are done."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    done = dict.fromkeys(tasks, 0.0)
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("", total=len(tasks))

        def told(task: Task, share: float) -> None:
            done[task] = share
            bar.update(shown, completed=round(sum(done.values()), 2), description=str(task))
            if share == 1 and task.path.exists():
                check_measured(plans[task.claim], task.arm, load(task.path))  # now, not after hours

        wanted = jobs or (_cores() if all(task.device == "cpu" for task in tasks) else 1)
        failures = run_tasks(tasks, jobs=min(wanted, len(tasks)), told=told)
    if failures:
        listed = [str(f) for f in failures[:5]] + [f"and {len(failures) - 5} more"] * (len(failures) > 5)
        raise ContraltoError(
            f"{len(failures)} of {of} trainings failed; what was finished is kept:\n  " + "\n  ".join(listed)
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(
    plan: Claim, names: Sequence[str], seeds: Sequence[int], budget: Mapping[str, Any], device: str, folder: Path
) -> list[Task]:
    """All arms and seeds; the seeds of one arm follow each other, so that processes beside each other seldom prepare the same."""
    return [
        _task(plan, name, arm, seed, budget, device, folder) for name in names for arm in plan.arms for seed in seeds
    ]


def _task(plan: Claim, name: str, arm: str, seed: int, budget: Mapping[str, Any], device: str, folder: Path) -> Task:
    settings = plan.arms[arm]
    bound = fingerprint(plan.run, name, settings, budget, device.partition(":")[0])
    path = folder / _slug(name) / _slug(arm) / f"seed{seed}-{bound}.npz"
    return Task(plan.name, plan.run, name, arm, settings, budget, seed, device, path, folder / _slug(name) / "shared")


def _slug(name: str) -> str:
    """A name as a folder; what had to be changed is told apart by a hash."""
    plain = re.sub(r"[^\w+.-]+", "_", name)
    return plain if plain == name and name != "shared" else f"{plain}-{fingerprint(name)[:6]}"


def _result(
    plan: Claim, found: Mapping[str, Any], seeds: list[int], budget: Mapping[str, Any], device: str, left_out: list[str],
    *, judged: bool = True,
) -> dict[str, Any]:  # fmt: skip
    judgements = {name: judge(plan, arms, seeds) for name, arms in found.items()}
    if not judged:
        for judgement in judgements.values():
            for part in (judgement, *judgement["comparisons"]):
                part["verdict"] = "not judged"
    about = environment() | {"threads": 1, "device": device}
    return {
        "system": plan.system, "claim": plan.claim, "paper": plan.paper, "command": "", "seeds": seeds, "budget": dict(budget),
        "rule": RULE, "decides": {"which": plan.verdict, "comparisons": plan.deciding()}, "environment": about,
        "data": judgements, "left_out": left_out,
    }  # fmt: skip


def _command(
    plan: Claim, data: str | None, seeds: Sequence[int] | None, budget: Mapping[str, Any] | None, device: str
) -> str:
    words = ["contralto reproduce", plan.name if plan.name in claims() else plan.file.name]
    if data is not None:
        words.append(f"--data {json.dumps(data) if ' ' in data else data}")
    if seeds is not None and list(seeds) != list(range(plan.seeds)):
        counted = list(seeds) == list(range(len(seeds)))
        words.append(
            f"--seeds {len(seeds) if counted else ','.join(map(str, seeds)) + (',' if len(seeds) == 1 else '')}"
        )
    words += [f"--budget.{k} {v}" for k, v in (budget or {}).items()]
    words += [f"--device {device}"] if device != "cpu" else []
    return " ".join(words)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
