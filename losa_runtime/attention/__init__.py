"""How attention is computed: interchangeable backends over the paged cache. Knows no sparse method and no model."""
