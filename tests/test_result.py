"""The result object, its file and its rendering."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from g2r_fast.errors import InputError, InputTypeError
from g2r_fast.report import visible
from g2r_fast.result import AttributionBatch

LENGTHS = (3, 0, 1, 4)


def make_batch(**changes: Any) -> AttributionBatch:
    """Four responses, one of them empty, with 2, 1, 0 and 3 rubric items."""
    generator = torch.Generator().manual_seed(0)

    def rows() -> list[torch.Tensor]:
        return [torch.randn(length, generator=generator) for length in LENGTHS]

    first, empty, single, last = rows()
    fields: dict[str, Any] = {
        "scores": torch.tensor([0.5, 0.0, -0.25, 1 / 3]),
        "verdicts": [[True, False], [True], [], [False, True, True]],
        "verdict_logps": [[-0.1, -2.5], [-1 / 3], [], [-math.inf, -1e-30, -0.5]],
        "token_rewards": [first, empty, single, last],
        "token_advantages": rows(),
        "attributions": [[first.softmax(0), None], [empty], [], [None, last.abs(), None]],
        "reference_logps": rows(),
        "stats": {
            "engine": "packed",
            "seconds": 0.1 + 0.2,
            "entropy": 0.97,
            "top10_mass": 0.125,
            "alarms": ["α is flat"],
        },
        "tokens": [["Hé", " wörld\n", "🙂"], [], ["\ud800[bold]"], ["a", "", " b", "\x1b[31m"]],
        "rubrics": [[("is ✓", 5.0), ("no [red]", -2.0)], [("x", 0.1)], [], [("y", 1.0)] * 3],
    }
    return AttributionBatch(**(fields | changes))


def assert_equal(left: AttributionBatch, right: AttributionBatch) -> None:
    """Bit-equal, types included."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, (list, tuple)):
            return (
                type(a) is type(b)
                and len(a) == len(b)
                and all(same(x, y) for x, y in zip(a, b, strict=True))
            )
        return type(a) is type(b) and bool(a == b)

    for field in dataclasses.fields(AttributionBatch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert same(a, b), field.name


# --- the object ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(3)}, "scores"),
        ({"scores": torch.zeros(4, 1)}, "scores"),
        ({"verdicts": [[True, False], [True], []]}, "verdicts.*expected 4; got 3"),
        ({"verdict_logps": [[-0.1], [-1.0], [], [0.0] * 3]}, "verdict_logps.*index 0"),
        ({"token_advantages": [torch.zeros(3)] * 4}, "token_advantages.*index 1"),
        ({"reference_logps": [torch.zeros(1, n) for n in LENGTHS]}, "reference_logps"),
        ({"tokens": [["a"]] * 4}, "tokens.*index 0"),
        ({"rubrics": [[]] * 4}, "rubrics.*index 0"),
        ({"attributions": [[None]] * 4}, "attributions.*index 0"),
        (
            {"attributions": [[None, None], [None], [], [None, None, torch.zeros(3)]]},
            "attributions.*index 3",
        ),
    ],
)
def test_shapes_must_agree(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_batch(**changes)


def test_repr_is_short() -> None:
    assert repr(make_batch()) == (
        "AttributionBatch(4 responses, 8 tokens, 6 judgements, token_advantages=yes)"
    )


@pytest.mark.parametrize("field", ["token_rewards", "token_advantages", "reference_logps"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [None, 4, 6])
def test_padded(field: str, side: str, length: int | None) -> None:
    batch = make_batch()
    values, mask = batch.padded(field, length, side=side)
    assert values.shape == mask.shape == (4, length or 4)
    assert values.dtype == torch.float32 and mask.dtype == torch.bool
    for row, wanted in enumerate(getattr(batch, field)):
        size = wanted.numel()
        place = slice(0, size) if side == "right" else slice(values.shape[1] - size, None)
        assert torch.equal(values[row, place], wanted)
        assert mask[row, place].all() and int(mask[row].sum()) == size
        assert not values[row][~mask[row]].any()


def test_padded_errors() -> None:
    batch = make_batch(token_advantages=None, reference_logps=None)
    with pytest.raises(InputError, match=r"too short; expected at least 4; got 3.*row 3"):
        batch.padded("token_rewards", 3)
    with pytest.raises(InputError, match="token_rewards, token_advantages, reference_logps"):
        batch.padded("scores")
    with pytest.raises(InputError, match="group_size was 1"):
        batch.padded("token_advantages")
    with pytest.raises(InputError, match="not asked for"):
        batch.padded("reference_logps")
    with pytest.raises(InputError, match="right or left"):
        batch.padded("token_rewards", side="middle")


def empty_batch() -> AttributionBatch:
    return AttributionBatch(torch.zeros(0), [], [], [], [], attributions=[], tokens=[], rubrics=[])


def test_padded_empty_batch() -> None:
    values, mask = empty_batch().padded("token_rewards")
    assert values.shape == mask.shape == (0, 0)
    values, mask = empty_batch().padded("token_advantages", 5)
    assert values.shape == mask.shape == (0, 5)


def test_to_moves_every_tensor() -> None:
    moved = make_batch().to("meta")
    assert moved.scores.device.type == "meta"
    for rows in (moved.token_rewards, moved.token_advantages, moved.reference_logps):
        assert rows is not None and all(row.device.type == "meta" for row in rows)
    assert moved.attributions is not None and moved.attributions[0][1] is None
    assert moved.attributions[3][1] is not None and moved.attributions[3][1].device.type == "meta"


def test_select() -> None:
    batch = make_batch()
    part = batch.select(2, 4)
    assert len(part) == 2 and part.tokens == batch.tokens[2:]  # type: ignore[index]
    assert torch.equal(part.scores, batch.scores[2:])
    whole = batch.select(0, 4)
    for figure in ("entropy", "top10_mass", "top1_mass", "alarms"):
        assert figure not in whole.stats  # of the batch they were computed over, not of a part
        batch.stats.pop(figure, None)
    assert_equal(whole, batch)
    assert make_batch(token_advantages=None).select(0, 1).token_advantages is None


# --- the file ------------------------------------------------------------------------------------

OPTIONAL = ("token_advantages", "attributions", "reference_logps", "tokens", "rubrics")


@pytest.mark.parametrize("absent", [(), *[(name,) for name in OPTIONAL], OPTIONAL])
def test_round_trip(absent: tuple[str, ...], tmp_path: Path) -> None:
    batch = make_batch(**dict.fromkeys(absent))
    path = tmp_path / "batch.safetensors"
    batch.save(path)
    assert_equal(AttributionBatch.load(path), batch)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_round_trip_empty_batch(tmp_path: Path) -> None:
    empty_batch().save(tmp_path / "batch")
    assert_equal(AttributionBatch.load(str(tmp_path / "batch")), empty_batch())


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3), max_size=4),
    text=st.text(st.characters(), max_size=5),
    logp=st.floats(max_value=0, allow_nan=False),
    n_items=st.integers(0, 2),
)
def test_round_trip_of_any_batch(
    lengths: list[int], text: str, logp: float, n_items: int, tmp_path_factory: Any
) -> None:
    batch = AttributionBatch(
        scores=torch.arange(len(lengths)).float(),
        verdicts=[[True] * n_items for _ in lengths],
        verdict_logps=[[logp] * n_items for _ in lengths],
        token_rewards=[torch.arange(length) + 0.1 for length in lengths],
        tokens=[[text] * length for length in lengths],
        rubrics=[[(text, logp)] * n_items for _ in lengths],
        attributions=[[None] * n_items for _ in lengths],
        stats={"text": text},
    )
    path = tmp_path_factory.mktemp("any") / "batch"
    batch.save(path)
    assert_equal(AttributionBatch.load(path), batch)


