"""Two servers of this tree behind the routers that SGLang deployments use, as they come from the package index."""
