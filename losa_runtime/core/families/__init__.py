"""What the config.json of each model family says, one small file each. Knows no tensor library."""
