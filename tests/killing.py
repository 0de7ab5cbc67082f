"""Runs one job again and again in processes that are killed at drawn moments, until one may finish.

`python tests/killing.py PLAN.json`, in a process of its own: it imports everything once and forks, so that a kill costs
no more than the work it destroys. The plan holds `system`, `call` (arguments of its job), `kills`, and `log`, a file to which
every training step is written before it is done. A kill is one of

- `["step", stage, n]`: before the n-th step of a stage in this process, or when the stage has no step left,
- `["write", n, "before" | "half" | "after"]`: around the n-th file that gets its name, `half` with half of its bytes,
- `["time", seconds]`: from outside.

After every kill all files of the run must be whole. Prints one JSON list: for every process the way it ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from contralto.systems.registry import get_job

STAGES = ["plain", "vanilla", "capro", "finetune", "training"]


def whole(folder):
    """Every file of a run can be read to its end."""
    for path in Path(folder).rglob("*"):
        if path.name.startswith("."):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        elif path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def note_steps(system, log, wanted=None, number=0):
    """Write every step to the log; die before one of them."""
    step, seen = system.training_step, [0]

    def noted(self, batch, batch_idx):
        stage = self.hparams.get("stage", "training")  # a job with one training has no stages
        seen[0] += stage == wanted
        if wanted and (STAGES.index(stage) > STAGES.index(wanted) or seen[0] == number):
            die()
        os.write(log, f"{os.getpid()} {stage} {self.current_epoch} {batch_idx}\n".encode())
        return step(self, batch, batch_idx)

    system.training_step = noted


def die_while_writing(number, moment):
    replace, seen = Path.replace, [0]

    def counted(self, target):
        seen[0] += 1
        if seen[0] == number and moment == "half" and self.is_file():
            os.truncate(self, self.stat().st_size // 2)
        if seen[0] == number and moment != "after":
            die()
        done = replace(self, target)
        if seen[0] == number:
            die()
        return done

    Path.replace = counted


def child(job, call, kill, log):
    kind, *how = kill or ["none"]
    note_steps(job.system, log, *(how if kind == "step" else ()))
    if kind == "write":
        die_while_writing(*how)
    job.fit(**call)


def main():
    torch.set_num_threads(1)
    plan = json.loads(Path(sys.argv[1]).read_text())
    log = os.open(plan["log"], os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    ends, job = [], get_job(plan["system"])
    for kill in [*plan["kills"], None]:
        pid = os.fork()
        if pid == 0:
            try:
                child(job, plan["call"], kill, log)
                code = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                code = 1
            finally:
                os._exit(code)
        if kill and kill[0] == "time":
            time.sleep(kill[1])
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        ends.append([pid, "killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)])
        if ends[-1][1] not in ("killed", 0):
            break
        whole(plan["call"]["out"])
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
