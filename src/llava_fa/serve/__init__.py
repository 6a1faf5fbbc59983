"""An OpenAI-compatible server: `transformers serve` for one model, behind a guard (docs/serving.md)."""
