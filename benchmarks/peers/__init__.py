"""The runtime against what a user would have without it: same weights, same prompts, same machine, same run."""
