"""`python -m grok1`, the same as the `grok1` script."""

from grok1.cli import main


if __name__ == "__main__":
    main()
