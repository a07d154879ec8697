"""The format of xAI's release: pickles of numpy arrays, read without executing anything, and written."""
