"""Stages: verbs, one thin file per command, where a job can be read from beginning to end."""
