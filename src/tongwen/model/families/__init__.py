"""Old import path of ChatGLM-6B, kept for users' code."""
