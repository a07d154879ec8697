"""An OpenAI-compatible server around one folder.

schema      what a request may hold
model       the served model, its tokenizer and chat template
text        tokens to text, piece by piece, up to a stop string
generation  one request at a time
batching    continuous batching
handlers    a request to prompts, prompts to choices
answers     choices in OpenAI's format
http        limits, errors, clients that leave
server      the application and its routes
start       the command
"""
