"""Translate the commands and configuration files of older projects into recipes."""
