"""Prompts in, pictures with their hands out: the loops over a bundle's graphs, on processors and GPUs.

What a request is called on its way:

    Request         what the client asks for; it never changes (requests.py)
    Work            a request in a loop: its tokens, hands and features so far (results.py)
    Job, DeviceJob  one of its two samplings: a row of a step graph and its schedule (sampler.py, device_sampler.py)
    Peek            a copy of where it is, between two steps (results.py)
    Picture         its result; a Failure says why there is none (results.py)
    Ticket          a request in a server's front: its client, and the events for it (serving/dispatch.py)
    InFlight        a request in a server's worker: what its previews need (serving/previews.py)
"""
