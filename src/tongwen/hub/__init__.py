"""Hubs: data sets, models and adapters by name, fetched whole and verified."""
