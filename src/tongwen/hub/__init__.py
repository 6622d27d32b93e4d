"""Model hubs: download data sets, models and adapters by name, complete and verified; upload models."""
