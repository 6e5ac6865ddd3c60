"""A group spread over two processes trains as in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from trl_processes import BY_LOSS, TRAININGS, outcome
from two_processes import run_in_two_processes

from g2r_fast.reference import relative_error

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Every outcome of two processes, which are started once for all of them."""
    file = tmp_path_factory.mktemp("trl") / "outcomes.pt"
    run_in_two_processes(HERE / "trl_processes.py", str(file))
    return torch.load(file)


@pytest.fixture(scope="module")
def of_one():
    return {name: outcome(name, 1) for name in TRAININGS}


def flat(rows):
    return torch.cat([torch.tensor(row).flatten() for row in rows])


def same_advantages(one, two):
    pairs = zip(one["advantages"], two["advantages"], strict=True)
    return all(torch.allclose(flat(a), flat(b), rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("name", sorted(set(TRAININGS) - {"planted"}))
def test_two_processes_train_as_one(name, of_one, of_two):
    one, two = of_one[name], of_two[name]
    assert [len(rows) for rows in one["advantages"]] == [4, 4]
    assert any(flat(rows).abs().max() > 0.1 for rows in one["advantages"])
    assert same_advantages(one, two)
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5, abs=1e-6)
    assert relative_error(two["weights"], one["weights"]) < 1e-4


def test_statistics_of_one_process_alone_are_seen(of_one, of_two):
    assert same_advantages(of_one["planted"], of_one["dense"])
    assert not same_advantages(of_one["planted"], of_two["planted"])


@pytest.mark.parametrize(
    ("which", "plain", "uniform"),
    [
        ("of_one", "plain", "uniform"),
        ("of_two", "plain", "uniform"),
        *(
            ("of_two", name, name.replace("plain", "uniform"))
            for name in BY_LOSS
            if "plain" in name
        ),
    ],
)
def test_uniform_attribution_is_plain_grpo_with_any_number_of_processes(
    which, plain, uniform, request
):
    outcomes = request.getfixturevalue(which)
    plain, uniform = outcomes[plain], outcomes[uniform]
    assert uniform["losses"] == pytest.approx(plain["losses"], rel=1e-5, abs=1e-6)
    assert any(abs(loss) > 1e-4 for loss in plain["losses"])
    assert relative_error(uniform["weights"], plain["weights"]) < 1e-4
    for rows, numbers in zip(uniform["advantages"], plain["advantages"], strict=True):
        assert all(
            row == pytest.approx([a] * len(row)) for row, a in zip(rows, numbers, strict=True)
        )


def test_the_trainings_differ(of_one):
    """Equal outcomes say nothing where a training has nothing to learn from."""
    weights = {
        name: o["weights"] for name, o in of_one.items() if name not in ("uniform", "planted")
    }
    names = list(weights)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert relative_error(weights[name], weights[other]) > 1e-3, (name, other)
