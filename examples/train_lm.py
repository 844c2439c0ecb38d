"""Trains a character-level language model on the standard library's sources: `python -m examples.train_lm`.

The same model, from the same seed and on the same batches, is trained on PyTorch's own attention beside it. Prints
how far the two loss curves are apart, the speed of both, and text that the trained model writes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields

import torch

from . import checkpoint
from .arguments import add_common, apply_common
from .plot import plot
from .progress import Progress
from .text import Corpus, standard_library
from .training import Settings, Training

INTERRUPTED = 128 + 2  # as shells report SIGINT
CHECKPOINT, PICTURE = "language_model.pt", "loss_curves.png"
EARLY = 20  # steps in which rounding cannot have grown into a visible difference
AGREEMENT = 1e-3  # what the training losses may be apart in them, in nats
FINAL_AGREEMENT = 0.01  # what the final validation losses may be apart, as a part of torch's
PROMPTS = ("def ", "class ", "        if self.")
WIDTH = 100  # of a printed line of generated text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options: every one of `Settings`, and those of this command."""
    add_common(parser)
    for field in fields(Settings):
        if field.name not in ("backend", "device", "seed"):
            kind = float if isinstance(field.default, float) else int
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=kind, default=field.default, metavar="N", help="default: %(default)s")
    parser.add_argument("--characters", type=int, default=4_000_000, metavar="N", help="of text (default: %(default)s)")
    parser.add_argument("--validate-every", type=int, default=50, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help=f"go on from OUT/{CHECKPOINT}")
    parser.add_argument(
        "--generate", type=int, default=200, metavar="N", help="characters to write behind each prompt (default: 200)"
    )


def run(args: argparse.Namespace) -> int:
    """Trains, prints and draws. Returns 0; 1 if the two models do not agree; 2 for bad values; 130 for Ctrl-C."""
    try:
        apply_common(args)
        training = _prepare(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = args.out / CHECKPOINT
    try:
        _train(training, args)
    except KeyboardInterrupt:  # perhaps in the midst of a step: what is saved is older, and whole
        print(f"\ninterrupted in step {training.step + 1}; --resume goes on from the last checkpoint, {path}")
        return INTERRUPTED
    agree = _print_result(training)
    _print_text(training, args.generate)
    print(f"\ncheckpoint: {path}")
    try:
        plot(training, args.out / PICTURE)
        print(f"curves: {args.out / PICTURE}")
    except ImportError:
        print("no picture of the curves: matplotlib is not installed")
    return 0 if agree else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="examples.train_lm", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _prepare(args: argparse.Namespace) -> Training:
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    _check(args, settings)
    corpus = standard_library(args.characters)
    if settings.context >= len(corpus.validation):
        raise ValueError(
            f"--context must be less than the {len(corpus.validation)} characters to validate, got {settings.context}"
        )
    training = Training(settings, corpus)
    if args.resume:
        training.restore(checkpoint.load(args.out / CHECKPOINT, training.identity()))
        print(f"resumed at step {training.step}")
    parameters = sum(p.numel() for p in training.arms["fastattn"].model.parameters())
    print(
        f"text: {len(corpus.train):,} characters to train, {len(corpus.validation):,} to validate, from "
        f"{corpus.files} files; vocabulary {len(corpus.characters)}\n"
        f"model: {parameters:,} parameters; {settings.steps} steps of {settings.batch} x {settings.context} characters"
    )
    return training


def _check(args: argparse.Namespace, settings: Settings) -> None:
    positive = ("steps", "batch", "context", "characters", "validate_every", "save_every")
    for name in positive:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.generate < 0:
        raise ValueError(f"--generate must not be negative, got {args.generate}")
    if not settings.learning_rate > 0:
        raise ValueError(f"--learning-rate must be positive, got {settings.learning_rate}")


def _train(training: Training, args: argparse.Namespace) -> None:
    steps = training.settings.steps
    with Progress("training", steps, training.step) as progress:
        while training.step < steps:
            training.advance()
            last = training.step == steps
            if training.step % args.validate_every == 0 or last:
                training.validate()
            if training.step % args.save_every == 0 or last:
                checkpoint.save(training.state(), args.out / CHECKPOINT)
            progress.advance(**{name: arm.losses[-1] for name, arm in training.arms.items()})


# ---------------------------------------------------------------------------------------------------- result


def _print_result(training: Training) -> bool:
    """Prints what the run showed; returns whether the two models agree."""
    corpus, differences = training.corpus, training.differences()
    validation = {name: training.validation_loss(name) for name in training.arms}
    print(f"\n{'':<22}{'fastattn':>10}{'torch SDPA':>12}")
    for label, number in (
        ("training loss, last", lambda name: f"{training.arms[name].losses[-1]:.4f}"),
        ("validation loss", lambda name: f"{validation[name]:.4f}"),
        ("tokens/s, median", lambda name: f"{training.tokens_per_second(name):,.0f}"),
    ):
        ours, theirs = (number(name) for name in training.arms)
        print(f"{label:<22}{ours:>10}{theirs:>12}")
    speed = training.tokens_per_second("fastattn") / training.tokens_per_second("torch")
    print(
        f"speed, fastattn over torch: {speed:.2f}\n"
        f"validation loss of counting: characters {corpus.unigram_loss():.4f}, pairs {corpus.bigram_loss():.4f}"
    )
    early, apart = differences[:EARLY], abs(validation["fastattn"] / validation["torch"] - 1.0)
    early_agree = all(difference <= AGREEMENT for difference in early)  # NaN is not
    final_agree = apart <= FINAL_AGREEMENT
    print(
        f"largest difference of the training losses: {max(early):.1e} in the first {len(early)} steps (allowed: "
        f"{AGREEMENT:.0e}), {max(differences):.1e} in all {len(differences)}\n"
        f"difference of the final validation losses: {apart:.2%} (allowed: {FINAL_AGREEMENT:.0%})\n"
        f"the training losses {_verdict(early_agree)} in the first {len(early)} steps; "
        f"the final validation losses {_verdict(final_agree)}"
    )
    return early_agree and final_agree


def _verdict(agree: bool) -> str:
    return "agree" if agree else "DO NOT AGREE"


def _print_text(training: Training, count: int) -> None:
    """Writes on from the prompts with the model trained on fastattn, keys and values cached."""
    if count == 0:
        return
    corpus: Corpus = training.corpus
    longest = max(map(len, PROMPTS))
    prompts = torch.stack([corpus.encode(prompt.rjust(longest)) for prompt in PROMPTS])
    real = torch.arange(longest) >= torch.tensor([[longest - len(prompt)] for prompt in PROMPTS])
    generator = torch.Generator(training.device).manual_seed(training.settings.seed)
    start = time.perf_counter()
    tokens = training.arms["fastattn"].model.generate(
        prompts.to(training.device),
        count,
        attention_mask=real.to(training.device),
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        generator=generator,
    )
    rate = len(PROMPTS) * count / (time.perf_counter() - start)
    print(f"\ntext that the model writes ({rate:,.0f} characters/s):")
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        print("    ----")
        for line in corpus.decode(row[longest - len(prompt) :]).splitlines():
            print(f"    {line if len(line) <= WIDTH else line[:WIDTH] + ' ...'}")


if __name__ == "__main__":
    sys.exit(main())
