"""`trio-runner chat`: a conversation in the terminal, with a model in this process or with a server.

Rule 1: `composer`, `entry`, `conversation`, `blocks`, `painter`, `sse` and `openai` are pure. They know no terminal,
file, clock or network, and are tested without any.
Rule 2: an error is one line, and the conversation goes on. Only a conversation that nobody types, because
its input is a pipe or a file, ends at the first error.
Rule 3: text of a model or a server reaches a terminal without its control characters.
"""
