"""The HTTP server: OpenAI's JSON, SSE, metrics and the command line. Never imports torch."""
