"""The HTML of a report: one file that loads nothing, for light, dark, wide and narrow screens."""

import base64
import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

from experiments import files
from experiments.report import records, results

# Cards draw the intervals of these metrics on the scale [0, 1].
_PROPORTION = re.compile("rate|accuracy|fraction|passed|share")
_ACRONYMS = {"kl": "KL", "ipo": "IPO", "copg": "CoPG", "dpo": "DPO"}


def render(
  *,
  title: str,
  result: results.Result,
  headline: str,
  history: records.History,
  figures: Iterable[tuple[str, str, bytes]],
  config: Mapping[str, Any],
  environment: Mapping[str, Any],
  warning: str = "",
) -> str:
  """Returns the HTML of the page, in which every text is escaped.

  Args:
    title: the heading.
    result: the final evaluation.
    headline: the metric that comes first.
    history: the training records.
    figures: (name, caption, SVG) of each figure.
    config: fields by dotted name.
    environment: as `run_folder.environment` returns it; may be empty.
    warning: a text in red above the numbers; empty for none.
  """
  estimates = dict(result.metrics)
  # A metric that the evaluation lacks is taken from the last training record.
  wanted = [headline] if estimates else [headline, "loss"]
  for name in wanted:
    if name not in estimates and history and name in history[-1]:
      estimates[name] = results.Estimate(history[-1][name])
  if headline in estimates:
    estimates = {headline: estimates.pop(headline), **estimates}
  seconds = sum(_durations(history))
  facts = [
    environment.get("started", "")[:10],
    f"{history[-1]['step'] + 1} steps in {records.clock(seconds)}" if history else "",
    environment.get("devices", ""),
    f"seed {config['seed']}" if "seed" in config else "",
  ]
  chips = "".join(f"<span class=chip>{html.escape(fact)}</span>" for fact in facts if fact)
  body = [f"<header><p class=brand>bootstrax</p><h1>{html.escape(title)}</h1>{chips}</header>"]
  if warning:
    body.append(f"<p class=warning>{html.escape(warning)}</p>")
  if estimates:
    cards = "".join(_card(*item, index == 0) for index, item in enumerate(estimates.items()))
    body.append(f"<section class=cards>{cards}</section>")
    if any(estimate.low is not None for estimate in estimates.values()):
      body.append("<p class=small>Intervals are 95 % confidence intervals.</p>")
  body += [f"<p class=note>{html.escape(note)}</p>" for note in result.notes]
  images = "".join(_image(*figure) for figure in figures)
  if images:
    body.append(f"<h2>Figures</h2>{images}")
  body += [_table(table) for table in result.tables]
  body.append(_details("Config", config))
  body.append(_details("Environment", files.flatten(environment)))
  return _PAGE.replace("$TITLE", html.escape(title)).replace("$BODY", "\n".join(body))


def _durations(history: records.History) -> list[float]:
  """Returns the seconds of each part of a run: the clock may restart when the run is resumed."""
  clocks = [record.get("seconds", 0.0) for record in history]
  ends = [a for a, b in zip(clocks, [*clocks[1:], -1.0], strict=False) if b < a]
  return ends


def _card(name: str, estimate: results.Estimate, first: bool) -> str:
  words = name.replace("_", " ").replace("/", " / ").split()
  label = " ".join(_ACRONYMS.get(word, word) for word in words)
  lines = []
  bar = ""
  if estimate.low is not None and estimate.high is not None:
    low, high = estimate.low, estimate.high
    lines.append(f"{results.number(low)} to {results.number(high)}")
    if _PROPORTION.search(name) and 0 <= low <= high <= 1:
      bar = (
        f'<span class=track><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<b style="left:{100 * estimate.value:.1f}%"></b></span>'
      )
  if estimate.n is not None:
    lines.append(f"n = {estimate.n:,}")
  if estimate.note:
    lines.append(estimate.note)
  small = " · ".join(f"<span>{html.escape(line)}</span>" for line in lines)
  return (
    f'<div class="card{" first" if first else ""}"><h3>{html.escape(label)}</h3>'
    f"<p class=value>{results.number(estimate.value)}</p>{bar}<p class=small>{small}</p></div>"
  )


def _image(name: str, caption: str, svg: bytes) -> str:
  data = base64.b64encode(svg).decode()
  text = html.escape(caption)
  return (
    f'<figure id="{html.escape(name)}"><div class=panels><img alt="{text}" '
    f'src="data:image/svg+xml;base64,{data}"></div><figcaption>{text}</figcaption></figure>'
  )


def _table(table: results.Table) -> str:
  texts = [[table.text(cell) for cell in row] for row in table.rows]
  head = "".join(
    f"<th{_align([row[index] for row in texts])}>{html.escape(str(column))}</th>"
    for index, column in enumerate(table.columns)
  )
  rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in texts)
  caption = f"<p class=small>{html.escape(table.caption)}</p>" if table.caption else ""
  return (
    f"<h2>{html.escape(table.title)}</h2>{caption}<div class=scroll><table><thead><tr>{head}</tr>"
    f"</thead><tbody>{rows}</tbody></table></div>"
  )


