"""What the methods do to one block: errors, cloze perplexity, unions and changes, along a given sequence of tokens."""
