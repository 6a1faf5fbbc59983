"""argv → config → one call; tables and reports. Nothing here computes."""