def test_file_survives_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "batch"
    make_batch().save(path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make_batch(stats={}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    make_batch().save(path)
    loaded = AttributionBatch.load(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_equal(loaded, make_batch())


def test_stats_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(InputTypeError, match="JSON"):
        make_batch(stats={"dtype": torch.float32}).save(tmp_path / "batch")
    assert not list(tmp_path.iterdir())


def test_foreign_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    make_batch().save(path)
    good = path.read_bytes()

    def load(content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            AttributionBatch.load(path)

    load(b"", "damaged")
    load(b"PK\x03\x04 something else entirely", "damaged")
    load(good[:-1], "damaged")
    load(good[:20], "damaged")
    load(good[:-1] + bytes([good[-1] ^ 1]), "checksum")
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    load(path.read_bytes(), "not an AttributionBatch")
    save_file({"weight": torch.zeros(2)}, path)
    load(path.read_bytes(), "not an AttributionBatch")
    with pytest.raises(FileNotFoundError):
        AttributionBatch.load(tmp_path / "absent")


def test_another_version_or_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "batch"
    monkeypatch.setattr("g2r_fast.result.FILE_VERSION", 2)
    make_batch().save(path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="version; expected 1; got 2"):
        AttributionBatch.load(path)
    # A valid checksum over a document that does not fit its tensors.
    monkeypatch.setattr("g2r_fast.result.TOKEN_FIELDS", ("reference_logps",))
    make_batch().save(path)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"damaged.*token_rewards"):
        AttributionBatch.load(path)


def test_large_documents_stay_out_of_the_header(tmp_path: Path) -> None:
    """safetensors writes headers that it then refuses to read; the strings are not in there."""
    path = tmp_path / "batch"
    make_batch().save(path)
    header_size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + header_size])
    assert header["__metadata__"]["format"] == "g2r_fast.AttributionBatch"
    long = make_batch(stats={"text": "x" * 100_000})
    long.save(path)
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] < header_size + 64
    assert_equal(AttributionBatch.load(path), long)


