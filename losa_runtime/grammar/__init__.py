"""What an output may be: patterns as automata, and the paths through a block from which it still can match."""
