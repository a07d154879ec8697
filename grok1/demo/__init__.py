"""The bundled demonstration checkpoint: a small trained Grok-1 in the format of xAI's release."""
