"""The project's own benchmark: `python -m mini_llm.bench --help`."""
