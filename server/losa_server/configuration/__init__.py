"""From flags, environment and a file to the settings models: flags > LOSA_… variables > YAML file > defaults.

`options` reads the declarations back from the models, `flags` puts them on a command line, `sources` finds their
values, `hints` explains mistakes, `printout` shows what came of it.
"""
