"""A chat in the terminal: a `session` that reads lines and shows answers, and two kinds of partner who give them, a
server (`remote`) and a model in this process (`local`).
"""
