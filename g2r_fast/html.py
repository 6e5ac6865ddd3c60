"""An `AttributionBatch` as one HTML page: no network, and readable without JavaScript.

Responses are hostile text. Every string goes through `_text` or `_token`, which escape it and spell
out what cannot be seen; the data for the script are numbers only; the Content-Security-Policy
names the one style sheet and the one script by their hashes, so nothing else could run or load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, InputTypeError
from .report import NEGATIVE, POSITIVE, _row_indices, visible
from .words import unit_starts

if TYPE_CHECKING:
    from .result import AttributionBatch

__all__ = ["write_page"]

ASSETS = Path(__file__).with_name("report_page")
TITLE = "Token rewards"
LEVELS = 12  # steps of colour on either side of zero; page.js has the same number
DIGITS = 6  # significant digits of the numbers in the page

# On a dark page the colours rise out of the background, under light text.
DARK_POSITIVE = ((33, 46, 68), (38, 102, 214))
DARK_NEGATIVE = ((66, 37, 40), (196, 52, 43))

Rows = list[tuple[str | None, "AttributionBatch", list[int]]]


def write_page(
    path: str | os.PathLike[str],
    sections: Iterable[tuple[str | None, AttributionBatch]],
    title: str = TITLE,
) -> None:
    """`Path(path).write_text(page)`, whole or not at all: several batches on one page.

    sections: (heading, batch) pairs in the order of the page; no heading where it is None.
    Raises InputTypeError for a title or a heading that is no string.
    """
    every: Rows = [(heading, batch, list(range(len(batch)))) for heading, batch in sections]
    _write(path, _page(every, title))


def write_rows(
    batch: AttributionBatch,
    path: str | os.PathLike[str],
    rows: int | Iterable[int] | None,
    title: str,
) -> None:
    """What `AttributionBatch.to_html` does."""
    _write(path, _page([(None, batch, _row_indices(rows, len(batch)))], title))


def _write(path: str | os.PathLike[str], page: str) -> None:
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError("the folder of the page does not exist", got=repr(os.fspath(path)))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# --- numbers and text ---------------------------------------------------------------------------


def _text(text: object) -> str:
    """Any string, for an element or a quoted attribute."""
    return escape(visible(str(text)), quote=True)


def _token(token: str) -> str:
    """A token's string; what was spelled out is told from what was written by its <i>."""
    if token.isascii() and token.isprintable() and token:
        return escape(token)
    shown = []
    for char in token:
        seen = visible(char)
        if char == "\n":
            shown.append("<i>↵</i>\n")  # spelled out, a line break keeps its effect
        else:
            shown.append(escape(char) if seen == char else f"<i>{escape(seen)}</i>")
    return "".join(shown) or "<i>·</i>"


def _number(value: float, sign: str = "") -> str:
    """Four significant digits, as page.js writes them."""
    if math.isnan(value):
        return "NaN"
    shown = f"{abs(value):.4g}" if math.isfinite(value) else "∞"
    mantissa, _, exponent = shown.partition("e")
    if exponent:
        shown = f"{mantissa}e{int(exponent)}".replace("e-", "e−")
    return ("−" if value < 0 else sign if value > 0 else "") + shown


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def _island(data: object) -> str:
    """JSON that can stand in a script element whatever strings it holds."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _sendable(values: list[float]) -> list[float | str]:
    """JSON has no NaN and no infinities: as strings, which JavaScript's Number() reads."""
    names = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    return [value if math.isfinite(value) else names[str(value)] for value in values]


# --- colours ------------------------------------------------------------------------------------


