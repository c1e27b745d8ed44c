"""How well each sparse method answers, and what it reads for it: the bundled model, paired on the same samples."""