def _cell(text: str) -> str:
  if text in ("pass", "fail"):
    return f'<td><span class="pill {text}">{text}</span></td>'
  return f"<td{_align([text])}>{html.escape(text)}</td>"


def _align(texts: list[str]) -> str:
  """Returns the class attribute of cells that all hold numbers; empty for other cells."""
  number = re.compile(r"[+\-−]?([\d.,]+(e[+\-]?\d+)?%?( \[.*\])?|nan|inf)|")  # or nothing
  return " class=number" if any(texts) and all(map(number.fullmatch, texts)) else ""


def _details(title: str, fields: Mapping[str, Any]) -> str:
  rows = "".join(
    f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(str(value))}</code></td></tr>"
    for name, value in fields.items()
  )
  return (
    f"<details><summary>{html.escape(title)}</summary><div class=scroll><table>{rows}</table></div>"
    "</details>"
  )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>$TITLE · bootstrax</title><style>
:root { --page: #f7f8fa; --card: #fff; --ink: #1d2129; --soft: #5d6573; --line: #e3e6eb;
  --accent: #3b6fd4; --tint: #e9effb; --good: #1d7f5f; --bad: #c23b3b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14161a; --card: #1d2026; --ink: #e8eaee; --soft: #9ba3b0; --line: #30353e;
    --accent: #7ea6f4; --tint: #24304a; --good: #57c49b; --bad: #f08080; }
  figure img { filter: invert(.9) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 28px 96px; }
.brand { margin: 0; color: var(--accent);
  font-weight: 600; letter-spacing: .04em; font-size: 14px; }
h1 { margin: 2px 0 14px; font-size: 38px; letter-spacing: -.02em; line-height: 1.15; }
h2 { margin: 56px 0 16px; font-size: 21px; letter-spacing: -.01em; }
.chip { display: inline-block; margin: 0 8px 8px 0; padding: 3px 12px; border-radius: 99px;
  border: 1px solid var(--line); background: var(--card); color: var(--soft); font-size: 13.5px; }
.cards { display: grid; gap: 16px; margin: 28px 0 10px;
  grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
.card { padding: 18px 20px 14px; border: 1px solid var(--line); border-radius: 14px;
  background: var(--card); }
.card.first { background: var(--tint); border-color: transparent; }
.card h3 { margin: 0; color: var(--soft); font-size: 14px;
  font-weight: 500; overflow-wrap: anywhere; }
.card h3::first-letter { text-transform: uppercase; }
.value { margin: 4px 0 6px; font-size: 31px; font-weight: 620;
  letter-spacing: -.02em; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.card.first .value { color: var(--accent); }
.small { margin: 6px 0 0; color: var(--soft); font-size: 13.5px; }
.card .small span { display: inline-block; }
.track { position: relative; display: block; height: 6px; margin: 6px 0 10px; border-radius: 3px;
  background: var(--line); }
.track i { position: absolute; top: 0; bottom: 0; min-width: 2px; border-radius: 3px; opacity: .5;
  background: var(--accent); }
.track b { position: absolute; top: -3px; width: 3px; height: 12px;
  margin-left: -1px; border-radius: 2px;
  background: var(--accent); }
.note { max-width: 76ch; margin: 20px 0; padding-left: 16px; border-left: 3px solid var(--accent); }
.warning { padding: 14px 18px; border-radius: 12px; border: 1px solid var(--bad); color: var(--bad);
  white-space: pre-line; }
figure { margin: 0 0 24px; padding: 22px 22px 16px;
  border: 1px solid var(--line); border-radius: 14px; background: var(--card); }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.panels { overflow-x: auto; }
figcaption { margin-top: 12px; color: var(--soft); font-size: 14px; }
.scroll { overflow-x: auto; border: 1px solid var(--line);
  border-radius: 14px; background: var(--card); }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; }
th { padding: 11px 16px; color: var(--soft); font-weight: 550;
  text-align: left; font-size: 13.5px; }
td { padding: 10px 16px; border-top: 1px solid var(--line); vertical-align: top;
  white-space: pre-wrap; overflow-wrap: anywhere; min-width: 5em; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pill { padding: 2px 11px; border-radius: 99px; font-size: 13px; font-weight: 600; }
.pass { color: var(--good); background: color-mix(in srgb, var(--good) 14%, transparent); }
.fail { color: var(--bad); background: color-mix(in srgb, var(--bad) 14%, transparent); }
details { margin-top: 28px; }
summary { cursor: pointer; font-size: 17px; font-weight: 600; margin-bottom: 12px; }
details td:first-child { color: var(--soft); width: 34%; }
details tr:first-child td { border-top: 0; }
code { font: 13.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 640px) {  /* figures and tables scroll rather than shrink below legibility */
  main { padding: 32px 16px 64px; }
  h1 { font-size: 30px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 10px; }
  .card { padding: 14px 14px 10px; }
  .value { font-size: 25px; }
  figure { padding: 16px 14px 12px; }
  figure img { max-width: max(100%, 720px); }
  td:not(.number) { min-width: 10em; } }
@media print { details { display: none; } body { background: #fff; } }
</style></head><body><main>
$BODY
</main></body></html>
"""
