"""Pure functions on tensors: no modules, no I/O, torch only."""
