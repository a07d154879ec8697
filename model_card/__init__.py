"""The README of a converted folder, and the way to the hub."""
