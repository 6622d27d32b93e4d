"""Adapters: attach, read, convert older formats, open chains, check lineage."""
