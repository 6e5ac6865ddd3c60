"""What this package uses of TRL's GRPOTrainer: no other module here knows TRL's names.

Read in TRL 0.26.0 to 1.16.0, where these names and shapes are the same:

- `_generate(prompts)` returns (prompt ids, completion ids, tool mask or None, ...), of this process
  and as sampled;
- `_calculate_rewards(...)` calls `reward_funcs` and returns `[N, F]`, the rows of all processes;
- `_generate_and_score_completions(inputs)` returns a dict of this process's rows, with
  `advantages [B]` and `completion_ids [B, T]`; it is shuffled and split afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...checks import Span
from ...errors import InputError, InputTypeError

__all__ = [
    "Host",
    "Rollouts",
    "check_class",
    "check_function",
    "check_rows",
    "check_unsharded",
    "evaluating",
    "has_moved",
    "own_forward",
    "trl_version",
]

OLDEST = "0.26.0"
TESTED = "TRL 0.26.0 to 1.16.0"

METHODS = (
    "_calculate_rewards",
    "_compute_loss",
    "_generate",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "compute_loss",
)
ATTRIBUTES = (
    "_metrics",
    "accelerator",
    "args",
    "importance_sampling_level",
    "loss_type",
    "model",
    "num_generations",
    "num_generations_eval",
    "processing_class",
    "ref_model",
    "reward_funcs",
    "reward_weights",
    "scale_rewards",
    "temperature",
)


def trl_version() -> str:
    """The version of the TRL that is imported. Raises InputError where there is none."""
    try:
        import trl
    except ImportError as error:
        raise InputError(
            "TRL cannot be imported",
            expected=f"TRL {OLDEST} or newer",
            got=str(error),
            fix="pip install 'g2r_fast[trl]'.",
        ) from error
    return str(trl.__version__)


def check_class(trainer: type) -> None:
    """Raise InputError for a TRL that is too old, or no longer has what is used here."""
    from packaging.version import Version

    version = trl_version()
    if Version(version) < Version(OLDEST):
        raise InputError(
            "TRL is too old: its loss takes one advantage per sequence",
            expected=f"TRL {OLDEST} or newer, whose loss takes one per token",
            got=f"TRL {version}",
            fix="pip install --upgrade trl.",
        )
    missing = [name for name in METHODS if not callable(getattr(trainer, name, None))]
    if missing:
        raise has_moved(
            f"{trainer.__name__} has no method {missing[0]}",
            "class MyTrainer(Grad2RewardMixin, GRPOTrainer)",
        )


def has_moved(what: str, expected: str, got: Any = None) -> InputError:
    """The error for a TRL, or a subclass of its trainer, that is not as this module says."""
    return InputError(
        f"{what}; TRL, or the trainer this one is made of, is not as {TESTED} are",
        expected=expected,
        got=got,
        fix=f"TRL {trl_version()} is installed; use a version that was tested, and report this.",
    )


@dataclass(frozen=True)
class Rollouts:
    """The rows of this process as the policy sampled them."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    own: list[Tensor]  # of [T_i] bool, False on tokens that a tool wrote

    @property
    def spans(self) -> list[list[Span]] | None:
        """The policy's own tokens of each row; None where all of them are."""
        if all(bool(own.all()) for own in self.own):
            return None
        return [_runs(own.tolist()) for own in self.own]

    @classmethod
    def read(cls, generated: Any, device: torch.device) -> Rollouts:
        """From what `_generate` returned."""
        try:
            prompts, completions, tools = generated[:3]
            prompt_ids = [[int(token) for token in row] for row in prompts]
            completion_ids = [[int(token) for token in row] for row in completions]
            masks = [[1] * len(row) for row in completion_ids] if tools is None else list(tools)
            own = [torch.tensor(list(row), device=device) != 0 for row in masks]
        except (TypeError, ValueError) as error:
            raise has_moved(
                "what _generate returned cannot be read",
                "(lists of prompt ids, lists of completion ids, tool masks or None, ...)",
                error,
            ) from error
        sizes = [len(row) for row in completion_ids]
        if len(prompt_ids) != len(sizes) or [len(row) for row in own] != sizes:
            raise has_moved(
                "prompts, completions and tool masks of _generate differ in length",
                f"{len(sizes)} rows of {sizes} tokens",
                f"{len(prompt_ids)} prompts, masks of {[len(row) for row in own]} tokens",
            )
        return cls(prompt_ids, completion_ids, own)


def check_rows(output: Mapping[str, Any], rollouts: Rollouts) -> None:
    """Raise InputError where the scored batch is not, row by row, what was sampled."""
    ids, advantages = output["completion_ids"], output["advantages"]
    rows = rollouts.completion_ids
    same = len(ids) == len(rows) and all(
        padded[: len(row)] == row for padded, row in zip(ids.tolist(), rows, strict=True)
    )
    if not same or advantages.shape != (len(rows),):
        raise has_moved(
            "_generate_and_score_completions returned other rows than _generate",
            f"{len(rows)} rows in their order, and an advantage for each",
            f"completion_ids {tuple(ids.shape)}, advantages {tuple(advantages.shape)}",
        )


