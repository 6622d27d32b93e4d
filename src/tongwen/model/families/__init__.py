"""Kept for its one module: the import path of ChatGLM-6B that users know."""
