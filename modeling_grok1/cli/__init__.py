"""The `grok1` command."""
