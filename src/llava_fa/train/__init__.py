"""Recovery training: a compressed model learns back what its bits have cost it."""
