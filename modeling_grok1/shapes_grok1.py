# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""What `print(model)` shows of modules with parameters of their own."""


class Shapes:
    """Mixin of modules: `print(model)` shows the shapes of their parameters, and how many experts are active."""

    def extra_repr(self) -> str:
        shapes = [f"{name}={tuple(parameter.shape)}" for name, parameter in self._parameters.items()]  # type: ignore[attr-defined]
        counts = [f"{name}={getattr(self, name)}" for name in ("num_experts", "top_k") if hasattr(self, name)]
        return ", ".join([*counts, *shapes])
