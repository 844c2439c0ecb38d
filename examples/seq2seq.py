"""Teaches an encoder-decoder to read dates: `python -m examples.seq2seq`.

"friday, march 2nd, 2001" becomes "2001-03-02". Trained with cross-entropy, measured by exact matches on dates that
it never saw.
"""

from __future__ import annotations

import argparse
import datetime
import random
import sys
import time
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from fastattn.nn import Transformer

from .arguments import add_common, apply_common
from .dates import CHARACTERS, DATES, END, START, TARGET_LENGTH, Batch, decode, make_batch, split, write
from .progress import Progress

SAMPLES = 6
STEPS = 400  # of a full run
REQUIRED = 0.9  # exact matches after a full run, as a part of the held-out dates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    add_common(parser)
    add = parser.add_argument
    add("--steps", type=int, default=STEPS, metavar="N", help="default: %(default)s")
    add("--batch", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--learning-rate", type=float, default=4e-3, metavar="RATE", help="default: %(default)s")
    add("--held-out", type=int, default=1000, metavar="N", help="dates to test with (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Trains and prints. Returns 0; 1 if a full run learnt too little; 2 for bad values."""
    try:
        apply_common(args)
        _check(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(args.seed)
    style = random.Random(args.seed)
    seen, unseen = split(args.seed, args.held_out)
    model = Transformer(
        len(CHARACTERS), 64, 256, 4, 2, dropout=0.0, max_length=64, start_token_id=START, backend=args.backend
    ).to(args.device)
    print(
        f"dates: {len(seen):,} to train, {len(unseen):,} held out; model: "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {args.steps} steps of {args.batch} dates"
    )
    start = time.perf_counter()
    _train(model, seen, style, args)
    print(f"trained in {time.perf_counter() - start:.1f} s")
    right = _test(model, unseen, style, args)
    ok, verdict = judge(right, len(unseen), args.steps)
    print(verdict)
    return 0 if ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="examples.seq2seq", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def judge(right: int, total: int, steps: int) -> tuple[bool, str]:
    """Whether that many exact matches will do after so many steps, and a sentence. Short runs are not judged."""
    if steps < STEPS:
        return True, f"not judged: {REQUIRED:.0%} exact matches are required of runs of at least {STEPS} steps"
    ok = right >= REQUIRED * total
    return ok, f"{'ok' if ok else 'FAILED'}: {right / total:.1%} exact matches, at least {REQUIRED:.0%} are required"


def _check(args: argparse.Namespace) -> None:
    for name, most in (("steps", None), ("batch", DATES // 2), ("held_out", DATES // 2)):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
        if most is not None and value > most:
            raise ValueError(f"{option} must be at most {most}, half of the dates there are, got {value}")
    if not args.learning_rate > 0:
        raise ValueError(f"--learning-rate must be positive, got {args.learning_rate}")


def _batch(dates: Sequence[datetime.date], style: random.Random, device: str) -> tuple[list[str], Batch]:
    texts = [write(date, style) for date in dates]
    batch = make_batch(texts, dates)
    return texts, Batch(batch.sources.to(device), batch.real.to(device), batch.targets.to(device))


def _train(model: Transformer, dates: list[datetime.date], style: random.Random, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps + 1)
    with Progress("training", args.steps) as progress:
        for _ in range(args.steps):
            _, batch = _batch(style.sample(dates, args.batch), style, args.device)
            shifted = model.shift_right(batch.targets)
            logits = model(batch.sources, batch.real, decoder_input_ids=shifted)
            loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(loss=loss.item())


def _test(model: Transformer, dates: list[datetime.date], style: random.Random, args: argparse.Namespace) -> int:
    """Prints answers; returns how many are right."""
    texts, batch = _batch(dates, style, args.device)
    tokens = model.generate(batch.sources, TARGET_LENGTH, attention_mask=batch.real, eos_token_id=END)
    answers = [decode(row) for row in tokens]
    right = sum(answer == date.isoformat() for answer, date in zip(answers, dates, strict=True))
    print(f"exact matches on held-out dates: {right} of {len(dates)}, {right / len(dates):.1%}")
    for text, answer, date in list(zip(texts, answers, dates, strict=True))[:SAMPLES]:
        verdict = "right" if answer == date.isoformat() else f"wrong, it is {date.isoformat()}"
        print(f"    {text:<32} {answer:<12} {verdict}")
    return right


if __name__ == "__main__":
    sys.exit(main())
