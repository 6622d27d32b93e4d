"""Run one training stage on several processes: the command starts torchrun, and torchrun starts `python -m tongwen`.

Other launchers start the same command themselves. All of them pass each process its rank in the same environment variables.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tongwen.core.stop_signals import on_stop_signals

EXIT_FILE = "TONGWEN_EXIT_FILE"
START_TIME = "TONGWEN_BEGAN"
PARENT = "TONGWEN_PARENT"  # the process that waits for a launched one
FEW = 8  # processes that any machine may be asked for, so that a small one can rehearse what a large one will run
PROCESS_BYTES = 400_000_000  # that a process with torch takes before it has a model
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
SAVING_SECONDS = 600  # torchrun kills its processes this long after asking them to stop
LAST_SECONDS = 3.0  # that processes have to save when the command that waits for them is gone

# Messages of torch's process groups (gloo, NCCL) when another process has ended.
PEER_EXITED = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "NCCL communicator was aborted",
)


def read_launcher_environment() -> None:
    """Read the launcher's environment; call this before anything uses the rank. A launcher that starts a single process,
    or an image that presets these variables, counts as no launcher."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") and not is_child_process():
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    read_slurm_environment()


def read_slurm_environment() -> None:
    """Translate srun's variables into the ones that torch's process groups read. The first node is the master."""
    environment = os.environ
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if not tasks.isdigit() or int(tasks) < 2 or is_launched() or any(name not in environment for name in SLURM):
        return
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = environment["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0]
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 10000))


def _first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: `gpu[03-05,9],login` -> gpu03."""
    found = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def is_launched() -> bool:
    """Whether torchrun, accelerate, deepspeed or Slurm started this process."""
    return "LOCAL_RANK" in os.environ or "RANK" in os.environ


def is_main_process() -> bool:
    """Whether this process prints and writes files for all: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_child_process() -> bool:
    """Whether another tongwen command started this process and waits for it."""
    return EXIT_FILE in os.environ


def is_lost_peer(message: str) -> bool:
    """Whether an error's message says that another process has ended: process groups raise a plain RuntimeError."""
    return any(fragment in message for fragment in PEER_EXITED)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def record_start_time() -> None:
    """Record when the command began, for all processes that it starts."""
    if not is_child_process():
        os.environ[START_TIME] = str(time.time())


def deadline(seconds: float | None) -> float | None:
    """Return the time, in seconds since 1970, by which a command with this time limit must have ended."""
    return float(os.environ[START_TIME]) + seconds if seconds is not None else None


def torchrun(devices: int, arguments: Sequence[str]) -> int:
    """Run `tongwen ARGUMENTS` in `devices` processes; return the exit code of the first that failed, or 0."""
    with tempfile.TemporaryDirectory() as folder:
        exit_file = Path(folder) / "exit"
        command = [sys.executable, "-m", "tongwen.train.spawn", "--standalone", f"--nproc-per-node={devices}"]
        command += [f"--shutdown-timeout={SAVING_SECONDS}"]
        environment = {
            **os.environ,
            EXIT_FILE: str(exit_file),
            PARENT: str(os.getpid()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", _threads(devices)),
        }
        code = _wait_for([*command, "-m", "tongwen", *arguments], environment)
        return int(exit_file.read_text(encoding="utf-8")) if code and exit_file.is_file() else code


def _wait_for(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command and pass stop signals on to it; the command ends after saving."""
    process = subprocess.Popen(command, env=environment, close_fds=False)  # noqa: S603 - it holds the folder's lock, too
    with on_stop_signals(lambda number: process.terminate()):
        return process.wait()


def end_with_parent(number: int) -> None:
    """Get a signal when the process that waits for this one ends, however it ends; `LAST_SECONDS` later, be killed.

    On Linux the kernel sends the signal at once. A thread watches too: it works elsewhere, and sees a parent that ended
    before this was called.
    """
    parent = os.environ.get(PARENT, "")
    if not parent.isdigit() or os.name == "nt":
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os.kill(os.getpid(), number)
        time.sleep(LAST_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def most_processes() -> int:
    """Return how many training processes this machine can carry: one per GPU or core, a few in any case, if its memory
    holds what each needs before it has a model."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = len(_gpu_files())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return max(1, min(max(cores, gpus, FEW), memory // PROCESS_BYTES if memory > 0 else FEW))


def _gpu_files() -> list[Path]:
    """Return the devices of NVIDIA's driver, which are known without torch."""
    return [file for file in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)]


def claim_exit(code: int) -> bool:
    """Record the exit code of a launched process. True for the first to fail: it alone prints the message."""
    path = os.environ.get(EXIT_FILE)
    if not path:
        return True
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as stream:
        stream.write(str(code))
    return True


def _threads(devices: int) -> str:
    return str(max(1, (os.cpu_count() or 1) // devices))