def _scale(values: Iterable[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _level(value: float, scale: float) -> str:
    """The CSS class: p1 to p12, n1 to n12, "" near zero, "nan"."""
    if math.isnan(value):
        return "nan"
    share = min(1.0, abs(value) / scale) if scale else float(math.isinf(value))
    step = math.floor(share * LEVELS + 0.5)
    return "" if not step else f"{'p' if value > 0 else 'n'}{step}"


def _palette(dark: bool = False) -> dict[str, tuple[int, int, int]]:
    ends = {"p": POSITIVE, "n": NEGATIVE}
    if dark:
        ends = {"p": DARK_POSITIVE, "n": DARK_NEGATIVE}
    colours = {}
    for side, (pale, full) in ends.items():
        for step in range(1, LEVELS + 1):
            share = (step - 1) / (LEVELS - 1)
            red, green, blue = (round(a + (b - a) * share) for a, b in zip(pale, full, strict=True))
            colours[f"{side}{step}"] = (red, green, blue)
    return colours


def _style_sheet() -> str:
    def rules(dark: bool) -> str:
        return "".join(
            ".{}{{background:#{:02x}{:02x}{:02x}}}".format(name, *rgb)
            for name, rgb in _palette(dark).items()
        )

    css = (ASSETS / "page.css").read_text(encoding="ascii")
    return f"{css}{rules(False)}\n@media (prefers-color-scheme:dark){{{rules(True)}}}\n"


def _hash(source: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() + "'"


# --- the page -----------------------------------------------------------------------------------


def _page(sections: Rows, title: str) -> str:
    for what, name in (("title", title), *(("a heading", heading) for heading, _, _ in sections)):
        if not isinstance(name, str) and not (name is None and what == "a heading"):
            raise InputTypeError(f"{what} is no string", expected="str", got=repr(name))
    style = _style_sheet()
    script = (ASSETS / "page.js").read_text(encoding="ascii")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    data: list[dict[str, Any]] = []
    body = "\n".join(_section(heading, batch, rows, data) for heading, batch, rows in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_text(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{_toolbar(sections)}
<p class="key"><b class="p7">blue</b> adds to the reward, <b class="n7">red, underlined</b> takes
from it; the strongest colour is the largest absolute value.
<noscript>Without JavaScript this page shows the token rewards only.</noscript></p>
<main>
{body or '<p class="note">no responses</p>'}
</main>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">{_island(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def _toolbar(sections: Rows) -> str:
    """Hidden until the script finds it, as it does nothing without."""
    texts: dict[int, set[str]] = {}  # of each item that can be looked at, what the rubrics call it
    for _, batch, rows in sections:
        for row in rows:
            for item, alpha in enumerate(_attributions(batch, row)):
                if alpha is not None:
                    rubric = _rubric_of(batch, row)
                    texts.setdefault(item, set()).add(rubric[item][0] if rubric else "")
    views = [("reward", "token rewards")]
    if any(batch.token_advantages is not None for _, batch, _ in sections):
        views.append(("advantage", "token advantages"))
    for item in sorted(texts):
        name = next(iter(texts[item])) if len(texts[item]) == 1 else ""
        name = f": {name[:70]}{'…' if len(name) > 70 else ''}" if name else ""
        views.append((f"item-{item}", f"item {item}{name}"))
    options = "".join(f'<option value="{view}">{_text(name)}</option>' for view, name in views)
    return f"""<form class="toolbar" hidden>
{_choice("granularity", "one colour per", ("token", "word", "sentence"))}
<label class="choice"><span>show</span><select name="view">{options}</select></label>
{_choice("scale", "colour scale per", ("response", "page"))}
</form>"""


def _choice(name: str, legend: str, values: tuple[str, ...]) -> str:
    inputs = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"'
        f"{' checked' if value == values[0] else ''}><span>{value}</span></label>"
        for value in values
    )
    return (
        f'<fieldset class="choice"><legend>{legend}</legend>'
        f'<span class="segments">{inputs}</span></fieldset>'
    )


def _section(
    heading: str | None, batch: AttributionBatch, rows: list[int], data: list[dict[str, Any]]
) -> str:
    """One batch; what the script needs of each response goes to `data`."""
    parts = ["<section>"]
    if heading is not None:
        parts.append(f"<h2>{_text(heading)}</h2>")
    parts.append(_figures(batch))
    if batch.attributions is None and any(map(any, batch.verdicts)):
        parts.append(
            '<p class="note">The attributions of the single items were not kept '
            "(keep_attributions=False): the sums are all there is to show.</p>"
        )
    parts += [_response(batch, row, data) for row in rows]
    parts.append("</section>")
    return "\n".join(parts)


def _figures(batch: AttributionBatch) -> str:
    stats = batch.stats
    figures = []
    for name, label, form in (
        ("entropy", "entropy of α (1 = uniform)", "{:.3f}"),
        ("top10_mass", "mass of α on the top 10 % of the tokens", "{:.1%}"),
    ):
        value = stats.get(name)
        if isinstance(value, (int, float)):
            figures.append((label, form.format(value)))
        elif value is not None:
            figures.append((label, str(value)))
    counts = stats.get("counts")
    if isinstance(counts, dict):
        odd = [f"{str(name).replace('_', ' ')} {count}" for name, count in counts.items() if count]
        figures.append(("odd inputs", ", ".join(odd) or "none"))
    run = [str(stats[name]) for name in ("engine", "backend", "dtype", "device") if name in stats]
    if run:
        figures.append(("computed with", ", ".join(run)))
    parts = [
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in figures
    ]
    alarms = [f'<p class="alarm">{_text(alarm)}</p>' for alarm in stats.get("alarms", ())]
    return (f'<dl class="figures">{"".join(parts)}</dl>' if parts else "") + "".join(alarms)


def _attributions(batch: AttributionBatch, row: int) -> Sequence[Any]:
    """alpha of each item; of a reward model, which has no items, the only one."""
    return [] if batch.attributions is None else batch.attributions[row]


def _rubric_of(batch: AttributionBatch, row: int) -> Sequence[tuple[str, float]]:
    return [] if batch.rubrics is None else batch.rubrics[row]


def _response(batch: AttributionBatch, row: int, data: list[dict[str, Any]]) -> str:
    rewards = _rounded(batch.token_rewards[row].tolist())
    advantages = batch.token_advantages
    tokens = None if batch.tokens is None else batch.tokens[row]
    score = float(batch.scores[row])
    weights = [float(weight) for _, weight in _rubric_of(batch, row)]
    to_be_had = sum(max(weight, 0.0) for weight in weights)
    data.append(
        {
            "reward": _sendable(rewards),
            "advantage": None
            if advantages is None
            else _sendable(_rounded(advantages[row].tolist())),
            "items": [
                None if alpha is None else _sendable(_rounded(alpha.tolist()))
                for alpha in _attributions(batch, row)
            ],
            # What one unit of an item's alpha is worth; empty where no weights were kept.
            "worth": _sendable([w / to_be_had if to_be_had else 0.0 for w in weights]),
            "negative": [w < 0 for w in weights] if batch.verdicts[row] else [score < 0],
            "verdicts": batch.verdicts[row],
            "word": None if tokens is None else unit_starts(tokens, "word"),
            "sentence": None if tokens is None else unit_starts(tokens, "sentence"),
        }
    )
    facts = [f'<span class="score">score <b>{_number(score, "+")}</b></span>']
    if weights:
        earned = sum(w for w, true in zip(weights, batch.verdicts[row], strict=True) if true)
        facts.append(
            f"<span>{_number(earned)} of {_number(to_be_had)} points</span>"
            if to_be_had
            else "<span>no item has a positive weight</span>"
        )
    facts.append(f"<span>{len(rewards)} token{'' if len(rewards) == 1 else 's'}</span>")
    scale = _scale(rewards)
    label = f"heat map of response {row}; the arrow keys move through it"
    spans = []
    for index, value in enumerate(rewards):
        spelled = f"#{index} " if tokens is None else _token(tokens[index])
        names = f"u {_level(value, scale)}".strip()
        title = f"token {index}: {_number(value, '+')}"
        spans.append(f'<span class="{names}" title="{title}">{spelled}</span>')
    return f"""<article>
<header><h3>Response {row}</h3>{"".join(facts)}</header>
<div class="body">
<div class="reading">
{_legend(scale)}
<div class="map" dir="auto" role="group" aria-label="{label}">\
{"".join(spans) or "<em>empty response</em>"}</div>
</div>
{_rubric(batch, row)}
</div>
</article>"""


def _legend(scale: float) -> str:
    names = [f"n{step}" for step in range(LEVELS, 0, -1)]
    names += ["", *(f"p{step}" for step in range(1, LEVELS + 1))]
    swatches = "".join(f'<i class="{name}"></i>' for name in names)
    return (
        '<div class="legend"><span class="what">token rewards, one colour per token</span>'
        f'<span class="scale"><span class="bar" aria-hidden="true">{swatches}</span>'
        f'<span class="ends"><span class="low">{_number(-scale)}</span><span>0</span>'
        f'<span class="high">{_number(scale, "+")}</span></span></span></div>'
    )


def _rubric(batch: AttributionBatch, row: int) -> str:
    rubric = _rubric_of(batch, row)
    shown = _attributions(batch, row)
    lines = []
    judged = zip(batch.verdicts[row], batch.verdict_logps[row], strict=True)
    for item, (verdict, logp) in enumerate(judged):
        text, weight = rubric[item] if rubric else (f"item {item}", None)
        name = f'<span dir="auto">{_text(text)}</span>'
        if item < len(shown) and shown[item] is not None:
            name = f'<button type="button" value="item-{item}">{name}</button>'
        lines.append(
            f'<tr class="{"true" if verdict else "false"}">'
            f"<td>{'✓ True' if verdict else '✗ False'}</td>"
            f"<td>{'' if weight is None else _number(float(weight), '+')}</td>"
            f"<td>{_number(logp)}</td><td>{name}</td></tr>"
        )
    if not lines:
        return ""
    head = "<tr><th>verdict</th><th>weight</th><th>log p(True)</th><th>rubric item</th></tr>"
    return (
        f'<div class="items"><table><thead>{head}</thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
