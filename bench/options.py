"""Kinds of options: lists and ranges of numbers."""

import re

import click


class Counts(click.ParamType):
    """Whole numbers above 0, separated by commas; first:last:step stands for all of its numbers, both ends included."""

    name = "N,N,... or first:last:step"

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for part in value.split(","):
            numbers = self._numbers(part.strip())
            if not numbers:
                self.fail(
                    f"{value!r} is not a list of whole numbers above 0, such as 1,8, nor a range first:last:step, "
                    "such as 256:4096:64",
                    param,
                    ctx,
                )
            found += numbers
        return tuple(dict.fromkeys(found))

    @staticmethod
    def _numbers(part: str) -> list[int]:
        if not re.fullmatch(r"[0-9]+(:[0-9]+:[0-9]+)?", part):
            return []
        first, *rest = (int(number) for number in part.split(":"))
        last, step = rest or (first, 1)
        return list(range(first, last + 1, step)) if first > 0 and step > 0 else []
