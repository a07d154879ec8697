# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""Sizes in bytes, as users write them. Imports nothing, so that tools can use it with any version of Transformers."""

import re


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str, option: str = "expert_cache") -> int:
    """
    A number of bytes: 40_000_000_000, "40GB" (powers of 1000) or "40GiB" (powers of 1024).

    Args:
        size: a positive number of bytes, or one with a unit.
        option: what the error message names.

    Raises:
        ValueError: it is not a positive number of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"`{option}`: expected a size such as 5GB, 800MB or 4GiB, found {size!r}.")
    return int(float(match[1]) * unit)
