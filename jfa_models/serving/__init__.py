"""`jfa serve`: the engine behind OpenAI's HTTP protocol. Needs the extra `serve`."""
