"""Peak memory of self-judged training, beside the same loop with a separate KL reference.

    python -m bench.training_memory [--repetitions 3] [--save]

Both are `g2r_fast.training` on the same model, prompts and sizes, each in a process of its own: one
is GRPO with rewards from a rule and a frozen reference for its KL term, the other Grad2Reward with
the frozen initial policy as judge and KL reference in one; short responses, then long ones. What
is reported is the peak of the process's resident memory beyond what it had before the models were
loaded. Where the second is beyond the first by more than is allowed, nothing is saved.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.facts import facts, save

__all__ = ["ARMS", "beyond", "make_model", "measure", "peak_of", "run_arm"]

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny_policy"
ALLOWED = 0.1  # of one copy of the weights
LENGTHS = (48, 192)  # tokens of a response
# Large enough that a copy of the weights is far more than what does not grow with them: what
# threads keep for the next call, and what allocators leave lying about.
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
COMMON: dict[str, Any] = {
    "data": str(TINY / "train.jsonl"),
    "prompts_per_step": 2,
    "group_size": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "kl": 0.05,
    "micro_batch_tokens": 2048,
    "progress": False,
}
ARMS: dict[str, dict[str, Any]] = {
    "separate reference": {"method": "grpo", "reward": f"{TINY / 'environment.py'}:score"},
    "self-judged": {"method": "grad2reward"},
}


def make_model(folder: Path, sizes: dict[str, int] = SIZES) -> int:
    """A randomly initialised policy with the tiny policy's tokenizer; bytes of its weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def peak_of(arm: str, model: Path, steps: int, length: int) -> int:
    """Bytes, of a process of its own."""
    command = [
        sys.executable, "-m", "bench.training_memory", "--run", arm, str(model), str(steps),
        str(length),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arm} failed:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def run_arm(arm: str, model: Path, steps: int, length: int, output: Path) -> None:
    from g2r_fast.training import train
    from g2r_fast.training.config import config_of

    values = {**COMMON, **ARMS[arm], "model": str(model), "max_new_tokens": length}
    train(config_of({**values, "steps": steps, "output": str(output)}))


def _run(arm: str, model: str, steps: str, length: str) -> None:
    """In the process that is measured."""
    import g2r_fast.training  # noqa: F401  what the import takes is no part of it

    before = _peak_bytes()
    with tempfile.TemporaryDirectory() as output:
        run_arm(arm, Path(model), int(steps), int(length), Path(output))
    print(json.dumps({"peak_bytes": _peak_bytes() - before}))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def beyond(peaks: dict[str, list[int]], copy: int) -> float:
    """Copies of the weights that self-judged training takes more, by medians."""
    more = statistics.median(peaks["self-judged"]) - statistics.median(peaks["separate reference"])
    return round(more / copy, 4)


def measure(repetitions: int, steps: int = 2) -> dict[str, dict[str, Any]]:
    """By response length; the arms take turns."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = make_model(Path(folder))
        for length in LENGTHS:
            peaks: dict[str, list[int]] = {arm: [] for arm in ARMS}
            for _ in range(repetitions):
                for arm in ARMS:
                    peaks[arm].append(peak_of(arm, Path(folder), steps, length))
                    told = f"{length} tokens, {arm}: {peaks[arm][-1] / 1e6:.0f} MB"
                    print(told, file=sys.stderr, flush=True)
            found[f"training-memory, {length} tokens"] = {
                "max_new_tokens": length,
                "copy_bytes": copy,
                "peak_bytes": peaks,
                "median_peak_bytes": {arm: statistics.median(of) for arm, of in peaks.items()},
                "beyond_reference_in_copies": beyond(peaks, copy),
                "allowed_in_copies": ALLOWED,
                "settings": {name: value for name, value in COMMON.items() if name != "data"},
                "sizes": SIZES,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write results/training-memory.json")
    parser.add_argument(
        "--run", nargs=4, metavar=("ARM", "MODEL", "STEPS", "LENGTH"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.run:
        _run(*arguments.run)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    about = facts()
    found = measure(arguments.repetitions)
    too_much = False
    for name, one in found.items():
        more = one["beyond_reference_in_copies"]
        too_much |= more > ALLOWED
        print(f"{name}: {more:+.3f} copies of the weights, {ALLOWED} allowed")
    if too_much:
        sys.exit("self-judged training takes more than is allowed; nothing is saved")
    if arguments.save:
        content = {"facts": about, "scenarios": found}
        print(f"saved {save('training-memory', content)}")


if __name__ == "__main__":
    main()
