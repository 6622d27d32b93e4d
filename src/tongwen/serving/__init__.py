"""The OpenAI-compatible server, the terminal chat and the web page."""
