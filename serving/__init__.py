"""hd-serve, from the outside in: `guard` and `proxy`, `app` with its paths, `service`, `dispatch` with the queue and
its tickets, `messages`, and `worker` with the loop. `ray` and `triton` run the same loop without this server.
"""
