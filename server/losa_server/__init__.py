"""People and sockets: the HTTP process, the engine process and the messages between them."""
