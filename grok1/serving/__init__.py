"""An OpenAI-compatible server around one folder."""