# --- the heat map --------------------------------------------------------------------------------


def render(batch: AttributionBatch, color: bool = False, encoding: str = "utf-8", **arguments: Any):  # type: ignore[no-untyped-def]
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(
        file=stream,
        width=100,
        force_terminal=color,
        color_system="truecolor" if color else None,
        no_color=None,
        _environ={},
    )
    batch.show(console=console, **arguments)
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_heat_map_without_colours() -> None:
    batch = make_batch(
        token_rewards=[torch.tensor([0.1, -0.5, 0.2]), *make_batch().token_rewards[1:]]
    )
    text = render(batch)
    assert "\x1b" not in text
    assert "response 0  score +0.5  3 tokens" in text
    assert "✓     +5  log p(True)   -0.100  is ✓" in text
    assert "✗     -2  log p(True)   -2.500  no [red]" in text
    assert "scale ±0.5" in text
    assert "Hé⟦- wörld↵⟧\n🙂" in text  # the largest by size is marked, with its sign
    assert "(empty response)" in text
    assert "entropy 0.970 (1 = uniform), top 10 % of the tokens hold 12.5% of the mass" in text
    assert "! α is flat" in text


def test_heat_map_colours() -> None:
    rewards = [torch.tensor([0.1, -0.5, 0.0]), *make_batch().token_rewards[1:]]
    text = render(make_batch(token_rewards=rewards), color=True, rows=0)
    pale_blue, full_red = "48;2;191;218;255m", "48;2;255;92;80m"
    assert f"{pale_blue}Hé" in text
    assert f"{full_red} wörld" in text
    assert text.count("48;2;") == 2  # a zero stays uncoloured
    assert "⟦" not in text
    assert "response 1" not in text


def test_tokens_without_a_glyph_are_marked_too() -> None:
    tokens = [["a", "", "\n\n"], *make_batch().tokens[1:]]  # type: ignore[index]
    rows = make_batch().token_rewards[1:]
    empty = make_batch(tokens=tokens, token_rewards=[torch.tensor([0.0, 1.0, 0.5]), *rows])
    assert "a⟦+·⟧↵↵\n\n" in render(empty, rows=0)
    breaks = make_batch(tokens=tokens, token_rewards=[torch.tensor([0.0, 0.5, -1.0]), *rows])
    assert "a·⟦-↵↵⟧\n\n" in render(breaks, rows=0)


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    hostile = "\x1b[2J[bold red]\x07\u202e\u200b\r:smile:[/]\x9b31m"
    tokens = [["Hé", hostile, "🙂"], *make_batch().tokens[1:]]  # type: ignore[index]
    rubrics = [[(hostile, 5.0), ("b", 1.0)], *make_batch().rubrics[1:]]  # type: ignore[index]
    batch = make_batch(tokens=tokens, rubrics=rubrics, stats={"alarms": [hostile]})
    text = render(batch)
    spelled = "\\x1b[2J[bold red]\\x07\\u202e\\u200b\\r:smile:[/]\\x9b31m"
    assert text.count(spelled) == 3  # rubric item, token, alarm
    assert not set(text) & {"\x1b", "\x07", "\u202e", "\u200b", "\r", "\x9b", "\ud800"}
    coloured = render(batch, color=True)
    assert not set(coloured) & {"\x07", "\u202e", "\u200b", "\r", "\x9b"}
    assert "\x1b[2J" not in coloured and "\x1b[31m" not in coloured.replace("\x1b[1;31m", "")


