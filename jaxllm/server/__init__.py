"""The OpenAI-compatible server: HTTP in front of `AsyncLLM`. Knows protocols; nothing of schedules or devices."""
