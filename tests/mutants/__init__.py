"""How strong the tests are: bugs planted in a copy of the sources, each of which a named test must find."""
