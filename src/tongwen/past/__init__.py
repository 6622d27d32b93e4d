"""Older projects: what their programs, flags and files were called, and what is said instead; what used to fail."""
