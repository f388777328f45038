"""The load generator: drives any server that speaks one of three dialects, and prints what its clients feel.

    prompts, dialects, figures      pure: texts of so many tokens, what goes over the wire, medians
    client                          one request on one socket, with every byte and every moment in our hands
    server, scenarios               a server that is measured, and what is done to it
    speed, leaving, crowd           the scenarios, by subject
    bench                           the rounds: every scenario, every server, in turn
    report                          table, JSON, markdown, plot
    peers, processes                a server of our own as a child; what a local process holds
    bare                            the engine beside a loop that does nothing but decode, in one process

The client shares the machine with what it measures, so it is as thin as it can be: sockets and h11.
"""
