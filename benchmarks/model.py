"""Every figure of the model on a CPU in one table: packs against padding, attention's cores, activation memory, FLOPs.

    python benchmarks/model.py --json FILE                all of it, about twelve minutes of one core
    python benchmarks/model.py --parts speed,cores        some of it

Times are CPU-seconds, the methods in turn, the minimum of at least seven: other work on the machine disturbs them
least that way. `benchmarks/gpu.py` is the same for a CUDA device.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a file, not as a module
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import model_cores, model_flops, model_memory, model_speed  # noqa: E402
from benchmarks.figure import Figure, run_parts  # noqa: E402

PARTS: dict[str, Callable[[], list[Figure]]] = {
    "speed": model_speed.figures,
    "padding": model_speed.padding,
    "cores": model_cores.figures,
    "memory": model_memory.figures,
    "flops": model_flops.figures,
}


def main() -> None:
    """Prints the table part by part; leaves with 1 when a figure misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # parts that measure with more say so
    place = f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores"
    run_parts(parser, arguments, PARTS, place)


if __name__ == "__main__":
    main()
