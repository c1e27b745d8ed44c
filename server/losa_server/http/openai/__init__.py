"""The OpenAI API: models, completions and chat completions, with SGLang's further fields."""
