"""An OpenAI-compatible server: transformers serve or vLLM for one model, behind a guard (docs/serving.md)."""
