"""What `attribute_batch` returns, and its file format."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError, InputTypeError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["AttributionBatch"]

FILE_FORMAT = "g2r_fast.AttributionBatch"
FILE_VERSION = 1

# One float per token and row each: what `padded` serves and what the file stores flat.
BATCH_FIGURES = ("entropy", "top10_mass", "top1_mass", "alarms")
TOKEN_FIELDS = ("token_rewards", "token_advantages", "reference_logps")


@dataclass(eq=False, repr=False)
class AttributionBatch:
    """N judged responses with their token rewards.

    scores: [N] float32, the aggregated reward (arXiv 2602.01791, Eq. 1)
    verdicts: N lists of K_i bools
    verdict_logps: N lists of K_i floats, log p(True) in nats
    token_rewards: N tensors [T_i] float32, one entry per policy token
    token_advantages: N tensors [T_i] float32, or None (groups of one)
    attributions: N lists of K_i tensors [T_i], None for items judged False (of a RewardModel: one
        tensor each); None if not kept
    reference_logps: N tensors [T_i] in nats, or None if not asked for
    stats: what was computed, how and how long; JSON types
    tokens: N lists of T_i strings, for display, or None
    rubrics: N lists of K_i (text, weight), for display, or None

    Raises InputError where these shapes do not agree.
    """

    scores: Tensor
    verdicts: list[list[bool]]
    verdict_logps: list[list[float]]
    token_rewards: list[Tensor]
    token_advantages: list[Tensor] | None = None
    attributions: list[list[Tensor | None]] | None = None
    reference_logps: list[Tensor] | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    tokens: list[list[str]] | None = None
    rubrics: list[list[tuple[str, float]]] | None = None

    def __post_init__(self) -> None:
        n_rows = len(self.token_rewards)
        if self.scores.shape != (n_rows,):
            raise InputError(
                "scores has the wrong shape", expected=f"[{n_rows}]", got=list(self.scores.shape)
            )
        lengths = [row.numel() for row in self.token_rewards]
        items = [len(row) for row in self.verdicts]
        for name in TOKEN_FIELDS:
            rows = getattr(self, name)
            if rows is not None:
                _check_sizes(name, [row.numel() for row in rows], lengths)
                if any(row.dim() != 1 or row.dtype != rows[0].dtype for row in rows):
                    raise InputError(f"{name} mixes shapes or dtypes", expected="N tensors [T_i]")
        _check_sizes("verdicts", [len(row) for row in self.verdicts], items, n_rows)
        _check_sizes("verdict_logps", [len(row) for row in self.verdict_logps], items)
        if self.tokens is not None:
            _check_sizes("tokens", [len(row) for row in self.tokens], lengths)
        if self.rubrics is not None:
            _check_sizes("rubrics", [len(row) for row in self.rubrics], items)
        if self.attributions is not None:
            # A reward model has one attribution per response, and no items.
            sizes = [len(row) for row in self.attributions]
            wanted = [k or min(size, 1) for k, size in zip(items, sizes, strict=False)]
            _check_sizes("attributions", sizes, wanted, n_rows)
            for index, (row, length) in enumerate(zip(self.attributions, lengths, strict=True)):
                if any(item is not None and item.shape != (length,) for item in row):
                    raise InputError(
                        "attributions holds a tensor of the wrong shape",
                        expected=f"[{length}]",
                        index=index,
                    )

    def __len__(self) -> int:
        return len(self.token_rewards)

    def __repr__(self) -> str:
        tokens = sum(row.numel() for row in self.token_rewards)
        items = sum(len(row) for row in self.verdicts)
        return (
            f"AttributionBatch({len(self)} responses, {tokens} tokens, {items} judgements, "
            f"token_advantages={'no' if self.token_advantages is None else 'yes'})"
        )

    def padded(
        self, field: str, length: int | None = None, side: str = "right"
    ) -> tuple[Tensor, Tensor]:
        """`torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)` and its mask.

        field: "token_rewards", "token_advantages" or "reference_logps". length: columns, default
        the longest row. side: where the padding (0.0) goes, "right" or "left".
        Returns ([N, length] of the field's dtype, [N, length] bool, True on real tokens).
        Raises InputError: unknown field or side, a field this batch lacks, length too short.
        """
        if field not in TOKEN_FIELDS:
            raise InputError(
                "unknown field", expected="one of " + ", ".join(TOKEN_FIELDS), got=repr(field)
            )
        if side not in ("right", "left"):
            raise InputError("unknown padding side", expected="right or left", got=repr(side))
        rows: list[Tensor] | None = getattr(self, field)
        if rows is None:
            why = "group_size was 1" if field == "token_advantages" else "it was not asked for"
            raise InputError(f"this batch has no {field}: {why}")
        sizes = [row.numel() for row in rows]
        longest = max(sizes, default=0)
        if length is None:
            length = longest
        if length < longest:
            index = next(i for i, size in enumerate(sizes) if size > length)
            raise InputError(
                "length is too short",
                expected=f"at least {longest}",
                got=length,
                index=f"row {index}, of {sizes[index]} tokens",
            )
        device = self.scores.device
        columns = torch.arange(length, device=device)
        lengths = torch.tensor(sizes, dtype=torch.int64, device=device)[:, None]
        mask = columns < lengths if side == "right" else columns >= length - lengths  # [N, length]
        dtype = rows[0].dtype if rows else torch.float32
        values = torch.zeros(mask.shape, dtype=dtype, device=device)
        if rows:
            values[mask] = torch.cat(rows)
        return values, mask

    def to(self, device: torch.device | str) -> AttributionBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device))

    def select(self, start: int, stop: int) -> AttributionBatch:
        """Rows start to stop (as in a slice); of `stats`, what is true of the whole batch alone
        (means of the attributions, alarms) is left out."""
        rows = slice(start, stop)
        names = ("scores", "verdicts", "verdict_logps", "attributions", "tokens", "rubrics")
        changes: dict[str, Any] = {
            "stats": {k: v for k, v in self.stats.items() if k not in BATCH_FIGURES}
        }
        for name in (*names, *TOKEN_FIELDS):
            value = getattr(self, name)
            changes[name] = None if value is None else value[rows]
        return replace(self, **changes)

    def mean_attributions(self, own_tokens: Sequence[Tensor] | None = None) -> list[Tensor]:
        """`sum_k 1[z_k] |w_k| alpha_k / sum_k 1[z_k] |w_k|` of every response: N of [T_i] float32.

        What `"scaled_sequence"` spreads the advantage of a sequence by. Where nothing that weighs
        was judged True it is uniform over `own_tokens`: N of [T_i] bool, the policy's own; None:
        all are. Of a RewardModel it is the attribution itself.

        Raises InputError for a batch without attributions or without rubrics.
        """
        if self.attributions is None or self.rubrics is None:
            lacking = "attributions" if self.attributions is None else "rubrics"
            raise InputError(
                f"this batch has no {lacking}",
                fix="attribute_batch(..., keep_attributions=True) returns both.",
            )
        if own_tokens is not None:
            sizes = [len(row) for row in self.token_rewards]
            _check_sizes("own_tokens", [len(row) for row in own_tokens], sizes)
        means = []
        for i, alphas in enumerate(self.attributions):
            # A reward model has no items, and one attribution.
            weights = [abs(weight) for _, weight in self.rubrics[i]] or [1.0] * len(alphas)
            true = [(w, a) for w, a in zip(weights, alphas, strict=True) if a is not None and w > 0]
            if true:
                weighted = torch.stack([w * alpha.double() for w, alpha in true])
                mean = weighted.sum(0) / sum(w for w, _ in true)
            else:
                own = (
                    torch.ones_like(self.token_rewards[i]) if own_tokens is None else own_tokens[i]
                )
                mean = own / own.sum().clamp(min=1)
            means.append(mean.float())
        return means

    def _map(self, move: Callable[[Tensor], Tensor]) -> AttributionBatch:
        changes: dict[str, Any] = {"scores": move(self.scores)}
        for name in TOKEN_FIELDS:
            rows = getattr(self, name)
            changes[name] = None if rows is None else [move(row) for row in rows]
        if self.attributions is not None:
            changes["attributions"] = [
                [None if item is None else move(item) for item in row] for row in self.attributions
            ]
        return replace(self, **changes)

    def show(
        self,
        rows: int | Iterable[int] | None = None,
        console: Console | None = None,
        by: str = "reward",
    ) -> None:
        """Prints a heat map of the responses' tokens. by: "reward" or "advantage"."""
        from .report import show

        show(self, rows=rows, console=console, by=by)

    def to_html(
        self,
        path: str | os.PathLike[str],
        rows: int | Iterable[int] | None = None,
        title: str = "Token rewards",
    ) -> None:
        """Writes the responses' heat maps as one HTML page that needs no network.

        rows: one index or several; None: all. The page is written whole or not at all.
        Raises InputError for a row out of range, InputTypeError for a title that is no string.
        """
        from .html import write_rows

        write_rows(self, path, rows, title)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all (a temporary file, then a rename).

        Everything comes back as it was, except that tuples and non-string keys inside `stats`
        become lists and strings, as JSON has it. Raises InputTypeError for stats JSON cannot hold.
        """
        from safetensors.torch import save_file

        document = {
            "lengths": [row.numel() for row in self.token_rewards],
            "verdicts": self.verdicts,
            "verdict_logps": self.verdict_logps,
            "attributed": None
            if self.attributions is None
            else [[item is not None for item in row] for row in self.attributions],
            "stats": self.stats,
            "tokens": self.tokens,
            "rubrics": self.rubrics,
        }
        try:
            text = json.dumps(document).encode("ascii")
        except (TypeError, ValueError) as error:
            raise InputTypeError(
                "the batch holds something JSON cannot", expected="JSON types", got=str(error)
            ) from error
        # The document is a tensor of bytes: safetensors refuses to *read* a header above 100 MB,
        # which the token strings of a large batch exceed.
        tensors = {
            "document": torch.frombuffer(bytearray(text), dtype=torch.uint8),
            "scores": self.scores,
        }
        for name in TOKEN_FIELDS:
            rows = getattr(self, name)
            if rows is not None:
                tensors[name] = torch.cat(rows) if rows else torch.zeros(0)
        if self.attributions is not None:
            kept = [item for row in self.attributions for item in row if item is not None]
            tensors["attributions"] = torch.cat(kept) if kept else torch.zeros(0)
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        metadata = {
            "format": FILE_FORMAT,
            "version": str(FILE_VERSION),
            "crc32": str(_checksum(tensors)),
        }
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            save_file(tensors, temporary, metadata=metadata)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttributionBatch:
        """Reads what `save` wrote, onto the CPU. Raises InputError for any other file."""
        from safetensors import SafetensorError, safe_open

        name = repr(os.fspath(path))
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FILE_FORMAT:
                    raise InputError(
                        f"{name} is not an AttributionBatch",
                        expected=f"format {FILE_FORMAT}",
                        got=metadata.get("format", "a safetensors file of another kind"),
                    )
                if metadata.get("version") != str(FILE_VERSION):
                    raise InputError(
                        f"{name} has another file version",
                        expected=str(FILE_VERSION),
                        got=metadata.get("version"),
                        fix="Load it with the version of g2r_fast that wrote it.",
                    )
                # Cloned: the originals are windows onto the file, which may change later.
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        except SafetensorError as error:
            raise InputError(f"{name} is damaged or no safetensors file", got=str(error)) from error
        if metadata.get("crc32") != str(_checksum(tensors)):
            raise InputError(f"{name} is damaged: its checksum does not match")
        try:
            return cls._assemble(tensors)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"{name} is damaged", got=repr(error)) from error

    @classmethod
    def _assemble(cls, tensors: dict[str, Tensor]) -> AttributionBatch:
        document = json.loads(tensors["document"].numpy().tobytes())
        lengths: list[int] = document["lengths"]

        def rows(name: str) -> list[Tensor] | None:
            return list(tensors[name].split(lengths)) if name in tensors else None

        attributions: list[list[Tensor | None]] | None = None
        if document["attributed"] is not None:
            present = zip(lengths, document["attributed"], strict=True)
            sizes = [length for length, row in present for kept in row if kept]
            pieces = iter(tensors["attributions"].split(sizes))
            attributions = [
                [next(pieces) if kept else None for kept in row] for row in document["attributed"]
            ]
        rubrics = document["rubrics"]
        rewards = rows("token_rewards")
        if rewards is None:
            raise LookupError("token_rewards")
        return cls(
            scores=tensors["scores"],
            verdicts=document["verdicts"],
            verdict_logps=document["verdict_logps"],
            token_rewards=rewards,
            token_advantages=rows("token_advantages"),
            attributions=attributions,
            reference_logps=rows("reference_logps"),
            stats=document["stats"],
            tokens=document["tokens"],
            rubrics=None
            if rubrics is None
            else [[(text, weight) for text, weight in row] for row in rubrics],
        )


def _check_sizes(
    name: str, sizes: list[int], expected: list[int], n_rows: int | None = None
) -> None:
    n_rows = len(expected) if n_rows is None else n_rows
    if len(sizes) != n_rows:
        raise InputError(
            f"{name} has the wrong number of rows", expected=str(n_rows), got=len(sizes)
        )
    for index, (size, wanted) in enumerate(zip(sizes, expected, strict=True)):
        if size != wanted:
            raise InputError(
                f"{name} has a row of the wrong length", expected=str(wanted), got=size, index=index
            )


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].view(torch.uint8).numpy().data, value)
    return value
