"""Whether the harness agrees with itself: two arms that do the same work, many times.

    python benchmarks/run.py harness

Each round measures the work of a training step as two arms of a comparison.  They agree if their medians differ by less
than the spread (p20 to p80) that is printed beside them.  Fails if they agree in fewer than 19 of 20 rounds.
"""

import torch
from harness import Session, benchmark, option

from sslx.bench import measure


@benchmark(option("--rounds", type=int, default=20), windows=measure.WINDOWS, seconds=0.3)
def run(session: Session) -> bool:
    options, device = session.options, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    noise = measure.warn_of_noise(device, print)
    layer = torch.nn.Conv2d(64, 64, 3, padding=1).to(device)
    x = torch.randn(64, 64, 16, 16, device=device)

    def work() -> None:
        layer(x).relu().mean().backward()

    agree, apart, spreads = 0, list[float](), list[float]()
    for number in range(options.rounds):
        arms = {name: measure.rate_window(work, device, options.seconds) for name in ("one", "the same")}
        one, same = (measure.summarize(rates) for rates in measure.take_turns(arms, options.windows).values())
        apart.append(abs(one["median"] - same["median"]) / one["median"])
        spreads.append(max(rates["p80"] - rates["p20"] for rates in (one, same)) / one["median"])
        agree += apart[-1] < spreads[-1]
        print(f"{number + 1:3}: medians {100 * apart[-1]:5.2f} % apart, spread {100 * spreads[-1]:5.2f} %", flush=True)
    print(f"the two arms agree in {agree} of {options.rounds} rounds (limit: 19 of 20)")
    session.record(rounds=options.rounds, agree=agree, windows=options.windows, noise=noise,
                   medians_apart=measure.summarize(apart), spread=measure.summarize(spreads))  # fmt: skip
    return agree >= 0.95 * options.rounds
