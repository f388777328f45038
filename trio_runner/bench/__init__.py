"""The load generator: drives any server that speaks one of four dialects, and prints what its clients experience.

    prompts, dialects, figures      pure: texts with a given number of tokens, requests and answers, medians
    client                          one request on one socket, with the moment of every byte
    server, scenarios               a server that is measured; what all scenarios share
    speed, leaving, crowd           the scenarios, by subject
    rounds                          the rounds: every scenario on every server, in turn
    report                          table, JSON, markdown, plot
    peers, processes                a server of our own as a child process; what a local process holds
    bare                            the engine beside a loop that does nothing but decode, in one process
    kernels, contenders             CPU kernels: ours, upstream's and a peer's in turns; kernel_table has the results
    embedding_turns                 embeddings of many texts, beside another program
    step_profile, hotspots          where the time of a step goes, by samples of a profiler

The client shares the machine with the server that it measures, so it does as little as possible: sockets and h11.
"""
