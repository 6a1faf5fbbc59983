"""A page on which two models answer the same question about the same picture (docs/comparing.md)."""
