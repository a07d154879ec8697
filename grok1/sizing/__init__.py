"""Memory and hardware: what a model needs, and where it fits."""
