"""Adapters: attaching, reading, older forms, chains, lineage."""
