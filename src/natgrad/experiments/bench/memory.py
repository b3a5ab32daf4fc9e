"""How much memory training takes: measured in a process of its own, as a process never gives its peak back.

    python -m natgrad.experiments.bench.memory mlp kfac

prints the bytes by which the peak of a dozen steps exceeds what the process held with data and model loaded: gradients,
activations, state of the optimizer, workspace. A dozen, as the rivals' preconditioners are computed every tenth step.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

MEMORY = "memory.json"
STEPS = 12


def measure(workload: str, contestant: str, threads: int) -> float | None:
    """The bytes, from a new process; None where the contestant cannot train this, or the system does not tell."""
    command = [sys.executable, "-m", __name__, workload, contestant]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def read_memory(path: Path) -> dict[str, dict[str, float | None]]:
    """What was written down in a folder: workload → contestant → bytes."""
    file = path / MEMORY
    return json.loads(file.read_text()) if file.exists() else {}


def resident(field: str) -> int:
    """Bytes resident now (``"VmRSS"``) or at most until now (``"VmHWM"``), as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def main(workload: str, contestant: str) -> None:
    """Train in this process, and print the bytes."""
    # Imported here, so that the module can be imported by its parent for nothing.
    from natgrad.experiments.bench.contestants import find
    from natgrad.experiments.bench.trial import Trial
    from natgrad.experiments.bench.workloads import find as find_workload

    trial = Trial(find(contestant), {}, find_workload(workload)(), seed=1, seconds=math.inf)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak of loading the data is not training's.
    for _ in range(STEPS):
        trial.step()
    if trial.outcome.failure:
        sys.exit(trial.outcome.failure)
    print(max(0, resident("VmHWM") - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
