"""The HTTP server: a client of ``AsyncLLM``."""
