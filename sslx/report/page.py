"""The page of a report: HTML with everything that it shows inside, so that one file is the whole report."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

from sslx import __version__
from sslx.console.words import plural, shown
from sslx.report import curves
from sslx.report.facts import Facts


def page(runs: Sequence[Facts], date: str) -> str:
    """Return the report of one run or several as HTML."""
    first = runs[0]
    title = shown(first.name) if len(runs) == 1 else f"{len(runs)} runs"
    sections = [
        _header(runs, title, date),
        _curves(runs),
        _scorecard(runs),
        *(_pictures(run, named=len(runs) > 1) for run in runs),
        _settings(runs),
        _machines(runs),
    ]
    style = resources.files("sslx.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)} – sslx</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(runs: Sequence[Facts], title: str, date: str) -> str:
    lines = [f"<h1>{html.escape(title)}</h1>", f'<p class="soft">{html.escape(_subtitle(runs))}; {date}</p>']
    if len(runs) == 1:
        tiles = "".join(
            f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
            for name, value in _tiles(runs[0])
        )
        return "\n".join([*lines, f'<div class="tiles">{tiles}</div>'])
    names = list(dict.fromkeys(name for run in runs for name, _ in _tiles(run)))
    by_name = [dict(_tiles(run)) for run in runs]
    rows = [
        [_chip(number) + html.escape(shown(run.name)), *(html.escape(tiles.get(name, "")) for name in names)]
        for number, (run, tiles) in enumerate(zip(runs, by_name, strict=True))
    ]
    return "\n".join([*lines, _table(["run", *names], rows, numbers=len(names))])


def _subtitle(runs: Sequence[Facts]) -> str:
    methods = ", ".join(dict.fromkeys(run.method for run in runs))
    encoders = ", ".join(dict.fromkeys(str(run.settings.get("encoder.name", "?")) for run in runs))
    sources = ", ".join(dict.fromkeys(shown(str(run.settings.get("source.name", "?"))) for run in runs))
    states = {run.status.state for run in runs if run.status}
    return f"{methods} on {sources}, {encoders}; {', '.join(sorted(states)) or 'not started'}; sslx {__version__}"


def _tiles(run: Facts) -> list[tuple[str, str]]:
    """Return the names and values of a run's main figures."""
    tiles = list[tuple[str, str]]()
    for score in run.probe.get("scores", []):
        if score.get("name") == "pretrained encoder":
            tiles += [(name, f"{text} %") for name, text in _accuracies(score)]
    if "loss" in run.curves:
        tiles.append(("last loss", f"{run.curves['loss'][1][-1]:.4g}"))
    tiles += [("steps", f"{run.step:,}"), ("images seen", f"{run.num_samples:,}"), ("time", duration(run.seconds))]
    if "samples_per_s" in run.curves:
        values = sorted(run.curves["samples_per_s"][1].tolist())
        tiles.append(("images per second", f"{values[len(values) // 2]:,.0f}"))
    return tiles


def _accuracies(score: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values in % of the accuracies that stand at the top of the page."""
    named = ("kNN accuracy", score.get("knn")), ("linear accuracy", score.get("linear"))
    return [(name, f"{100 * value:.1f}") for name, value in named if isinstance(value, float)]


def _curves(runs: Sequence[Facts]) -> str:
    figures = [_figure(chart.title, _svg_data(curves.svg(chart, runs)), chart.note) for chart in curves.charts(runs)]
    if not figures:
        return ""
    legend = ""
    if len(runs) > 1:
        chips = "".join(f"<li>{_chip(n)}{html.escape(shown(run.name))}</li>" for n, run in enumerate(runs))
        legend = f'<ul class="legend">{chips}</ul>\n'
    return f'<h2>Training</h2>\n{legend}<div class="charts">\n' + "\n".join(figures) + "\n</div>"


def _scorecard(runs: Sequence[Facts]) -> str:
    """Return the table of the scores in each run's probe.json."""
    rows = [(run, score) for run in runs for score in run.probe.get("scores") or run.probe.get("label_free") or []]
    if not rows:
        commands = ", ".join(f"<code>sslx probe {html.escape(shown(run.folder))}</code>" for run in runs)
        return f'<h2>Scores</h2>\n<p class="soft">Not measured yet: {commands}</p>'
    columns = dict.fromkeys(name for _, score in rows for name, _ in scores(score))
    best = {name: max(dict(scores(score)).get(name, (-math.inf, ""))[0] for _, score in rows) for name in columns}
    lines = list[list[str]]()
    for run, score in rows:
        cells = dict(scores(score))
        line = [html.escape(shown(str(score.get("name", "?"))))]
        line = [html.escape(shown(run.name)), *line] if len(runs) > 1 else line
        for name in columns:
            value, text = cells.get(name, (-math.inf, ""))
            is_best = len(rows) > 1 and value == best[name] and name not in _LOWER_IS_BETTER
            line.append(f"<b>{html.escape(text)}</b>" if is_best else html.escape(text))
        lines.append(line)
    splits = [
        f"{p.get('num_images')} {p.get('split')} images of {p.get('source')}" for p in (r.probe for r in runs) if p
    ]
    note = "; ".join(dict.fromkeys(splits))
    heads = [*(["run"] if len(runs) > 1 else []), "representation", *(html.escape(shown(name)) for name in columns)]
    table = _table(heads, lines, numbers=len(columns))
    return (
        f'<h2>Scores</h2>\n<p class="soft">Frozen features, {html.escape(shown(note))}; in % where marked</p>\n{table}'
    )


_LOWER_IS_BETTER = {"alignment", "uniformity"}


def scores(score: Mapping[str, Any]) -> Iterable[tuple[str, tuple[float, str]]]:
    """Yield the columns of a row of probe.json: (name, (value, text)), accuracies in %."""
    for name, value in score.items():
        if name == "low_shot" and isinstance(value, dict):
            for labels, found in value.items():
                text = f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}"
                yield f"{labels} per class, %", (round(100 * found["mean"], 1), text)
        elif name in ("knn", "linear") and isinstance(value, float):
            yield f"{'kNN' if name == 'knn' else name}, %", (round(100 * value, 1), f"{100 * value:.1f}")
        elif isinstance(value, float) and name != "C":
            yield name.replace("_", " "), (value, f"{value:.3g}")


