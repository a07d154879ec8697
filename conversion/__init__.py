"""xAI's checkpoint to a folder for the hub, and back."""
