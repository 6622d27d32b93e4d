"""Shared foundations of all packages: errors, messages, artifacts, records, templates, safetensors."""
