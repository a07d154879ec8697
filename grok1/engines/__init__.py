"""Grok-1 in other inference engines: a folder for each, loaded by the engine and never by the rest of the package."""
