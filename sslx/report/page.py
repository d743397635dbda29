"""The page of a report: HTML with everything that it shows inside, so that one file is the whole report."""

import base64
import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import cast

from sslx import __version__
from sslx.console.words import plural, shown
from sslx.report import curves, scorecard
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
    tiles += [(name, f"{text} %") for name, text in scorecard.accuracies(run.probe)]
    if "loss" in run.curves:
        tiles.append(("last loss", f"{run.curves['loss'][1][-1]:.4g}"))
    tiles += [("steps", f"{run.step:,}"), ("images seen", f"{run.num_samples:,}"), ("time", duration(run.seconds))]
    if "samples_per_s" in run.curves:
        values = sorted(run.curves["samples_per_s"][1].tolist())
        tiles.append(("images per second", f"{values[len(values) // 2]:,.0f}"))
    return tiles


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
    """Return the tables of the scores in each run's probe.json, and what the scores are."""
    tables = scorecard.tables([run.probe for run in runs])
    if not tables:
        commands = ", ".join(f"<code>sslx probe {html.escape(shown(run.folder))}</code>" for run in runs)
        return f'<h2>Scores</h2>\n<p class="soft">Not measured yet: {commands}</p>'
    parts = ["<h2>Scores</h2>", f'<p class="soft">Frozen features of {html.escape(_probed(runs))}</p>']
    for table in tables:
        parts += [f"<h3>{table.title}</h3>", _scores(table, runs)]
    columns = [column for table in tables for column in table.columns]
    rows = [[html.escape(text) for text in (column.name, column.explanation, column.paper)] for column in columns]
    explanations = _table(["score", "what it is", "source"], rows)
    parts.append(_folded("What the scores are", explanations, is_open=True))
    chosen = [(run.name, *line) for run in runs for line in scorecard.chosen(run.probe)]
    if chosen:
        lines = [[html.escape(shown(text, 500)) for text in (line if len(runs) > 1 else line[1:])] for line in chosen]
        heads = [*(["run"] if len(runs) > 1 else []), "representation", "chosen on held-out training images"]
        parts.append(_folded("Settings of the probes", _table(heads, lines)))
    return "\n".join(parts)


def _probed(runs: Sequence[Facts]) -> str:
    """Return which images were probed, in words."""
    probes = [run.probe for run in runs if run.probe]
    words = [
        f"{p.get('num_images')} {p.get('split')} images of {p.get('source')} at {p.get('view_px', '?')} px, "
        f"step {p.get('step', '?')}"
        for p in probes
    ]
    return shown("; ".join(dict.fromkeys(words)), 500)


def _scores(table: scorecard.Table, runs: Sequence[Facts]) -> str:
    """Return a table of scores with the best of each column in bold."""
    rows = list[list[str]]()
    for number, name, cells in table.rows:
        texts = [name] if len(runs) == 1 else [runs[number].name, name]
        line = [html.escape(shown(text)) for text in texts]
        for head in table.heads:
            cell = cells.get(head, scorecard.Cell(""))
            text = html.escape(cell.text)
            line.append(f"<b>{text}</b>" if table.is_best(head, cell) else text)
        rows.append(line)
    heads = [*(["run"] if len(runs) > 1 else []), "representation", *(html.escape(shown(head)) for head in table.heads)]
    return _table(heads, rows, numbers=len(table.heads))


def _folded(title: str, content: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{content}</details>"


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
    parts.append(_folded(f"All {len(names)} options", _table(heads, rows(names))))
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
