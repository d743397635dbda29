"""Whether the harness agrees with itself: two arms that are the same, again and again.

    python benchmarks/bench_harness.py

Each round takes a training step's worth of work as two arms of one comparison and asks whether their medians differ by
less than the spread (p20 to p80) that is printed beside them.  Fails where that holds in fewer than 19 of 20 rounds.
"""

import argparse
import sys
from pathlib import Path

import torch

from sslx.bench import measure

RESULTS = Path(__file__).parent / "results" / "harness.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--windows", type=int, default=measure.WINDOWS)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a window")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    noise = measure.warn_of_noise(device, print)
    layer = torch.nn.Conv2d(64, 64, 3, padding=1).to(device)
    x = torch.randn(64, 64, 16, 16, device=device)

    def work() -> None:
        layer(x).relu().mean().backward()

    agree, apart, spreads = 0, list[float](), list[float]()
    for number in range(args.rounds):
        arms = {name: measure.rate_window(work, device, args.seconds) for name in ("one", "the same")}
        one, same = (measure.summarize(values) for values in measure.take_turns(arms, args.windows).values())
        apart.append(abs(one["median"] - same["median"]) / one["median"])
        spreads.append(max(found["p80"] - found["p20"] for found in (one, same)) / one["median"])
        agree += apart[-1] < spreads[-1]
        print(f"{number + 1:3}: medians {100 * apart[-1]:5.2f} % apart, spread {100 * spreads[-1]:5.2f} %", flush=True)
    passed = agree >= 0.95 * args.rounds
    print(f"the two agree in {agree} of {args.rounds} rounds{'' if passed else ': NOT in 19 of 20'}")
    record = {"benchmark": "harness", "rounds": args.rounds, "agree": agree, "windows": args.windows, "noise": noise}
    record |= {"medians_apart": measure.summarize(apart), "spread": measure.summarize(spreads)}
    if not args.no_record:
        measure.append(args.results, record)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
