"""Tools for Grok-1 in Transformers: the `grok1` command and the library behind it.

Importing this package loads neither torch nor Transformers. The model itself is the package `modeling_grok1`.
"""

# Where this project is published. Set OWNER here and in README.md (`REPOSITORY=`), nowhere else.
REPOSITORY = "https://github.com/OWNER/grok-1-transformers"
