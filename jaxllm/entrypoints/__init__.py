"""What users call: LLM for scripts, AsyncLLM for event loops, and the thread that steps the engine for it."""