def _pictures(run: Facts, *, named: bool) -> str:
    figures = [_figure(title, _png_data(path)) for title, path in run.pictures.items()]
    if not figures:
        return ""
    title = f"Pictures of {html.escape(shown(run.name))}" if named else "Pictures"
    return f'<h2>{title}</h2>\n<div class="pictures">\n' + "\n".join(figures) + "\n</div>"


def _settings(runs: Sequence[Facts]) -> str:
    """Return the settings: those that differ between the runs first, then all of them, folded up."""
    names = sorted({name for run in runs for name in run.settings})
    parts = ["<h2>Settings</h2>"]
    differing = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    heads = ["option", *(html.escape(shown(run.name)) for run in runs)]

    def rows(chosen: Sequence[str]) -> list[list[str]]:
        return [
            [f"<code>{html.escape(shown(name, 200))}</code>", *(_value(run.settings.get(name)) for run in runs)]
            for name in chosen
        ]

    if len(runs) > 1:
        parts += ["<h3>What differs</h3>", _table(heads, rows([n for n in differing if n not in ("name", "runs")]))]
    parts.append(f"<details><summary>All {len(names)} options</summary>{_table(heads, rows(names))}</details>")
    return "\n".join(parts)


def _machines(runs: Sequence[Facts]) -> str:
    rows = [
        [
            html.escape(shown(run.name)),
            html.escape(shown(f"{plural(len(start.hosts), 'rank')} on {', '.join(dict.fromkeys(start.hosts))}")),
            html.escape(shown(f"{start.device}, {plural(start.cores, 'core')}")),
            f"<code>{html.escape(shown(start.command, 2000))}</code>",
            html.escape(shown(f"sslx {start.code}, torch {start.versions.get('torch', '?')}")),
        ]
        for run in runs
        for start in run.starts
    ]
    if not rows:
        return ""
    return "<h2>Hardware and commands</h2>\n" + _table(["run", "ranks", "device", "command", "versions"], rows)


def duration(seconds: float) -> str:
    """Return a time such as 48 s, 12 min or 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _value(value: object) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, cast("list[object]", value)))
    text = "" if value is None else str(value)
    return html.escape(shown(text, 300))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Return a table of HTML cells, of whose columns the last ``numbers`` hold numbers."""
    kinds = ["wide"] * (len(heads) - numbers) + ["number"] * numbers
    head = "".join(f'<th class="{kind}">{text}</th>' for kind, text in zip(kinds, heads, strict=True))
    lines = [
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _figure(title: str, source: str, note: str = "") -> str:
    name = html.escape(shown(title))
    caption = f"{name}<span>{html.escape(note)}</span>" if note else name
    return f'<figure><figcaption>{caption}</figcaption><img alt="{name}" src="{source}"></figure>'


def _chip(number: int) -> str:
    return (
        f'<i style="background:{curves.color(number)};display:inline-block;width:18px;height:4px;margin-right:7px"></i>'
    )


def _svg_data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _png_data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
