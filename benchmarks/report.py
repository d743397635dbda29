"""Write the figures of the READMEs from ``results/*.jsonl``, and draw their pictures.

    python benchmarks/report.py            (writes them)
    python benchmarks/report.py --check    (fails if a README differs from the results; the tests run it)

A figure stands between ``<!-- TOPIC -->`` and ``<!-- /TOPIC -->`` (a table), or ``<!-- TOPIC.VALUE -->`` and
``<!-- /TOPIC.VALUE -->`` (a value in a sentence), with the topics of ``figures.py``.  All words around them are written
by hand.  A picture ``results/NAME.svg`` that a README shows is drawn by ``pictures.py``.

The lines ``# Score:`` of recipes are only checked, in both cases: for a line that differs, the new one is printed.
"""

import argparse
import hashlib
import re
import sys
from functools import cache
from pathlib import Path

from figures import TOPICS, Figures, score
from harness import FOLDER
from pictures import PICTURES

ROOT = FOLDER.parent
READMES = [
    ROOT / folder / "README.md"
    for folder in (".", "benchmarks", "slurm", "kernels", "sslx/data", "sslx/methods", "sslx/train", "tests")
]
RECIPES = sorted(ROOT.glob("sslx/recipes/*_cifar10_*.toml"))
MARK = re.compile(r"<!-- /?([a-z]\w*(?:\.\w+)?) -->")
FIGURE = re.compile(r"(<!-- ([a-z]\w*(?:\.\w+)?) -->)(.*?)(<!-- /\2 -->)", re.DOTALL)
SCORE = re.compile(r"^# Score: (.*)\n", re.MULTILINE)
PICTURE = re.compile(r"\bresults/(\w+)\.svg")


@cache
def topic(name: str) -> Figures:
    """The figures of a topic."""
    return TOPICS[name]()


def figure(name: str) -> str:
    """The table of a topic, or one of its values."""
    place, _, key = name.partition(".")
    if place not in TOPICS or key not in topic(place):
        raise ValueError(f"figures.py has no figure {name}")
    return topic(place)[key]


def written(text: str) -> str:
    """A README's text with all its figures as the results have them."""
    num_marks, num_figures = len(MARK.findall(text)), len(FIGURE.findall(text))
    if num_marks != 2 * num_figures:
        raise ValueError(f"{num_marks} marks enclose {num_figures} figures: a mark is missing or misspelled")
    if at_line_start := re.search(r"^<!-- \w+\.\w+ -->", text, re.MULTILINE):
        raise ValueError(f"{at_line_start[0]} begins a line, which ends the paragraph in Markdown: move the line break")
    return FIGURE.sub(lambda match: f"{match[1]}{figure(match[2])}{match[4]}", text)


def wrong_scores() -> list[str]:
    """What to write into which recipe."""
    lines: list[str] = []
    for path in RECIPES:
        for line in SCORE.findall(path.read_text()):
            if line != score(path.stem):
                lines.append(f"{path} has another score than the results.  Write: # Score: {score(path.stem)}")
    return lines


def is_stale(name: str, folder: Path = FOLDER / "results", *, check: bool) -> bool:
    """Whether a picture differs from the results; unless ``check`` is set, such a picture is drawn anew."""
    drawing, path = PICTURES[name](), folder / f"{name}.svg"
    contents = repr((drawing.func.__name__, drawing.args, drawing.keywords)).encode()
    mark = f"<!-- of {hashlib.sha256(contents).hexdigest()[:16]} -->\n"
    if path.exists() and path.read_text().endswith(mark):
        return False
    if not check:
        drawing(path=path)
        path.write_text(path.read_text() + mark)
    return True


def main(argv: list[str] | None = None) -> int:
    """Write or check all figures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything differs")
    check = parser.parse_args(argv).check
    texts = {path: path.read_text() for path in READMES}
    stale = [path for path, text in texts.items() if written(text) != text]
    if not check:
        for path in stale:
            path.write_text(written(texts[path]))
    shown = sorted({name for text in texts.values() for name in PICTURE.findall(text)})
    stale += [FOLDER / "results" / f"{name}.svg" for name in shown if is_stale(name, check=check)]
    for path in stale:
        print(f"{path} differs from the results: run python benchmarks/report.py" if check else f"{path} written")
    scores = wrong_scores()
    print("\n".join(scores), end="\n" if scores else "")
    return int(bool(scores or (check and stale)))


if __name__ == "__main__":
    sys.exit(main())
