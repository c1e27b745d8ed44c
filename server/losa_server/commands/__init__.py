"""One file per subcommand of `losa`: its options and what it does."""
