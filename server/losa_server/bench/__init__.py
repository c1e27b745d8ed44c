"""A load test over HTTP: seeded programs of calls (`workload`), sent at a pace (`pace`) by a client that notes what
came when (`client`), summed up (`measure`) and shown (`report`). Knows the routes of a server, nothing of its inside.
"""