class Host:
    """A trainer as the signals see it.

    given_forward: `own_forward` of the policy before it was given to the trainer.
    """

    def __init__(self, trainer: Any, given_forward: Any = None) -> None:
        missing = [name for name in ATTRIBUTES if not hasattr(trainer, name)]
        if missing:
            raise has_moved(f"the trainer has no {missing[0]}", "an attribute of that name")
        self.trainer = trainer
        self.accelerator = trainer.accelerator
        self.device: torch.device = trainer.accelerator.device
        self.tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self.temperature = float(trainer.temperature)
        self._given_forward = given_forward

    @property
    def policy(self) -> Any:
        """The model in training, without what distributes it."""
        return self.accelerator.unwrap_model(self.trainer.model)

    @property
    def reference(self) -> Any:
        """The reference model of the KL term where it stays as it is, else None."""
        if self.trainer.ref_model is None or getattr(self.trainer.args, "sync_ref_model", False):
            return None
        return self.accelerator.unwrap_model(self.trainer.ref_model)

    @property
    def mode(self) -> str:
        return "train" if self.trainer.model.training else "eval"

    @property
    def group_size(self) -> int:
        trainer = self.trainer
        training = self.mode == "train"
        return int(trainer.num_generations if training else trainer.num_generations_eval)

    @property
    def reward_weights(self) -> Tensor:
        """`[F]`, of the functions in `reward_funcs`."""
        weights: Tensor = self.trainer.reward_weights.to(self.device)
        return weights

    @property
    def reward_names(self) -> list[str]:
        return [str(name) for name in self.trainer.reward_func_names]

    @property
    def normalisation(self) -> tuple[str, str]:
        """`scale_rewards` and `multi_objective_aggregation`, which old versions do not have."""
        aggregation = getattr(self.trainer, "multi_objective_aggregation", "sum_then_normalize")
        return str(self.trainer.scale_rewards), str(aggregation)

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds a part of the policy only (FSDP, DeepSpeed ZeRO-3)."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        zero3 = plugin is not None and getattr(plugin, "zero_stage", 0) == 3
        return zero3 or bool(getattr(self.trainer, "is_fsdp_enabled", False))

    @contextmanager
    def at_rest(self, model: Any) -> Iterator[None]:
        """The policy, or the reference, in eval mode and with the forward it was loaded with.

        TRL and accelerate replace `forward` on the instance, by functions that compute the same;
        the packed engine would take them for another model. Afterwards all is as it was.
        """
        base = _base(model)
        given = self._given_forward if base is _base(self.policy) else None
        replaced = vars(base).get("forward")
        try:
            _set_forward(base, given)
            with evaluating(model):
                yield
        finally:
            _set_forward(base, replaced)

    def local(self, rows: Any) -> Any:
        """This process's part of the rows of all."""
        count = len(rows) // self.accelerator.num_processes
        start = self.accelerator.process_index * count
        return rows[start : start + count]

    def gather(self, values: Tensor) -> Tensor:
        """`[B, ...]` of every process, in the order of processes: `[N, ...]`."""
        gathered: Tensor = self.accelerator.gather(values)
        return gathered

    def gather_rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """B tensors `[T_i]` float32 of every process, in the order of processes: N tensors."""
        if self.accelerator.num_processes == 1:
            return list(rows)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        padded = pad_sequence([row.to(self.device) for row in rows], batch_first=True)
        padded = self.accelerator.pad_across_processes(padded, dim=1)
        pairs = zip(self.gather(padded), self.gather(lengths).tolist(), strict=True)
        return [row[:length] for row, length in pairs]

    def log(self, name: str, figures: Mapping[str, float | None]) -> None:
        """Each figure's mean over the processes that have it, as `name/figure` of TRL's log."""
        nan = float("nan")
        local = [nan if value is None else float(value) for value in figures.values()]
        means = self.gather(torch.tensor([local], device=self.device)).nanmean(0).tolist()
        for figure, mean in zip(figures, means, strict=True):
            if mean == mean:  # old versions average NaN into what they log
                self.trainer._metrics[self.mode][f"{name}/{figure}"].append(mean)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """`model.eval()` while inside; every module is afterwards in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def own_forward(model: Any) -> Any:
    """What stands in for the forward of the model's class, in the model inside PEFT's; or None."""
    return vars(_base(model)).get("forward") if isinstance(model, torch.nn.Module) else None


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _set_forward(model: Any, forward: Any) -> None:
    vars(model).pop("forward", None)
    if forward is not None:
        vars(model)["forward"] = forward


def check_unsharded(host: Host, what: str) -> None:
    """Raise InputError where the policy's weights are not all in this process."""
    if host.shards_weights:
        raise InputError(
            f"{what} reads the policy's weights, and this process holds a part of them only",
            expected="one process, DDP, or DeepSpeed ZeRO-1 or ZeRO-2",
            got="FSDP or DeepSpeed ZeRO-3",
            fix="Grad2Reward with a judge of its own, Grad2Reward(judge), runs with those.",
        )


def check_function(name: str, function: Any) -> Any:
    """A reward function that a signal wraps: callable, no model, no coroutine."""
    coroutine = iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)
    if not callable(function) or isinstance(function, torch.nn.Module) or coroutine:
        raise InputTypeError(
            f"{name} needs a reward function",
            expected="a callable as TRL's reward_funcs takes them, no model and no coroutine",
            got=repr(function)[:80],
        )
    return function


def _runs(mask: Sequence[bool]) -> list[Span]:
    """(start, stop) of every run of True."""
    edges = [
        i for i in range(len(mask) + 1) if (0 < i and mask[i - 1]) != (i < len(mask) and mask[i])
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))
