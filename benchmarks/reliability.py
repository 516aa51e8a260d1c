"""Whether training can be killed: every figure of checkpoints in one table.

    python benchmarks/reliability.py --json FILE                              all of it; an hour on two cores
    python benchmarks/reliability.py --parts kills --cases 50:100 --append --json FILE     a campaign, continued

Parts: corruption (500 cases), hostile (payloads), disks (full, broken, over quota, read-only), blocked (seconds that
training waits for a save), kills (200 SIGKILLs of worlds of two ranks). `--cases A:B` runs a stretch of corruption or
kills; `--append` adds to what FILE counts already.
"""

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
for place in (ROOT, ROOT / "tests" / "training"):  # run as a file, not as a module
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import damage  # noqa: E402
import faults  # noqa: E402
import hostile  # noqa: E402

from benchmarks.figure import Figure, print_table, write_json  # noqa: E402

CORRUPTIONS, KILLS = 500, 200
# Of 200 kills at least so many of each kind.
AT_LEAST = {"in_save": 100, "slow": 50, "in_load": 25}
NAMES = {"in_save": "kills inside a save", "slow": "kills with one writer delayed", "in_load": "kills during a load"}


def main() -> None:
    """Prints the table part by part; leaves with 1 when a figure misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--parts", default="corruption,hostile,disks,blocked,kills", help="which, separated by commas")
    parser.add_argument("--cases", help="A:B, which of the cases of corruption and kills; default: all")
    parser.add_argument("--append", action="store_true", help="add to the counts in the file of --json")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[Path, range | None], list[Figure]]] = {
        "corruption": corruption, "hostile": planted, "disks": disks, "blocked": blocked, "kills": kills,
    }  # fmt: skip
    names = arguments.parts.split(",")
    if unknown := set(names) - set(parts):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: the parts are {', '.join(parts)}")
    logging.disable(logging.WARNING)  # each refusal says so
    cases = range(*map(int, arguments.cases.split(":"))) if arguments.cases else None
    found: list[Figure] = []
    if arguments.append and arguments.json and arguments.json.exists():
        found = [Figure(**item) for item in json.loads(arguments.json.read_text())]
    for name in names:
        print(f"\n{name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            figures = parts[name](Path(folder), cases)
        found = merged(found, figures)
        shown = {figure.name for figure in figures}
        print_table([figure for figure in found if figure.name in shown])
        if arguments.json:
            write_json(found, arguments.json)  # after each part: what has been measured is kept
    raise SystemExit(any(figure.holds is False for figure in found))


def corruption(folder: Path, cases: range | None) -> list[Figure]:
    """Each case damages the newest of two checkpoints in its way."""
    damage.write_run(folder / "pristine")
    chosen = cases if cases is not None else range(CORRUPTIONS)
    problems = []
    for case in chosen:
        if problem := damage.damaged(folder / "pristine", folder / "case", case):
            problems.append(problem)
        shutil.rmtree(folder / "case")
    name = "corruption refused by file name, the checkpoint before taken"
    return [counted(name, len(chosen), problems, "flip, cut, delete, swap, stale shard in turn; files of two ranks")]


def planted(folder: Path, _: range | None) -> list[Figure]:
    """Every payload, through everything that reads a run."""
    damage.write_run(folder / "pristine")
    problems = []
    for number, (name, plant) in enumerate(hostile.PAYLOADS.items()):
        (folder / str(number)).mkdir()
        case = hostile.Planted(folder / "pristine", folder / str(number))
        plant(case)
        if problem := case.walk():
            problems.append(f"{name}: {problem}")
    what = "list, verify, inspect, sample, resume, go on saving"
    return [counted("hostile checkpoints and configs of which nothing ran", len(hostile.PAYLOADS), problems, what)]


def disks(folder: Path, _: range | None) -> list[Figure]:
    """A save meets a disk that fails at ten offsets of it, in several ways."""
    damage.write_run(folder / "pristine")
    size = faults.size_of_a_save(folder / "pristine")
    attempts: list[Callable[[Path], str]] = [
        lambda run_dir, offset=size * number // faults.OFFSETS, error=error: faults.fails_at(run_dir, offset, error)
        for error in faults.ERRORS.values()
        for number in range(faults.OFFSETS)
    ]
    attempts += [
        lambda run_dir, limit=limit: faults.exceeds_the_system_s_limit(run_dir, limit)
        for limit in range(0, 7900, 790)  # a rank's file has 8,128 bytes
    ]
    attempts.append(faults.is_read_only)
    problems = []
    for number, attempt in enumerate(attempts):
        shutil.copytree(folder / "pristine", folder / str(number), symlinks=True)
        if problem := attempt(folder / str(number)):
            problems.append(problem)
    name = "failing disks that cost the save alone, told in one line, nothing partial left"
    return [counted(name, len(attempts), problems, "ENOSPC, EIO, EDQUOT, RLIMIT_FSIZE at 10 offsets each, read-only")]


def blocked(folder: Path, _: range | None) -> list[Figure]:
    """Seconds of the training thread."""
    out = folder / "blocked.json"
    run_python("-m", "benchmarks.reliability_blocked", folder, out)
    seen = json.loads(out.read_text())
    size = f"{seen['bytes'] / 2**20:.0f} MiB of state, one rank, CPU; a copy takes {seen['copy']:.3f} s"
    wall, processor = seen["blocked"] / seen["copy"], seen["blocked_processor"] / seen["copy_processor"]
    against, more = seen["deepspeed"] / seen["blocked"], seen["while_writing"] / seen["alone"]
    return [
        Figure("a save blocks training, of one copy of the state", wall, "x", "<= 1.3", wall <= 1.3, size),
        Figure("the same in CPU-seconds", processor, "x", "<= 1.3", processor <= 1.3, size),
        Figure("DeepSpeed's save against it", against, "x", ">= 10", against >= 10, f"{seen['deepspeed']:.2f} s"),
        Figure("CPU-seconds of training while writing", more, "x", "<= 1.03", more <= 1.03, "256^3 products"),
        Figure("a save in all", seen["save"], "s", "", None, size),
    ]


def kills(folder: Path, cases: range | None) -> list[Figure]:
    """Worlds of two ranks, ZeRO 1, 2 and 3."""
    chosen = cases if cases is not None else range(KILLS)
    out = folder / "kills.json"
    script = ROOT / "tests" / "distributed" / "killed.py"
    run_python(script, folder / "runs", out, chosen.start, chosen.stop)
    seen: dict[str, Any] = json.loads(out.read_text())
    what = "two ranks, ZeRO 1, 2, 3 in turn; losses and last checkpoint compared bitwise with a run nobody killed"
    figures = [
        counted("SIGKILLs after which the run ended bitwise equal", seen["kills"], seen["problems"], what),
        counted("checkpoints read after a kill that were whole", seen["checked"], seen["problems"], "every byte"),
    ]
    for key, bar in AT_LEAST.items():
        figures.append(Figure(NAMES[key], seen[key], "kills", f">= {bar} of {KILLS}", None, ""))
    return figures


def counted(name: str, total: int, problems: list[str], conditions: str) -> Figure:
    """How many of `total` went well; what did not is printed."""
    for problem in problems:
        print(f"  {problem}")
    good = max(0, total - len(problems))
    return Figure(name, good, f"of {total}", "all", good == total, conditions)


def merged(old: list[Figure], new: list[Figure]) -> list[Figure]:
    """Counts are added to those of the same name, other figures take their place."""
    before = {figure.name: figure for figure in old}
    for figure in new:
        known = before.get(figure.name)
        value, unit, holds = figure.value, figure.unit, figure.holds
        if known is not None and re.fullmatch(r"of \d+|kills", unit):
            value += known.value
            if unit != "kills":
                total = int(unit[3:]) + int(known.unit[3:])
                unit, holds = f"of {total}", value == total
        before[figure.name] = Figure(figure.name, value, unit, figure.bar, holds, figure.conditions)
    return list(before.values())


def run_python(*arguments: object) -> None:
    """In the root of the repository; what it says goes to the terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, cwd=ROOT, env=environment)


if __name__ == "__main__":
    main()
