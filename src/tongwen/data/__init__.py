"""Data: read rows, convert them to records, clean and deduplicate, and encode to tokens."""
