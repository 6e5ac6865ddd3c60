"""Terminal heat map of an `AttributionBatch`.

Responses are hostile text: everything a model or a user wrote is shown with its control,
formatting and bidirectional characters spelled out, and never passes through rich's markup.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from .result import AttributionBatch

__all__ = ["show"]

# Pale to full, black text on all of them: readable on dark and on light terminals.
POSITIVE = ((222, 236, 255), (66, 146, 255))
NEGATIVE = ((255, 226, 222), (255, 92, 80))
FAINT = 0.04  # below this share of the scale a token stays uncoloured
TOP_SHARE = 0.1

# Control, format (bidi overrides, zero-width), line and paragraph separators. Lone surrogates are
# spelled out because no encoding has them.
HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Zl", "Zp"})


def show(
    batch: AttributionBatch,
    rows: int | Iterable[int] | None = None,
    console: Console | None = None,
    by: str = "reward",
) -> None:
    """Prints, per response, its score, its verdicts and its tokens coloured by reward.

    rows: one index or several; None: all. by: "reward" or "advantage". The colour scale is
    symmetric around zero and runs to the response's largest absolute value: red is negative, blue
    positive. Without colours the top 10 % of the tokens by absolute value are marked instead.
    Raises InputError for an unknown `by`, absent advantages or a row out of range.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console() if console is None else console
    if by not in ("reward", "advantage"):
        raise InputError("unknown quantity", expected="reward or advantage", got=repr(by))
    values = batch.token_rewards if by == "reward" else batch.token_advantages
    if values is None:
        raise InputError("this batch has no token_advantages: group_size was 1")
    for row in _row_indices(rows, len(batch)):
        console.print(_head(batch, row, console))
        tokens = None if batch.tokens is None else batch.tokens[row]
        console.print(_heat_map(tokens, values[row].tolist(), by, console))
        console.print()
    for line in _stats_lines(batch, console):
        console.print(Text(*line))


def visible(text: str, encoding: str = "utf-8") -> str:
    """`text` with everything a terminal would act on, hide or fail to encode spelled out."""
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(
        _spell(char) if unicodedata.category(char) in HIDDEN_CATEGORIES else char for char in text
    )
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _spell(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _row_indices(rows: int | Iterable[int] | None, n_rows: int) -> list[int]:
    if rows is None:
        return list(range(n_rows))
    indices = [rows] if isinstance(rows, int) else list(rows)
    for index in indices:
        if not 0 <= index < n_rows:
            raise InputError("row out of range", expected=f"0 to {n_rows - 1}", got=index)
    return indices


def _head(batch: AttributionBatch, row: int, console: Console) -> Text:
    from rich.text import Text

    true_mark, false_mark = _symbols(console, ("✓", "✗"), ("T", "F"))
    head = Text()
    head.append(f"response {row}", "bold")
    head.append(
        f"  score {float(batch.scores[row]):+.4g}  {batch.token_rewards[row].numel()} tokens"
    )
    rubrics = None if batch.rubrics is None else batch.rubrics[row]
    judged = zip(batch.verdicts[row], batch.verdict_logps[row], strict=True)
    for item, (verdict, logp) in enumerate(judged):
        text, weight = ("", math.nan) if rubrics is None else rubrics[item]
        head.append("\n  ")
        head.append(true_mark if verdict else false_mark, "bold green" if verdict else "bold red")
        if rubrics is not None:
            head.append(f" {weight:+6g}")
        head.append(f"  log p(True) {logp:8.3f}")
        head.append(f"  {visible(text, console.encoding)}" if text else f"  item {item}")
    return head


def _heat_map(tokens: list[str] | None, values: list[float], by: str, console: Console) -> Text:
    from rich.text import Text

    text = Text()
    scale = max((abs(value) for value in values), default=0.0)
    if not values:
        text.append("(empty response)", "dim")
        return text
    plain = console.color_system is None or console.no_color
    key = "marked: the top 10 % by size" if plain else "red negative, blue positive"
    if not scale:
        key = "nothing to show"
    plus_minus = _symbols(console, ("±",), ("+-",))[0]
    text.append(f"token {by}, scale {plus_minus}{scale:.3g}, {key}\n", "dim")
    opening, closing, newline, dot = _symbols(console, tuple("⟦⟧↵·"), ("[", "]", "\\n", "."))
    top = _top_tokens(values) if plain else set()
    for index, value in enumerate(values):
        token = f"#{index} " if tokens is None else tokens[index]
        shown = newline.join(visible(part, console.encoding) for part in token.split("\n")) or dot
        if index in top:
            shown = f"{opening}{'+' if value > 0 else '-'}{shown}{closing}"
        text.append(shown, "" if plain else _style(value / scale if scale else 0.0))
        text.append("\n" * token.count("\n"))  # spelled out, a line break keeps its effect
    return text


def _top_tokens(values: list[float]) -> set[int]:
    """The ceil(10 %) tokens of largest absolute value, zeros never."""
    count = math.ceil(TOP_SHARE * len(values))
    order = sorted(range(len(values)), key=lambda index: -abs(values[index]))
    return {index for index in order[:count] if values[index]}


def _style(share: float) -> str:
    if not abs(share) >= FAINT:
        return ""
    pale, full = POSITIVE if share > 0 else NEGATIVE
    red, green, blue = (
        round(start + (stop - start) * abs(share)) for start, stop in zip(pale, full, strict=True)
    )
    return f"rgb(0,0,0) on rgb({red},{green},{blue})"


def _stats_lines(batch: AttributionBatch, console: Console) -> list[tuple[str, str]]:
    lines = []
    known = (
        ("entropy", "entropy {:.3f} (1 = uniform)"),
        ("top10_mass", "top 10 % of the tokens hold {:.1%} of the mass"),
    )
    parts = [form.format(batch.stats[name]) for name, form in known if name in batch.stats]
    if parts:
        lines.append(("attribution: " + ", ".join(parts), ""))
    for alarm in batch.stats.get("alarms", ()):
        lines.append((f"! {visible(str(alarm), console.encoding)}", "bold yellow"))
    return lines


def _symbols(console: Console, symbols: tuple[str, ...], plain: tuple[str, ...]) -> tuple[str, ...]:
    return symbols if console.encoding.lower().startswith("utf") else plain
