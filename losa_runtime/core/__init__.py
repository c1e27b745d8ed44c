"""The nouns that every other room uses: requests, parameters, configurations, errors. Knows no tensor library."""
