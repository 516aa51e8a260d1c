"""Every figure of the data path in one table: balance, order, streaming, decoding, damaged files.

    python benchmarks/data.py --json FILE                          all of it, about a quarter of an hour on two cores
    python benchmarks/data.py --parts balance --workload CSV       balance alone, on tokens of your own

The parts also run alone: `python -m benchmarks.data_balance --help`.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a file, not as a module
    sys.path.insert(0, str(ROOT))

from benchmarks import data_balance, data_decode, data_fuzz, data_order, data_stream  # noqa: E402
from benchmarks.figure import Figure, run_parts  # noqa: E402

WORKLOAD = ROOT / "benchmarks" / "workloads" / "web_mix_tokens.csv"


def main() -> None:
    """Prints the table part by part; leaves with 1 when a figure misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--workload", type=Path, default=WORKLOAD, help="tokens for the balance: a row a clip, a column a size rule"
    )
    parser.add_argument("--parts", default="balance,order,stream,decode,fuzz", help="which, separated by commas")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], list[Figure]]] = {
        "balance": lambda: data_balance.figures(arguments.workload),
        "order": data_order.figures,
        "stream": data_stream.figures,
        "decode": data_decode.figures,
        "fuzz": data_fuzz.figures,
    }
    run_parts(parser, arguments, parts)


if __name__ == "__main__":
    main()
