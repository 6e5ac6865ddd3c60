"""Runs of `g2r-fast attribute` with a stand-in for the judge and with the judge that is shipped."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import g2r_fast
from g2r_fast import advantages, cli
from g2r_fast.commands import attribute
from g2r_fast.errors import InputError, UnsupportedModelError
from g2r_fast.result import AttributionBatch

TINY = Path(g2r_fast.__file__).parent / "tiny_judge" / "config.json"


def fake_attribute_batch(
    judge: Any,
    prompts: list[Any],
    responses: list[str],
    rubrics: list[Any],
    *,
    group_size: int,
    attribution: Any,
    advantage: advantages.AdvantageConfig,
    verdict: str | list[list[bool]],
    max_tokens: int | None,
    engine: str,
    generator: torch.Generator | None = None,
    keep_attributions: bool = False,
) -> AttributionBatch:
    """Rewards from row, prompt and rubric, one token a word; refuses what says "refuse"."""
    if engine == "packed":
        raise UnsupportedModelError("packed", ["this is a stand-in"])
    for index, response in enumerate(responses):
        if "refuse" in response:
            raise InputError("the response is too long", index=index)
    assert len(prompts) == len(responses) == len(rubrics)
    tokens = [response.split() for response in responses]
    offset = 0.0 if generator is None else float(torch.rand((), generator=generator))
    rewards = []
    for row, prompt, items in zip(tokens, prompts, rubrics, strict=True):
        points = sum(item["points"] for item in items)
        text = json.dumps(prompt).encode()
        factor = 1 + zlib.crc32(text) / 2**32 + points / 100
        rewards.append(torch.tensor([len(word) * factor / 3 + offset for word in row]))
    return AttributionBatch(
        scores=torch.tensor([float(row.sum()) for row in rewards]),
        verdicts=[[True, False] for _ in rewards] if isinstance(verdict, str) else verdict,
        verdict_logps=[[-0.1, -math.inf] for _ in rewards],
        token_rewards=rewards,
        token_advantages=advantages.token_advantages(rewards, group_size, advantage),
        attributions=[[row, None] for row in rewards] if keep_attributions else None,
        tokens=tokens,
        rubrics=[[(item["criterion"], item["points"]) for item in row] for row in rubrics],
        stats={"alarms": []},
    )


class Library:
    """What `attribute._api` returns, recording its calls, with a switch to fail at one of them."""

    def __init__(self, real: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.loads: list[tuple[Any, ...]] = []
        self.interrupt_at: int | None = None
        self.real = real

    def attribute_batch(
        self, judge: Any, prompts: Any, responses: Any, *rest: Any, **kw: Any
    ) -> Any:
        self.calls.append({"prompts": prompts, "responses": responses} | kw)
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        return self.real.attribute_batch(judge, prompts, responses, *rest, **kw)

    def api(self) -> Any:
        return SimpleNamespace(**vars(self.real) | {"attribute_batch": self.attribute_batch})


def fake_library() -> SimpleNamespace:
    model = SimpleNamespace(to=lambda **_: None)

    class Judge:
        @staticmethod
        def tiny() -> Any:
            return SimpleNamespace(model=model)

        @staticmethod
        def from_pretrained(name: str, *, dtype: Any, device: Any) -> Any:
            if name == "absent":
                raise OSError("absent is not a folder")
            return SimpleNamespace(model=model, name=name, dtype=dtype, device=device)

    return SimpleNamespace(
        AdvantageConfig=advantages.AdvantageConfig,
        AttributionConfig=lambda **options: options,
        Judge=Judge,
        attribute_batch=fake_attribute_batch,
        check_engine=lambda judge, engine: None,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library(fake_library())
    monkeypatch.setattr(attribute, "_api", library.api)
    return library


@pytest.fixture(params=["stand-in", "tiny judge"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    if request.param == "tiny judge" and not TINY.exists():
        pytest.skip("g2r_fast/tiny_judge/config.json is missing: the judge is not trained yet")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    library = Library(fake_library() if request.param == "stand-in" else attribute._api())
    monkeypatch.setattr(attribute, "_api", library.api)
    yield library
    torch.set_num_threads(threads)


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*options: str, file: str = "in.jsonl", out: str = "out.jsonl") -> int:
        command = ["attribute", str(tmp_path / file), "--judge", "tiny"]
        try:
            return cli.main([*command, "--out", str(tmp_path / out), *options])
        except SystemExit as exit:
            return int(exit.code or 0)

    return run


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