def test_mean_attributions_by_hand() -> None:
    one, two = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.0, 0.0, 1.0])
    attributions: list[list[torch.Tensor | None]] = [[one, two, None], [one, None, None], [], [two]]
    rubrics = [[("a", 3.0), ("b", -1.0), ("c", 5.0)], [("a", 0.0), ("b", 2.0), ("c", 2.0)], [], []]
    batch = AttributionBatch(
        scores=torch.zeros(4),
        verdicts=[[True, True, False], [True, False, False], [], []],
        verdict_logps=[[-0.1] * 3, [-0.1] * 3, [], []],
        token_rewards=[torch.zeros(3)] * 4,
        attributions=attributions,
        rubrics=rubrics,
    )
    third = [1 / 3] * 3
    expected = torch.tensor([[0.375, 0.1875, 0.4375], third, third, two.tolist()])
    assert torch.allclose(torch.stack(batch.mean_attributions()), expected)
    expected[1:3] = torch.tensor([0.5, 0.0, 0.5])  # what weighs nothing says nothing
    own = [torch.tensor([True, False, True])] * 4
    assert torch.allclose(torch.stack(batch.mean_attributions(own)), expected)
    assert not batch.mean_attributions([torch.zeros(3, dtype=torch.bool)] * 4)[1].any()
    with pytest.raises(InputError, match="own_tokens has a row of the wrong length; expected 3"):
        batch.mean_attributions([*own[:3], torch.ones(2, dtype=torch.bool)])


def test_mean_attributions_need_what_they_are_made_of() -> None:
    with pytest.raises(InputError, match=r"no attributions\. .*keep_attributions=True"):
        make_batch(attributions=None).mean_attributions()
    with pytest.raises(InputError, match="this batch has no rubrics"):
        make_batch(rubrics=None).mean_attributions()


def test_heat_map_on_an_ascii_terminal() -> None:
    text = render(make_batch(), encoding="ascii")
    assert "T     +5" in text and "F     -2" in text and "is \\u2713" in text
    assert "scale +-" in text


def test_visible_spells_out_what_cannot_be_seen() -> None:
    assert visible("plain [x]") == "plain [x]"
    assert visible("naïve 日本 🙂") == "naïve 日本 🙂"
    assert visible("\u2066\U000e0041\ud83d") == "\\u2066\\U000e0041\\ud83d"


def test_by_advantage_and_rows() -> None:
    batch = make_batch()
    assert "token advantage" in render(batch, by="advantage", rows=[3, 0])
    assert render(batch, rows=[3, 0]).index("response 3") < render(batch, rows=[3, 0]).index(
        "response 0"
    )
    with pytest.raises(InputError, match="reward or advantage"):
        render(batch, by="loss")
    with pytest.raises(InputError, match="0 to 3; got 4"):
        render(batch, rows=4)
    with pytest.raises(InputError, match="group_size was 1"):
        render(make_batch(token_advantages=None), by="advantage")


def test_show_without_tokens_rubrics_and_stats() -> None:
    text = render(make_batch(tokens=None, rubrics=None, stats={}))
    assert "item 0" in text and "#1 " in text and "attribution" not in text
    assert "item 0" in render(make_batch(stats={}, rubrics=None))
    nothing = render(make_batch(token_rewards=[torch.zeros(n) for n in LENGTHS]))
    assert "scale ±0" in nothing and "⟦" not in nothing
