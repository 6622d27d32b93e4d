"""What every package may use: errors, messages, artifacts, records, templates, safetensors."""
