"""`TrainConfig`: every setting of a training run, as a dataclass, a YAML file or a command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..advantages import ESTIMATORS, AdvantageConfig
from ..errors import InputError, InputTypeError
from ..grad2reward import OBJECTIVES, READOUTS, AttributionConfig
from ..scaffolds import SCAFFOLDS
from .alarms import AlarmLimits

__all__ = ["METHODS", "TrainConfig", "add_options", "config_of", "read_yaml"]

METHODS = ("grpo", "grad2reward", "grail", "g2rl", "vigor")
DTYPES = ("float32", "bfloat16")
NAMES = ("trackers", "allow_tokens")  # settings that are lists of names
LOSSES = ("sequence_mean", "token_mean")
# Settings that one method reads and the others do not.
READ_BY = {
    "grad2reward": ("tau", "objective", "readout", "estimator"),
    "grail": ("answer_marker", "polarity"),
    "g2rl": ("novelty", "variant"),
    "vigor": ("parameters",),
}
# Settings of a judge that is asked for verdicts.
READ_BY_JUDGE = ("verdict", "scaffold", "true_word", "false_word", "allow_tokens", "canaries_every")
# May differ between a run and its continuation: they change nothing that was computed so far.
FREE_TO_CHANGE = {"steps", "output", "checkpoint_every", "keep_checkpoints", "trackers", "progress"}
# Change how sums are cut and so their last bits, and nothing else: after running out of memory.
CHANGES_BITS = {"micro_batch_tokens", "sample_batch", "max_tokens", "gradient_checkpointing"}


def _option(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": tuple(choices)})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`; what each means is in its `help`, which the command line shows.

    The defaults are those of arXiv 2602.01791 where it gives them. Raises InputError for values
    that no run can have, InputTypeError for values of another type.
    """

    # What is trained, on what, and how the signal is made.
    model: str = _option("", "the policy: a name on the hub or a folder")
    data: str = _option("", "JSON Lines of prompts and rubrics (docs/records.md); responses unused")
    output: str = _option("", "folder of the run: checkpoints, log, plot, final weights")
    method: str = _option("grad2reward", "what makes the token advantages", METHODS)
    judge: str | None = _option(None, "another model as the judge; none: the frozen initial policy")
    scaffold: str | None = _option(
        None, "how the judge is asked: continuation (the policy's own default) or grader"
    )
    reward: str | None = _option(None, "FILE.py:FUNCTION(record, response) -> number, no judge")
    lora_rank: int = _option(0, "train LoRA adapters of this rank; 0: all weights")
    lora_alpha: float = _option(32.0, "the adapters' output is scaled by alpha / rank")
    true_word: str = _option("True", "the judge's word for a rubric item that is met")
    false_word: str = _option("False", "its word for one that is not")
    allow_tokens: tuple[str, ...] = _option((), "control tokens that responses may hold")
    dtype: str = _option("float32", "of the policy's weights; bfloat16 with LoRA only", DTYPES)
    judge_dtype: str = _option("float32", "of a judge or reference beside the policy", DTYPES)
    autocast: bool = _option(False, "bfloat16 products in the policy's update")
    gradient_checkpointing: bool = _option(False, "activations are computed twice, not kept")

    # Rollouts.
    sampler: str = _option("transformers", "what generates", ("transformers", "vllm"))
    prompts_per_step: int = _option(32, "over all processes")
    group_size: int = _option(8, "responses of one prompt")
    sample_batch: int = _option(64, "responses generated side by side")
    max_new_tokens: int = _option(4096, "of a response; one without an end is cut there")
    temperature: float = _option(0.7, "of sampling; the log-probabilities are taken at it too")
    top_p: float = _option(0.8, "of sampling; 1 keeps every token")
    top_k: int = _option(20, "of sampling; 0 keeps every token")

    # Rewards.
    verdict: str = _option("argmax", "how a judge's verdict is read", ("argmax", "sample"))
    tau: float | str = _option(1.0, "temperature of the attribution: a number, auto, auto:NUMBER")
    objective: str = _option("logp", "what is differentiated", OBJECTIVES)
    readout: str = _option("dot", "what is read at an embedding", READOUTS)
    shuffle: bool = _option(False, "a control: attributions in random order within a response")
    estimator: str = _option("returns_pooled", "token rewards to token advantages", ESTIMATORS)
    divide_by_std: bool = _option(True, "advantages are divided by their standard deviation")
    answer_marker: str = _option("\\boxed{", "grail: what opens the answer, or OPENS...CLOSES")
    polarity: str = _option("wrong", "grail: which responses", ("wrong", "correct", "both"))
    novelty: float = _option(1.0, "g2rl: lambda, how much novelty counts")
    variant: str = _option("equation", "g2rl: the form for wrong answers", ("equation", "prose"))
    parameters: str = _option("trainable", "vigor: whose gradient", ("trainable", "all", "lm_head"))
    max_tokens: int | None = _option(None, "rows alive at once in the signal; none: free memory")

    # The update.
    iterations: int = _option(1, "passes over the rollouts of a step")
    minibatches: int = _option(1, "optimiser steps of a pass")
    micro_batch_tokens: int = _option(4096, "padded tokens of one forward and backward")
    clip_low: float = _option(0.2, "the ratio counts down to 1 - this")
    clip_high: float = _option(0.2, "the ratio counts up to 1 + this")
    mask_truncated: bool = _option(False, "responses that were cut have no part in the loss")
    loss: str = _option(
        "sequence_mean", "mean over a response's tokens first, or over all of them alike", LOSSES
    )
    kl: float = _option(0.0, "weight of the KL term against the initial policy; 0: no term")
    learning_rate: float = _option(1e-6, "of AdamW, reached after the warm-up")
    warmup: int = _option(0, "steps of linear warm-up")
    weight_decay: float = _option(0.0, "of AdamW")
    max_gradient_norm: float = _option(1.0, "longer gradients are scaled down to it")

    # The run.
    steps: int = _option(100, "how many; each is one set of rollouts")
    seed: int = _option(0, "of prompts, rollouts and everything else that is drawn")
    checkpoint_every: int = _option(10, "steps between checkpoints")
    keep_checkpoints: int = _option(2, "older ones are deleted")
    evaluate_every: int = _option(0, "steps between evaluations; 0: none")
    evaluation_samples: int = _option(1, "responses to each held-out prompt")
    held_out: str | None = _option(None, "JSON Lines of prompts for evaluations")
    checker: str | None = _option(
        None, "FILE.py:FUNCTION(record, response) -> number, not trained on"
    )
    canaries_every: int = _option(50, "steps between canary checks of the judge; 0: none")
    trackers: tuple[str, ...] = _option((), "tensorboard, wandb, besides log.jsonl")
    progress: bool = _option(True, "live figures on stderr")
    alarms: AlarmLimits = dataclasses.field(default_factory=AlarmLimits, metadata={"help": ""})

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, value, hints[field.name])
            choices = field.metadata.get("choices")
            if choices and value not in choices:
                expected = " | ".join(map(repr, choices))
                raise InputError(f"unknown {field.name}", expected=expected, got=repr(value))
        if self.scaffold is not None and self.scaffold not in SCAFFOLDS:
            expected = " | ".join(map(repr, SCAFFOLDS))
            raise InputError("unknown scaffold", expected=expected, got=repr(self.scaffold))
        self._check_numbers()
        _ = self.attribution, self.advantage
        if self.reward is not None and self.judge is not None:
            raise InputError("reward and judge are both given", expected="one of them")
        if self.reward is not None and self.method == "grad2reward":
            raise InputError(
                "method 'grad2reward' needs a judge: its rewards are a judge's gradients",
                got=f"reward={self.reward!r}",
            )
        if self.shuffle and (self.method != "grad2reward" or self.readout == "uniform"):
            raise InputError(
                "shuffle needs attributions to shuffle",
                expected="method 'grad2reward' and a readout other than 'uniform'",
                got=f"method={self.method!r}, readout={self.readout!r}",
            )
        if self.evaluate_every and self.held_out is None:
            raise InputError("evaluate_every needs held_out", expected="JSON Lines of prompts")
        if self.method == "vigor" and (self.judge is not None or self.reward is not None):
            raise InputError("method 'vigor' ranks by gradients", expected="no judge and no reward")
        if self.dtype == "bfloat16" and not self.lora_rank:
            raise InputError(
                "bfloat16 weights cannot be trained: at a usual learning rate an update is smaller "
                "than their last bit",
                expected="dtype='float32', with autocast=True for bfloat16 products, or lora_rank",
            )
        if self.sampler == "vllm" and self.lora_rank:
            raise InputError(
                "sampler 'vllm' does not take LoRA adapters", fix="Use 'transformers'."
            )

    def _check_numbers(self) -> None:
        at_least_one = (
            "prompts_per_step group_size sample_batch max_new_tokens iterations minibatches steps "
            "micro_batch_tokens checkpoint_every evaluation_samples keep_checkpoints"
        )
        not_negative = (
            "lora_rank top_k kl warmup seed weight_decay evaluate_every canaries_every clip_low "
            "clip_high novelty learning_rate"
        )
        for least, names in ((1, at_least_one), (0, not_negative)):
            for name in names.split():
                value = getattr(self, name)
                if not least <= value < math.inf:
                    raise InputError(f"{name} is out of range", expected=f">= {least}", got=value)
        for name in ("temperature", "max_gradient_norm", "lora_alpha"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InputError(f"{name} is out of range", expected="> 0", got=value)
        if not 0 < self.top_p <= 1:
            raise InputError("top_p is out of range", expected="0 < top_p <= 1", got=self.top_p)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError("max_tokens is out of range", expected=">= 1", got=self.max_tokens)

    @property
    def attribution(self) -> AttributionConfig:
        """`tau`, `objective`, `readout` as the method takes them."""
        tau: Any = self.tau
        if isinstance(tau, str) and tau.startswith("auto:"):
            try:
                tau = ("auto", float(tau.removeprefix("auto:")))
            except ValueError:
                pass  # said below, by whoever reads it
        return AttributionConfig(tau, self.objective, self.readout)

    @property
    def advantage(self) -> AdvantageConfig:
        return AdvantageConfig(self.estimator, self.divide_by_std)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them."""
        lists = {name: list(getattr(self, name)) for name in NAMES}
        return dataclasses.asdict(self) | lists

    def without_effect(self) -> list[str]:
        """What is not at its default and not read in this run, a text for each reason."""
        others = [name for of, names in READ_BY.items() if of != self.method for name in names]
        unread: list[tuple[str, Sequence[str]]] = [(f"method {self.method!r}", others)]
        if self.method == "vigor" or self.reward is not None:
            unread.append(("no judge", READ_BY_JUDGE))
        if not self.lora_rank:
            unread.append(("lora_rank 0", ("lora_alpha",)))
        if not self.evaluate_every:
            unread.append(("evaluate_every 0", ("held_out", "checker", "evaluation_samples")))
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        found = []
        for reason, names in unread:
            given = [name for name in names if getattr(self, name) != defaults[name]]
            if given:
                found.append(f"{', '.join(given)}: without effect with {reason}")
        return found

    def differences(self, other: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Where a run with these settings would not continue one that had `other`; and where it
        would, with other last bits."""
        differ = {
            name: f"{name}: {other.get(name)!r} then, {value!r} now"
            for name, value in self.to_dict().items()
            if name not in FREE_TO_CHANGE and other.get(name) != value
        }
        return (
            [text for name, text in differ.items() if name not in CHANGES_BITS],
            [text for name, text in differ.items() if name in CHANGES_BITS],
        )


def config_of(values: Mapping[str, Any]) -> TrainConfig:
    """A TrainConfig of plain values, such as YAML's; unknown names raise InputError."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(
            f"unknown settings: {', '.join(unknown)}", expected=f"of {', '.join(sorted(known))}"
        )
    given = dict(values)
    for name in NAMES:
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    if isinstance(given.get("alarms"), Mapping):
        limits = {field.name for field in dataclasses.fields(AlarmLimits)}
        odd = sorted(set(given["alarms"]) - limits)
        if odd:
            expected = f"of {', '.join(sorted(limits))}"
            raise InputError(f"unknown alarms: {', '.join(odd)}", expected=expected)
        given["alarms"] = AlarmLimits(**given["alarms"])
    return TrainConfig(**given)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file; relative paths in it are left as they are."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path} holds no settings", expected="lines of NAME: VALUE")
    hints = get_type_hints(TrainConfig)
    for name, value in values.items():
        # YAML reads 1e-6 as text: its numbers want a point.
        if isinstance(value, str) and float in (hints.get(name), *get_args(hints.get(name))):
            values[name] = _number_in(value)
    return values


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--prompts-per-step 8` and so on: an option for every setting but the alarms' limits."""
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name == "alarms":
            continue
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        shown = field.default if field.default not in ("", None, ()) else "none"
        text = f"{field.metadata['help']} (default {shown})".replace("%", "%%")
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif field.name in NAMES:
            parser.add_argument(flag, type=_names_in, **options)
        elif choices := field.metadata["choices"]:
            parser.add_argument(flag, choices=choices, **options)
        else:
            parts = [part for part in (get_args(kind) or (kind,)) if part is not type(None)]
            read = parts[0] if len(parts) == 1 else _number_in
            parser.add_argument(flag, type=read, metavar=_metavar(parts), **options)


def _metavar(parts: Sequence[Any]) -> str:
    return "N" if parts == [int] else "X" if float in parts else "TEXT"


def _names_in(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _number_in(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _check_type(name: str, value: Any, kind: Any) -> None:
    kinds = get_args(kind) if type(None) in get_args(kind) or str in get_args(kind) else (kind,)
    if kind == tuple[str, ...]:
        good = isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    else:
        # A bool is an int to Python, and an int will do for a float.
        kinds = (*kinds, int) if float in kinds else kinds
        good = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if not good:
        expected = (
            "a tuple of names" if kind == tuple[str, ...] else str(getattr(kind, "__name__", kind))
        )
        raise InputTypeError(f"{name} is of the wrong type", expected=expected, got=repr(value))
