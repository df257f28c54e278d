"""Engines other than ours: transformers' `generate`, vLLM, llama.cpp, and servers elsewhere."""
