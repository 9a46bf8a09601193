"""kvtalk: one LLM hands what it has read to another as a KV cache, under a byte budget."""
