"""Errors for users: what was wrong, what was expected, what came, where, and how to mend it."""

from __future__ import annotations

__all__ = ["BackendError", "InputError", "InputTypeError", "UnsupportedModelError"]


class _Explained(Exception):
    """`what; expected ...; got ...; first at index .... fix`, leaving out what is not known."""

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        got: object | None = None,
        index: object | None = None,
        fix: str | None = None,
    ) -> None:
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        if index is not None:
            # A label says by itself what it is: "row 2, item 0".
            parts.append(
                f"first at {index}" if isinstance(index, str) else f"first at index {index}"
            )
        text = "; ".join(parts)
        text = f"{text}. {fix}" if fix else text
        super().__init__(text if text.endswith(("?", ".")) else f"{text}.")


class InputError(_Explained, ValueError):
    """A value the caller passed cannot be used."""


class InputTypeError(_Explained, TypeError):
    """An argument is of the wrong kind altogether."""


class UnsupportedModelError(InputError):
    """A named engine cannot serve this model; the message lists every reason."""

    def __init__(self, engine: str, reasons: list[str]) -> None:
        self.reasons = list(reasons)
        super().__init__(
            f"engine={engine!r} cannot serve this model: " + "; ".join(reasons),
            fix='Use engine="auto" to fall back to autograd.' if engine == "packed" else None,
        )


class BackendError(InputError):
    """A named backend cannot serve a run; the message lists every reason."""

    def __init__(self, backend: str, reasons: list[str]) -> None:
        self.reasons = list(reasons)
        super().__init__(
            f"G2R_BACKEND={backend} cannot serve this run: " + "; ".join(reasons),
            fix="G2R_BACKEND=auto takes the first backend that can.",
        )
