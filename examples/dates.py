"""A small translation task: dates as people write them, into ISO 8601. Characters are the tokens."""

from __future__ import annotations

import datetime
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
DATES = (LAST - FIRST).days + 1
START, END = 0, 1
CHARACTERS = "  " + " .,-0123456789" + "abcdefghijklmnopqrstuvwxyz"  # the first two places are START and END
TARGET_LENGTH = len("2001-02-03") + 1  # with END
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_ORDINALS = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}


@dataclass(frozen=True)
class Batch:
    """sources (batch, longest source), int64; real likewise, bool, False = padding; targets (batch, 11), END last."""

    sources: Tensor
    real: Tensor
    targets: Tensor


def split(seed: int, held_out: int) -> tuple[list[datetime.date], list[datetime.date]]:
    """(training dates, held-out dates): every date from FIRST to LAST in exactly one of them."""
    days = [FIRST + datetime.timedelta(days=n) for n in range(DATES)]
    random.Random(seed).shuffle(days)
    return days[held_out:], days[:held_out]


def write(date: datetime.date, style: random.Random) -> str:
    """The date in one of many ways."""
    day, month, year = date.day, _MONTHS[date.month - 1], date.year
    ordinal = f"{day}{_ORDINALS.get(day, 'th')}"
    weekday = _WEEKDAYS[date.weekday()]
    ways = (
        f"{day} {month} {year}",
        f"{month} {day}, {year}",
        f"{month} {ordinal}, {year}",
        f"{weekday}, {day} {month} {year}",
        f"{weekday}, {month} {ordinal}, {year}",
        f"{day}.{date.month}.{year}",
        f"{day}-{month[:3]}-{year}",
        f"{month[:3]} {day} {year}",
    )
    return style.choice(ways)


def make_batch(texts: Sequence[str], dates: Sequence[datetime.date]) -> Batch:
    """The written dates, padded on the right, and what they mean."""
    longest = max(map(len, texts))
    sources = torch.tensor([encode(text.ljust(longest)) for text in texts])
    real = torch.arange(longest) < torch.tensor([[len(text)] for text in texts])
    targets = torch.tensor([[*encode(date.isoformat()), END] for date in dates])
    return Batch(sources, real, targets)


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    return [CHARACTERS.index(c, END + 1) for c in text]


def decode(tokens: Tensor) -> str:
    """The text before END."""
    found = tokens.tolist()
    return "".join(CHARACTERS[token] for token in found[: found.index(END) if END in found else None])
