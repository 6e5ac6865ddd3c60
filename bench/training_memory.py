"""Peak memory of self-judged training, beside the same loop with a separate KL reference.

    python -m bench.training_memory [--repetitions 3] [--save]

Both are `g2r_fast.training` on the same model, prompts and sizes, each in a process of its own: one
is GRPO with rewards from a rule and a frozen reference for its KL term, the other Grad2Reward with
the frozen initial policy as judge and KL reference in one. What is reported is the peak of the
process's resident memory beyond what it had before the models were loaded.
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

__all__ = ["ARMS", "make_model", "measure", "peak_of"]

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny_policy"
ALLOWED = 0.1  # of one copy of the weights
# Large enough that a copy of the weights is far more than what allocators leave lying about.
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
COMMON = {
    "data": str(TINY / "train.jsonl"),
    "prompts_per_step": 2,
    "group_size": 4,
    "max_new_tokens": 48,
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


def peak_of(arm: str, model: Path, steps: int) -> int:
    """Bytes, of a process of its own."""
    command = [sys.executable, "-m", "bench.training_memory", "--run", arm, str(model), str(steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arm} failed:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def _run(arm: str, model: str, steps: int) -> None:
    """In the process that is measured."""
    from g2r_fast.training import train
    from g2r_fast.training.config import config_of

    before = _peak_bytes()
    with tempfile.TemporaryDirectory() as output:
        values = {**COMMON, **ARMS[arm], "model": model, "steps": steps, "output": output}
        train(config_of(values))
    print(json.dumps({"peak_bytes": _peak_bytes() - before}))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(repetitions: int, steps: int = 3) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        copy = make_model(Path(folder))
        found: dict[str, list[int]] = {arm: [] for arm in ARMS}
        for _ in range(repetitions):
            for arm in ARMS:
                found[arm].append(peak_of(arm, Path(folder), steps))
                print(f"{arm}: {found[arm][-1] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    medians = {arm: statistics.median(peaks) for arm, peaks in found.items()}
    beyond = medians["self-judged"] - medians["separate reference"]
    return {
        "copy_bytes": copy,
        "peak_bytes": found,
        "median_peak_bytes": medians,
        "beyond_reference_in_copies": round(beyond / copy, 4),
        "allowed_in_copies": ALLOWED,
        "settings": {name: value for name, value in COMMON.items() if name != "data"},
        "sizes": SIZES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write results/training-memory.json")
    parser.add_argument("--run", nargs=3, metavar=("ARM", "MODEL", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        arm, model, steps = arguments.run
        _run(arm, model, int(steps))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    about = facts()
    found = measure(arguments.repetitions)
    print(json.dumps({k: v for k, v in found.items() if k not in ("settings", "sizes")}, indent=1))
    if arguments.save:
        content = {"facts": about, "scenarios": {"training-memory": found}}
        print(f"saved {save('training-memory', content)}")


if __name__ == "__main__":
    main()
