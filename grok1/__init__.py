"""Tools for Grok-1 in Transformers: the `grok1` command and the library behind it.

Importing this package loads neither torch nor Transformers. The model itself is the package `modeling_grok1`.
"""
